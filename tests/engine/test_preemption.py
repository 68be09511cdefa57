"""SIGTERM and Ctrl-C: what is written, how the process ends, and that a resumed run equals one without interruption."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import get_event_storage
from killed_runs import losses_of, start_child
from multiprocess import run_in_processes
from test_resume import log_of, run, start
from tiny_cyborgs import cyborgs_cfg
from tiny_runs import assert_identical, final_checkpoint, finetune_cfg, pretrain_cfg, train
from torch import nn

from d2_objssl.distributed import DelayedMax
from d2_objssl.engine import Trainer
from d2_objssl.engine.feature_clustering import FeatureClusterer
from d2_objssl.engine.preemption import Preempted, Preemption


@pytest.fixture(autouse=True)
def handlers_are_given_back() -> Iterator[None]:
    """No test may change how the process of the tests itself takes signals."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    yield
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


class SignalAt(HookBase):
    """The process gets a signal before a step."""

    def __init__(self, iteration: int, number: int) -> None:
        self.iteration = iteration
        self.number = number

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            signal.raise_signal(self.number)


def train_until_stopped(cfg: CfgNode, *, resume: bool = False, signal_at: tuple[int, int] | None = None) -> Preempted:
    """Train in this process until a signal stops the run; returns what ended it."""
    seed_all_rng(12345 if resume else 0)
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    trainer = Trainer(cfg)
    trainer.register_hooks([SignalAt(*signal_at)] if signal_at else [])
    trainer.resume_or_load(resume=resume)
    with pytest.raises(Preempted) as caught:
        trainer.train()
    return caught.value


def signalling(call: int, function: Callable[..., Any], calls: list[int] | None = None) -> Callable[..., Any]:
    """`function`, in whose call number `call`, counted from 1, SIGTERM arrives."""
    calls = [0] if calls is None else calls

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            signal.raise_signal(signal.SIGTERM)
        return function(*args, **kwargs)

    return wrapped


def checkpoints_in(folder: Path) -> list[int]:
    return sorted(int(f.stem[6:]) for f in folder.glob("model_0*.pth"))


# ------------------------------------------------------------------------------------------------ one process


def test_a_stopped_run_goes_on_exactly(photos: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Stopped in step 1 and, resumed, in step 3; there is a checkpoint of 2 anyway. In the last step a signal stops nothing."""
    caplog.set_level("WARNING", "d2_objssl")
    cfg = pretrain_cfg(photos, folder / "parts", "SOLVER.MAX_TO_KEEP", 2, "SOLVER.MAX_ITER", 6)
    assert train_until_stopped(cfg, signal_at=(1, signal.SIGTERM)).code == 143
    assert "Stopped by SIGTERM after iteration 1" in caplog.text and "with --resume" in caplog.text
    assert checkpoints_in(folder / "parts") == [1]
    assert train_until_stopped(cfg, resume=True, signal_at=(3, signal.SIGINT)).code == 130
    assert checkpoints_in(folder / "parts") == [2, 3], "MAX_TO_KEEP counts those of earlier processes"
    trainer = Trainer(cfg)
    trainer.register_hooks([SignalAt(5, signal.SIGTERM)])
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert checkpoints_in(folder / "parts") == [3, 5]
    train(pretrain_cfg(photos, folder / "whole", "SOLVER.MAX_ITER", 6))
    assert_identical(final_checkpoint(folder / "parts"), final_checkpoint(folder / "whole"))


def test_signal_while_a_checkpoint_is_written(photos: Path, folder: Path) -> None:
    """The checkpoint, of iteration 2, is finished, and it is the one to go on from."""
    cfg = pretrain_cfg(photos, folder / "run")
    with mock.patch("torch.save", signalling(1, torch.save)):
        train_until_stopped(cfg)
    assert checkpoints_in(folder / "run") == [2]
    assert torch.load(folder / "run" / "model_0000002.pth", weights_only=True)["iteration"] == 2


def test_signal_in_an_evaluation(folder: Path) -> None:
    """The evaluation after iteration 1 is finished and logged; then comes a step, and its checkpoint."""
    cfg = finetune_cfg(folder / "run", "DATASETS.TEST", ("scenes_tiny_val",), "TEST.EVAL_PERIOD", 2)
    with mock.patch.object(GeneralizedRCNN, "inference", signalling(2, GeneralizedRCNN.inference)):
        train_until_stopped(cfg)
    assert checkpoints_in(folder / "run") == [2]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.json").read_text().splitlines()]
    assert any("bbox/AP" in line for line in lines)


def test_signal_before_an_evaluation(folder: Path) -> None:
    """It stops the run in step 2, behind which an evaluation is due and no checkpoint: the resumed run makes it first."""
    opts = ("DATASETS.TEST", ("scenes_tiny_val",), "TEST.EVAL_PERIOD", 3, "SOLVER.MAX_ITER", 4)
    opts = (*opts, "SOLVER.CHECKPOINT_PERIOD", 100)
    evaluated: dict[str, list[tuple[int, str]]] = {"whole": [], "parts": []}

    class Recording(Trainer):
        @classmethod
        def test(cls, cfg: CfgNode, model: nn.Module) -> Any:  # type: ignore[override]
            digest = hashlib.sha256()
            for tensor in model.state_dict().values():
                digest.update(tensor.numpy().tobytes())
            evaluated[Path(cfg.OUTPUT_DIR).name].append((get_event_storage().iter, digest.hexdigest()))
            return super().test(cfg, model)

    def start_run(name: str, *, resume: bool = False, stop: int = -1) -> None:
        seed_all_rng(12345 if resume else 0)
        (folder / name).mkdir(exist_ok=True)
        trainer = Recording(finetune_cfg(folder / name, *opts))
        trainer.register_hooks([SignalAt(stop, signal.SIGTERM)])
        trainer.resume_or_load(resume=resume)
        trainer.train()

    start_run("whole")
    with pytest.raises(Preempted):
        start_run("parts", stop=2)
    assert not evaluated["parts"]
    start_run("parts", resume=True)
    assert [iteration for iteration, _ in evaluated["whole"]] == [2, 4]
    assert evaluated["parts"] == evaluated["whole"], "after the same iterations, with the same weights and statistics"
    assert_identical(final_checkpoint(folder / "parts"), final_checkpoint(folder / "whole"))


@pytest.mark.slow
def test_signal_while_masks_are_bootstrapped(photos: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In round 1, before iteration 2: batches that are done are not done again; the checkpoint is that of iteration 1."""
    caplog.set_level("WARNING", "d2_objssl")
    one = ("MODEL.SSL.CYBORGS.IMAGES_PER_CLUSTERING", 1, "SOLVER.MAX_ITER", 4)
    calls = [-1]  # not the trial before training
    with mock.patch.object(FeatureClusterer, "cluster", signalling(3, FeatureClusterer.cluster, calls)):
        train_until_stopped(cyborgs_cfg(photos, folder / "parts", *one))
    assert calls == [8] and checkpoints_in(folder / "parts") == [1], "stopped after 8 of 20 batches"
    assert "SIGTERM before iteration 2" in caplog.text
    second = train(cyborgs_cfg(photos, folder / "parts", *one), resume=True, seed=1)
    whole = train(cyborgs_cfg(photos, folder / "whole", *one))
    assert second == {i: whole[i] for i in (2, 3)}
    assert_identical(final_checkpoint(folder / "parts"), final_checkpoint(folder / "whole"))


def test_only_the_main_thread_takes_signals_and_ignored_ones_stay_so() -> None:
    before = signal.getsignal(signal.SIGINT)
    hook = Preemption()
    thread = threading.Thread(target=hook.before_train)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        hook.before_train()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == hook._handle
    finally:
        hook.after_train()
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------------ several processes


def stop_one_of_two(photos: str, folder: str) -> dict[str, Any]:
    """The maxima of DelayedMax, then a run of which process 1 gets SIGTERM in step 2; then it is resumed."""
    latest = DelayedMax()
    maxima = [latest(value) for value in ((0, 3, 0, 0), (1, 0, 0, 0))[comm.get_rank()]]
    cfg = pretrain_cfg(Path(photos), Path(folder) / "run", "SOLVER.CHECKPOINT_PERIOD", 100)
    seed_all_rng(0)
    trainer = Trainer(cfg)
    trainer.register_hooks([SignalAt(2, signal.SIGTERM)] if comm.get_rank() == 1 else [])
    try:
        trainer.train()
    except Preempted as stopped:
        code, iteration = stopped.code, trainer.iter
    for name in ("run", "whole"):
        seed_all_rng(0)
        trainer = Trainer(pretrain_cfg(Path(photos), Path(folder) / name, "SOLVER.CHECKPOINT_PERIOD", 100))
        trainer.resume_or_load(resume=name == "run")
        trainer.train()
    return {"maxima": maxima, "code": code, "iteration": iteration}


@pytest.mark.slow
def test_all_processes_stop_after_the_same_step(photos: Path, folder: Path) -> None:
    """One step later than the one in which one of them got the signal."""
    for name in ("run", "whole"):
        (folder / name).mkdir()
    ranks = run_in_processes(stop_one_of_two, str(photos), str(folder))
    assert ranks == [{"maxima": [0, 1, 3, 0], "code": 143, "iteration": 3}] * 2
    assert checkpoints_in(folder / "run") == [3]
    assert_identical(final_checkpoint(folder / "run"), final_checkpoint(folder / "whole"))


# ------------------------------------------------------------------------------------------------ real processes


@pytest.mark.slow
def test_a_second_signal_stops_at_once(photos: Path, folder: Path) -> None:
    """Signals that come together are one; the process is in a step that never ends."""
    child = start_child(pretrain_cfg(photos, folder / "run"), photos, fault=("hang", 2))
    wait_until(lambda: (folder / "run" / "losses.jsonl").exists() and len(losses_of(folder / "run")) == 2, child)
    first = time.monotonic()
    while child.is_alive() and time.monotonic() < first + 60:
        os.kill(child.pid, signal.SIGTERM)
        child.join(timeout=0.25)
    assert child.exitcode == -signal.SIGTERM
    assert time.monotonic() > first + 3  # from when it handled the first one


def wait_until(condition: Callable[[], bool], process: Any) -> None:
    """Wait for a condition while a process lives."""
    is_alive = process.is_alive if hasattr(process, "is_alive") else lambda: process.poll() is None
    deadline = time.monotonic() + 240
    while not condition():
        assert is_alive() and time.monotonic() < deadline
        time.sleep(0.01)


def assert_ended_cleanly(cfg: CfgNode, process: subprocess.Popen[bytes], code: int) -> None:
    assert process.wait(timeout=240) == code, log_of(cfg)
    log = log_of(cfg)
    assert "Traceback" not in log and "Error" not in log, log
    assert "goes on as if there had been no interruption" in log


LONG = ("SOLVER.MAX_ITER", 400, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_TO_KEEP", 2, "DATALOADER.NUM_WORKERS", 2)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "num_processes"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_the_command_ends_cleanly(photos: Path, folder: Path, number: signal.Signals, num_processes: int) -> None:
    """The signal goes to the whole process group, workers included, as from Slurm or from Ctrl-C in a terminal."""
    cfg = pretrain_cfg(photos, folder / "run", *LONG, "DATALOADER.NUM_WORKERS", 3 - num_processes)
    launch = ("--num-gpus", str(num_processes), "--dist-url", f"file://{folder}/store")
    process = start(cfg, *launch)
    wait_until(lambda: bool(checkpoints_in(folder / "run")), process)
    os.killpg(process.pid, number)
    assert_ended_cleanly(cfg, process, 128 + number)
    last = checkpoints_in(folder / "run")[-1]
    # A run of as many iterations, with the same schedule, that nothing stops, would take long: one more step must do.
    if num_processes == 1:
        whole = pretrain_cfg(photos, folder / "whole", *LONG, "SOLVER.CHECKPOINT_PERIOD", last + 1)
        first = start(whole)
        wait_until(lambda: bool(checkpoints_in(folder / "whole")), first)
        first.kill()
        files = [torch.load(folder / name / f"model_{last:07d}.pth", weights_only=True) for name in ("run", "whole")]
        for content in files:
            content.pop("d2_objssl")
            content["trainer"]["hooks"].pop("RunRecord", None)
        assert_identical(*files)


@pytest.mark.slow
def test_torchrun_ends_cleanly(photos: Path, folder: Path) -> None:
    """SIGTERM to torchrun itself, which passes it on."""
    cfg = pretrain_cfg(photos, folder / "run", *LONG)
    (folder / "cfg.yaml").write_text(cfg.dump())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["tools/train_net.py", "--config-file", str(folder / "cfg.yaml")]
    with open(folder / "run.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_until(lambda: bool(checkpoints_in(folder / "run")), process)
    process.terminate()
    assert process.wait(timeout=240) != 0
    text = (folder / "run.log").read_text()
    assert "Stopped by SIGTERM" in text and "goes on as if there had been no interruption" in text, text
    run(
        pretrain_cfg(photos, folder / "run", *LONG, "SOLVER.MAX_ITER", checkpoints_in(folder / "run")[-1] + 2),
        "--resume",
    )
