"""SIGTERM (schedulers, `kill`, torchrun) and SIGINT (Ctrl-C) end a run such that `--resume` goes on exactly where it was.

Where a signal arrives    What happens
in a step, or while a     The step is finished, a checkpoint is written, the process ends. With several processes, of which
checkpoint is written     a single one may have got the signal: after one step more, by all of them together.
in an evaluation          It is finished, then as above after the next step. One that is due behind the step in which the
                          signal arrived is made by the resumed run, before its first step.
in a bootstrapping of     It stops within a few clustering batches. The masks that are done stay, and the checkpoint is the
region masks              one that precedes every bootstrapping.
in the last step, or      The run just ends: nothing is left to be saved. In the evaluation behind it signals act as by
after it                  default, and a resumed run repeats that evaluation.
before the first step     As by default: nothing is lost.

Workers of data loaders, which get the signals of a process group, too, live on for a minute (`data.build`). An evaluation that
takes longer then ends with an error; the last checkpoint is the one to go on from.

A second signal, from three seconds after the first, ends the process at once: checkpoints are written whole or not at all. The
second is granted because a launcher passes on what the whole process group has got already.

The exit code is 128 + the signal's number (143 after SIGTERM, 130 after SIGINT), as a shell has it for a process that died of
the signal: not 0, which would start the jobs that wait for a finished run, and not 1, which stands for a mistake.
SIGUSR1 is left alone: schedulers that warn of the end of a job can warn by SIGTERM (Slurm: `--signal=TERM@120`).
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException

from ..distributed import DelayedMax

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_REPEAT_SECONDS = 3.0  # within these, signals are the same one, on several ways


class Preempted(SystemExit):
    """A run was stopped by a signal and can be resumed; `code` is 128 + the signal's number."""


class Preemption(HookBase):
    """Stops a run after a signal. Comes behind the hook that writes checkpoints and before the evaluation, in all processes."""

    def __init__(self) -> None:
        self._received = 0  # number of the first signal of this process
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def before_train(self) -> None:
        """Take over the signals; only the main thread may, and in others they stay as they are."""
        self._received = 0
        self._latest = DelayedMax()
        self._previous = _replace_handlers(self._handle)

    def after_train(self) -> None:
        """Give the signals back."""
        _restore_handlers(self._previous)
        self._previous = {}

    def after_step(self) -> None:
        """Stop if a signal has arrived in any process, but not after the last step, behind which there is nothing to save."""
        number = self._latest(self._received)
        if number and self.trainer.iter + 1 < self.trainer.max_iter:
            self.trainer.write_checkpoint()
            _stop(number, f"after iteration {self.trainer.iter}, of which a checkpoint was written")

    def stop_between(self) -> None:
        """Stop now if a signal has arrived in any process; for long work that resumes from its own files, in all processes."""
        if number := max(comm.all_gather(self._received)):
            _stop(number, f"before iteration {self.trainer.iter}; what was done for it stays")

    def _handle(self, number: int, _: FrameType | None) -> None:
        """Note the first signal; the second one acts by default."""
        now = time.monotonic()
        if not self._received:
            self._received, self._received_at = number, now
            os.write(2, _announcement(number).encode())  # not by the logger, in whose middle the signal may have come
        elif now - self._received_at >= _REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _announcement(number: int) -> str:
    name = signal.Signals(number).name
    second = f"another {name}, in {_REPEAT_SECONDS:.0f} s, stops it at once"
    return f"\n{name}: the run stops after this step and its checkpoint; {second}.\n"


def _stop(number: int, where: str) -> NoReturn:
    logger.warning(
        "Stopped by %s %s. The same command with --resume goes on as if there had been no interruption.",
        signal.Signals(number).name,
        where,
    )
    raise Preempted(128 + number)


@contextmanager
def forward_signals() -> Iterator[None]:
    """For the process that only starts the others: pass signals on to them, wait for them, and end with their exit code.

    Raises:
        SystemExit: with 128 + the signal's number, if a process was stopped or killed by a signal of those above.
    """

    def forward(number: int, _: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)  # type: ignore[arg-type]  # it was started

    previous = _replace_handlers(forward)
    try:
        yield
    except ProcessExitedException as error:
        for number in _SIGNALS:
            if error.exit_code in (128 + number, -number):
                raise SystemExit(128 + number) from error
        raise
    finally:
        _restore_handlers(previous)


def _replace_handlers(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Handle the signals that are not ignored (as after `nohup` or `&`) by `handler`; returns what handled them before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    # None: a handler that was not installed from Python, and could not be put back.
    replaced = [s for s in _SIGNALS if signal.getsignal(s) not in (signal.SIG_IGN, None)]
    return {s: signal.signal(s, handler) for s in replaced}


def _restore_handlers(previous: dict[int, Any]) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)
