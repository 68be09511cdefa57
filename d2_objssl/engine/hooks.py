"""Hooks: the teacher's moving average, precise batch-norm statistics, checkpoints, evaluations, random generators."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn

from ..checkpoint import ObjSSLCheckpointer
from ..earlier_checkpoints import set_aside_checkpoints
from .processes import fail_together, on_main_process

logger = logging.getLogger(__name__)


def ema_momentum(step: int, total_steps: int, base: float, schedule: str = "cosine") -> float:
    """Momentum m of the teacher's update that precedes its forward pass number `step`.

    Args:
        step: k, counted from 0.
        total_steps: T.
        base: m_0.
        schedule: "cosine": 1 - (1 - m_0) (cos(pi k / T) + 1) / 2. "constant": m_0.

    Raises:
        ValueError: for an unknown schedule.

    Source: BYOL; SlotCon and DetCon use the cosine, CYBORGS the constant.
    """
    if schedule == "constant":
        return base
    if schedule == "cosine":
        return 1 - (1 - base) * (math.cos(math.pi * step / total_steps) + 1) / 2
    raise ValueError(f'MODEL.SSL.TEACHER.MOMENTUM_SCHEDULE is "{schedule}"; known: "cosine", "constant"')


class EMATeacher(HookBase):
    """Move the teacher's parameters towards the student's after every optimiser step.

    After step k this makes the update that the papers make before the teacher's forward pass k + 1. It depends on the
    iteration alone, so it needs no state to resume. Batch-norm buffers stay the teacher's own. Where the optimiser skipped
    its step (float16), the student has not moved, and the teacher does not.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, momentum: float, schedule: str) -> None:
        """
        Args:
            teacher, student: modules with equal parameters, in equal order.
            momentum, schedule: see `ema_momentum`.
        """
        ema_momentum(0, 1, momentum, schedule)  # an unknown schedule is found now, not after the first step
        self._teacher = [p.data for p in teacher.parameters()]
        self._student = [p.data for p in student.parameters()]
        assert [p.shape for p in self._teacher] == [p.shape for p in self._student]
        self._momentum = momentum
        self._schedule = schedule

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the teacher."""
        if getattr(self.trainer, "step_skipped", False):
            return
        step = self.trainer.iter + 1
        momentum = ema_momentum(step, self.trainer.max_iter, self._momentum, self._schedule)
        torch._foreach_lerp_(self._teacher, self._student, 1 - momentum)
        if step % 20 == 0:
            self.trainer.storage.put_scalar("teacher_momentum", momentum, smoothing_hint=False)


class PreciseBN(HookBase):
    """Replace the running averages of batch-norm layers by averages over some batches.

    As Detectron2's hook of that name, but every time over the same batches: it has no position for a resumed run to lose.
    """

    def __init__(self, period: int, model: nn.Module, batches: Callable[[], Iterable[Any]], num_iter: int) -> None:
        """
        Args:
            period: iterations between updates; one more follows the last iteration. 0: that one only.
            model: its layers in training mode are updated.
            batches: starts an iteration over training batches.
            num_iter: how many batches to average over.
        """
        self._period = period
        self._model = model
        self._batches = batches
        self._num_iter = num_iter

    def after_step(self) -> None:
        """Update when it is time."""
        step = self.trainer.iter + 1
        if step == self.trainer.max_iter or (self._period > 0 and step % self._period == 0):
            with EventStorage():  # what the model logs here is of no training step
                update_bn_stats(self._model, self._batches(), self._num_iter)


class Checkpoints(PeriodicCheckpointer):
    """Detectron2's `PeriodicCheckpointer`, which also writes before certain iterations and when it is asked to.

    Must be there in every process: if the main process cannot write, all of them end. `max_to_keep` also counts the
    checkpoints from before a resume.
    """

    checkpointer: ObjSSLCheckpointer

    def __init__(
        self,
        checkpointer: ObjSSLCheckpointer,
        period: int,
        *,
        max_to_keep: int | None = None,
        also_before: Collection[int] = (),
    ) -> None:
        """
        Args:
            checkpointer, period, max_to_keep: as in the parent.
            also_before: iterations that a checkpoint precedes, too; `max_to_keep` counts it like the others.
        """
        super().__init__(checkpointer, period, max_to_keep=max_to_keep)
        self._also_before = also_before
        self._written = -1  # iteration of the last checkpoint

    def before_train(self) -> None:
        """Count what is there already; files that are no older than the run's start are not its own.

        In the folder of an earlier run, one that starts from the beginning must not be resumed from that run's checkpoints.
        """
        super().before_train()
        if self.trainer.start_iter == 0:
            on_main_process(self._set_aside)
        earlier = self.checkpointer.periodic_checkpoints().items()
        start = self.trainer.start_iter
        self.recent_checkpoints = [path for path, iteration in earlier if iteration < start]

    def _set_aside(self) -> None:
        folder = self.checkpointer.save_dir
        if names := set_aside_checkpoints(folder):
            logger.warning(
                "OUTPUT_DIR %s has %d checkpoints of an earlier run, %s to %s. They stay, but --resume and SOLVER.MAX_TO_KEEP no "
                "longer count them; files of the same names are written over.",
                folder,
                len(names),
                names[0],
                names[-1],
            )

    def step(self, iteration: int, **kwargs: Any) -> None:
        """Write the checkpoints that are due after this iteration."""
        # First: a run that is killed behind its last numbered checkpoint has no step left in which to write it.
        if iteration + 1 == self.max_iter:
            with fail_together():
                self.checkpointer.save(f"{self.file_prefix}_final", iteration=iteration, **kwargs)
        if (iteration + 1) % self.period == 0 or iteration + 1 in self._also_before:
            self.write(iteration, **kwargs)

    def write(self, iteration: int, **kwargs: Any) -> None:
        """Write a checkpoint of this iteration unless there is one; older ones are deleted when it is on the disk."""
        if iteration == self._written:
            return
        with fail_together():
            self.checkpointer.save(f"{self.file_prefix}_{iteration:07d}", iteration=iteration, **kwargs)
        self._written = iteration
        if self.max_to_keep is None or not self.checkpointer.save_to_disk:
            return
        self.recent_checkpoints.append(self.checkpointer.get_checkpoint_file())
        while len(self.recent_checkpoints) > self.max_to_keep:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.recent_checkpoints.pop(0))


class Evaluation(EvalHook):
    """Detectron2's `EvalHook`; training does not depend on evaluations, and an interruption leaves none out.

    It gives the random generators back as it found them. A run that is resumed right where an evaluation is due makes it
    first: the process before may have ended between the checkpoint and its end.
    """

    def before_step(self) -> None:
        """Before the first step of a resumed run, evaluate as behind the step before, if that was due."""
        step = self.trainer.iter
        if step == 0 or step != self.trainer.start_iter or self._period <= 0 or step % self._period:
            return
        logger.info("Evaluating after iteration %d, as the process before may not have come to that", step - 1)
        self.trainer.storage.iter = step - 1
        self._do_eval()
        self.trainer.storage.iter = step

    def _do_eval(self) -> None:
        state = _get_random_state()
        super()._do_eval()
        _set_random_state(state)


class RandomState(HookBase):
    """Keep the random generators of every process in the checkpoint.

    Must come before the hook that writes checkpoints, in every process.
    """

    def __init__(self, period: int, also_before: Collection[int] = ()) -> None:
        """
        Args:
            period: iterations between checkpoints.
            also_before: iterations that a checkpoint precedes, too.
        """
        self._period = period
        self._also_before = also_before
        self._saved: list[dict[str, Any]] = []
        self._own: dict[str, Any] | None = None  # state of this process that the next step starts with
        self._pending: list[dict[str, Any]] = []

    def before_step(self) -> None:
        """Before the first step after a checkpoint or a resume, put the generators back."""
        if self._own is not None:
            # A bootstrapping of masks, which precedes this hook, may have drawn numbers, and a resumed run finds its files.
            _set_random_state(self._own)
            self._own = None
        if not self._pending:
            return
        if len(self._pending) == comm.get_world_size():
            _set_random_state(self._pending[comm.get_rank()])
        else:
            logger.warning(
                "The checkpoint was written by %d processes, now there are %d: the random generators start anew.",
                len(self._pending),
                comm.get_world_size(),
            )
        self._pending = []

    def after_step(self) -> None:
        """Gather the states whenever a checkpoint is due."""
        step = self.trainer.iter + 1
        due = step == self.trainer.max_iter or (self._period > 0 and step % self._period == 0)
        if due or step in self._also_before:
            self.collect()

    def collect(self) -> None:
        """Gather the states of all processes; to be called in all of them."""
        self._own = _get_random_state()
        self._saved = comm.gather(self._own)

    def state_dict(self) -> dict[str, Any]:
        """States of all processes, as of the last checkpoint that was due."""
        return {"ranks": self._saved} if self._saved else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the states up; they are set before the next step."""
        self._pending = state_dict["ranks"]


def _get_random_state() -> dict[str, Any]:
    """Tensors and plain containers only, so that checkpoints load with weights_only."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
