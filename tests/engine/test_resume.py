"""A run that was killed and resumed equals, bit by bit, the run that was never killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from killed_runs import losses_of, method_cfg, run_in_child
from tiny_runs import assert_identical, final_checkpoint, finetune_cfg, pretrain_cfg, train
from tiny_slotcon import REPO_ROOT

from d2_objssl.checkpoint import CheckpointError
from d2_objssl.engine import Trainer

MakeCfg = Callable[..., CfgNode]


# ---------------------------------------------------------------------------------------------- in one process


def assert_resumes_exactly(make_cfg: MakeCfg, folder: Path, kill_before: int) -> dict[int, Any]:
    """Compare a run without and one with an interruption; returns the losses."""
    whole = train(make_cfg(folder / "whole"))
    first = train(make_cfg(folder / "parts"), kill_before=kill_before)
    # Another seed: what a resumed run does must not depend on how its process began.
    second = train(make_cfg(folder / "parts"), resume=True, seed=12345)
    period = make_cfg(folder / "whole").SOLVER.CHECKPOINT_PERIOD
    assert list(first) == list(range(kill_before))
    assert list(second) == list(range(kill_before // period * period, len(whole)))
    assert {**first, **second} == whole
    for losses in (first, second):
        assert all(losses[i] == whole[i] for i in losses)
    assert_identical(final_checkpoint(folder / "parts"), final_checkpoint(folder / "whole"))
    return whole


@pytest.mark.parametrize(
    "opts",
    [
        (),
        ("SOLVER.AMP.ENABLED", True, "SOLVER.OPTIMIZER", "ADAMW", "SOLVER.BASE_LR", 0.001),
    ],
    ids=["lars, float32", "adamw, bfloat16"],
)
def test_pretraining(photos, folder, opts):
    losses = assert_resumes_exactly(lambda out: pretrain_cfg(photos, out, *opts), folder, kill_before=5)
    assert len({x["total_loss"] for x in losses.values()}) == len(losses), (
        "every iteration differs, so equality means something"
    )


def test_pretraining_in_epochs_with_workers_and_an_unreadable_image(photos, folder):
    """20 images in batches of 4: the interruption is in the second epoch; one half has workers, the other none."""
    shutil.copytree(photos, folder / "photos")
    (folder / "photos" / "004.jpg").write_bytes(b"")
    epochs = ("SOLVER.MAX_EPOCHS", 1.8, "SOLVER.WARMUP_EPOCHS", 0.4, "SOLVER.CHECKPOINT_EPOCHS", 0.6)
    workers = ("DATALOADER.NUM_WORKERS", 2)
    whole = train(pretrain_cfg(folder / "photos", folder / "whole", *epochs))
    assert len(whole) == 9
    first = train(pretrain_cfg(folder / "photos", folder / "parts", *epochs, *workers), kill_before=7)
    second = train(pretrain_cfg(folder / "photos", folder / "parts", *epochs), resume=True, seed=1)
    assert {**first, **second} == whole and min(second) == 6
    assert_identical(final_checkpoint(folder / "parts"), final_checkpoint(folder / "whole"))


def test_pretraining_without_a_seed_keeps_the_order_that_it_began_with(photos, folder):
    unseeded = ("SEED", -1)
    train(pretrain_cfg(photos, folder / "parts", *unseeded), kill_before=6, seed=3)
    data = torch.load(folder / "parts" / "model_0000005.pth", weights_only=True)["trainer"]["data"]
    whole = train(pretrain_cfg(photos, folder / "whole", "SEED", data["seed"]), seed=3)
    second = train(pretrain_cfg(photos, folder / "parts", *unseeded), resume=True, seed=4)
    assert [x["total_loss"] for x in second.values()] == [whole[i]["total_loss"] for i in second]


FINETUNE = [
    (),
    ("SOLVER.AMP.ENABLED", True, "DATASETS.TEST", ("scenes_tiny_val",), "TEST.EVAL_PERIOD", 3),
    ("TEST.EVAL_PERIOD", 3, "TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 3),
]


@pytest.mark.parametrize("opts", FINETUNE, ids=["grouped", "bfloat16, evaluation", "precise BN"])
def test_fine_tuning(folder, opts):
    """RoI sampling draws from PyTorch's generator; evaluation comes after the checkpoint of the same iteration."""
    assert_resumes_exactly(lambda out: finetune_cfg(out, *opts), folder, kill_before=5)


def test_resuming_a_finished_run_changes_nothing(photos, folder):
    cfg = pretrain_cfg(photos, folder / "run", "SOLVER.MAX_ITER", 4)
    train(cfg)
    before = final_checkpoint(folder / "run")
    assert train(cfg, resume=True, seed=9) == {}
    assert_identical(final_checkpoint(folder / "run"), before)


def test_resume_without_a_checkpoint_starts_from_the_beginning(photos, folder):
    cfg = pretrain_cfg(photos, folder / "run", "SOLVER.MAX_ITER", 3)
    assert list(train(cfg, resume=True)) == [0, 1, 2]


def test_without_resume_a_run_starts_again_although_there_is_a_checkpoint(photos, folder):
    cfg = pretrain_cfg(photos, folder / "run", "SOLVER.MAX_ITER", 4)
    assert train(cfg) == train(cfg)


def test_a_damaged_last_checkpoint_costs_some_iterations_only(photos, folder):
    whole = train(pretrain_cfg(photos, folder / "whole"))
    train(pretrain_cfg(photos, folder / "parts"), kill_before=6)
    last = folder / "parts" / "model_0000005.pth"
    last.write_bytes(last.read_bytes()[:100_000])
    second = train(pretrain_cfg(photos, folder / "parts"), resume=True, seed=1)
    assert min(second) == 3 and all(second[i] == whole[i] for i in second)
    assert_identical(final_checkpoint(folder / "parts"), final_checkpoint(folder / "whole"))


def test_resuming_with_other_data_is_warned_about(photos, folder, caplog):
    train(pretrain_cfg(photos, folder / "run"), kill_before=4)
    (photos_now := folder / "fewer").mkdir()
    for file in sorted(photos.iterdir())[:13]:
        shutil.copy(file, photos_now)
    caplog.set_level("WARNING", "d2_objssl")
    train(pretrain_cfg(photos_now, folder / "run", "SOLVER.IMS_PER_BATCH", 2), resume=True)
    assert "began with num_images 20, now it is 13" in caplog.text
    assert "began with total_batch_size 4, now it is 2" in caplog.text


# ------------------------------------------------------------------------------------------- with another config

ONE_CYCLE = ("SOLVER.OPTIMIZER", "ADAMW", "SOLVER.LR_SCHEDULER_NAME", "OneCycleLR", "SOLVER.WARMUP_FACTOR", 0.1)


@pytest.mark.parametrize(
    ("opts", "changes"),
    [
        ((), {"BASE_LR": 0.001, "MOMENTUM": 0.5, "WEIGHT_DECAY": 0.01, "LARS_TRUST_COEFFICIENT": 0.1}),
        ((), {"MAX_ITER": 8, "WARMUP_ITERS": 4}),
        (ONE_CYCLE, {"BASE_LR": 0.001, "WEIGHT_DECAY": 0.01, "ADAMW_BETAS": [0.8, 0.99]}),
        (ONE_CYCLE, {"MAX_ITER": 8}),
    ],
    ids=["lars, cosine", "length", "adamw, one cycle", "one cycle, length"],
)
def test_a_resumed_run_follows_its_config(photos, folder, caplog, opts, changes):
    """From iteration 3 on, rates and settings are those of a run that had the new config from the start."""
    caplog.set_level("WARNING", "d2_objssl")
    new = [x for key, value in changes.items() for x in (f"SOLVER.{key}", value)]
    train(pretrain_cfg(photos, folder, *opts), kill_before=3)
    resumed, fresh = (Trainer(pretrain_cfg(photos, folder, *opts, *new, "VIS_PERIOD", 77)) for _ in range(2))
    resumed.resume_or_load(resume=True)
    assert "The config is not that of model_0000002.pth: " in caplog.text and "VIS_PERIOD" not in caplog.text
    assert all(f"SOLVER.{key} " in caplog.text and f" -> {value}" in caplog.text for key, value in changes.items())
    for _ in range(3):
        fresh.optimizer.step()  # without gradients: nothing moves
        fresh.scheduler.step()
    assert_identical(*(trainer.optimizer.state_dict()["param_groups"] for trainer in (resumed, fresh)))
    assert_identical(*(trainer.scheduler.state_dict() for trainer in (resumed, fresh)))
    assert resumed.optimizer.state_dict()["state"], "the momenta are there"


def test_resuming_with_an_equal_config_warns_of_nothing(photos, folder, caplog):
    caplog.set_level("WARNING", "d2_objssl.engine.resuming")
    train(pretrain_cfg(photos, folder / "run"), kill_before=3)
    shutil.move(folder / "run", folder / "moved")
    train(pretrain_cfg(photos, folder / "moved", "SOLVER.MAX_TO_KEEP", 3), resume=True)
    assert not [r for r in caplog.records if r.name == "d2_objssl.engine.resuming"]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("SOLVER.OPTIMIZER", "ADAMW"), r'SOLVER.OPTIMIZER is "ADAMW".*model_0000002.pth has "LARS"'),
        (
            ("SOLVER.LR_SCHEDULER_NAME", "OneCycleLR", "SOLVER.WARMUP_FACTOR", 0.1),
            r'SOLVER.LR_SCHEDULER_NAME is "OneCycleLR".*has "WarmupCosineLR"',
        ),
        (("SOLVER.WEIGHT_DECAY_BIAS", 0.5), r"momenta for groups of .*SOLVER.WEIGHT_DECAY\*"),
        (
            ("SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 0),
            r"model_0000002.pth was written after 3 .*SOLVER.MAX_ITER is 2",
        ),
    ],
    ids=["optimiser", "schedule", "groups", "length"],
)
def test_a_config_that_a_run_cannot_go_on_with_is_refused(photos, folder, opts, message):
    train(pretrain_cfg(photos, folder), kill_before=3)
    with pytest.raises(ValueError, match=message):
        Trainer(pretrain_cfg(photos, folder, *opts)).resume_or_load(resume=True)


# ---------------------------------------------------------------------------------------- in the folder of another run


def test_an_earlier_runs_checkpoints_are_not_resumed_from(photos, folder, caplog):
    """A new run in its folder is killed before its first checkpoint, then resumed, then its own checkpoint is damaged."""
    caplog.set_level("INFO", "d2_objssl")
    train(pretrain_cfg(photos, folder / "run", "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 1))
    assert "earlier run" not in caplog.text
    names = {path.name for path in (folder / "run").glob("model_*.pth")}
    cfg = pretrain_cfg(photos, folder / "run", "SOLVER.MAX_TO_KEEP", 1)
    train(cfg, kill_before=1)
    assert "has 5 checkpoints of an earlier run, model_0000000.pth to model_final.pth" in caplog.text
    assert {path.name for path in (folder / "run").glob("model_*.pth")} == names, "nothing is deleted"
    assert list(train(cfg, resume=True, kill_before=4)) == [0, 1, 2, 3]
    assert "no checkpoint of this run to resume from: it starts from the beginning" in caplog.text
    assert list(train(cfg, resume=True, kill_before=5)) == [3, 4], "a file that was written anew counts"
    own = folder / "run" / "model_0000002.pth"
    own.write_bytes(own.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read") as caught:
        Trainer(cfg).resume_or_load(resume=True)
    assert str(caught.value).count(".pth: ") == 1, "the others are not tried"
    train(cfg)
    left = {path.name for path in (folder / "run").glob("model_*.pth")}
    assert left == names - {own.name} | {"model_0000005.pth"}, "MAX_TO_KEEP is about the run's own"


def test_a_run_that_does_not_start_leaves_the_earlier_one_as_it_was(photos, folder, monkeypatch):
    """Not enough space on the disk: --resume still goes on with the run before."""
    train(pretrain_cfg(photos, folder), kill_before=4)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
        with pytest.raises(OSError, match="10 bytes free"):
            train(pretrain_cfg(photos, folder))
    assert min(train(pretrain_cfg(photos, folder), resume=True)) == 3


# ----------------------------------------------------------------------------------------- processes, really killed

# Registers the data sets of `tiny_runs` before it runs the tool that the arguments name.
_WRAPPER = """
import runpy, sys, tiny_runs
tiny_runs.register_wide_and_tall()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(cfg: CfgNode, *args: str) -> "subprocess.Popen[bytes]":
    """Start tools/train_net.py on a config in a process group of its own."""
    output_dir = Path(cfg.OUTPUT_DIR)
    output_dir.mkdir(parents=True, exist_ok=True)
    config_file = output_dir.with_suffix(".yaml")
    config_file.write_text(cfg.dump())
    tool = ["tools/train_net.py", "--config-file", str(config_file), *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(REPO_ROOT / "tests"), env["PYTHONPATH"]])
    with open(output_dir.with_suffix(".log"), "ab") as log:
        command = [sys.executable, "-c", _WRAPPER, *tool]
        return subprocess.Popen(
            command, cwd=REPO_ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def log_of(cfg: CfgNode) -> str:
    return Path(cfg.OUTPUT_DIR).with_suffix(".log").read_text(errors="replace")[-5000:]


def run(cfg: CfgNode, *args: str) -> None:
    process = start(cfg, *args)
    try:
        assert process.wait(timeout=240) == 0, log_of(cfg)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def kill_when(cfg: CfgNode, condition: Callable[[Path], bool], *args: str) -> None:
    """Run until a condition on the output folder holds, then kill the process and its children with SIGKILL."""
    process = start(cfg, *args)
    deadline = time.monotonic() + 240
    try:
        while not condition(Path(cfg.OUTPUT_DIR)):
            assert process.poll() is None, f"ended before it could be killed: {log_of(cfg)}"
            assert time.monotonic() < deadline, log_of(cfg)
            time.sleep(0.002)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (Path(cfg.OUTPUT_DIR) / "model_final.pth").exists()


def has_written(iteration: int) -> Callable[[Path], bool]:
    """The checkpoint is complete: the process is some way into one of the next iterations."""

    def condition(output_dir: Path) -> bool:
        last = output_dir / "last_checkpoint"
        return last.exists() and last.read_text() == f"model_{iteration:07d}.pth"

    return condition


# Of a run in three processes: where each of the first two is killed. The iterations 2 and 5 have a checkpoint.
FAULTS = {
    "SlotCon": [("step", 4), ("write", 5)],
    "DetConS": [("rename", 2), ("step", 6)],
    "DetConB": [("write", 2), ("step", 3)],
    "CYBORGS": [("bootstrap", 3), ("step", 6)],
    "SemCL": [("step", 5), ("rename", 5)],
    "Mask R-CNN": [("step", 3), ("evaluation", 3)],
}


@pytest.mark.slow
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", FAULTS)
def test_killed_for_real(photos, folder, method, amp):
    """SIGKILL in every kind of place, with two workers, then none, then two."""

    def make_cfg(name: str, workers: int = 0) -> CfgNode:
        opts = ("SOLVER.AMP.ENABLED", amp, "DATALOADER.NUM_WORKERS", workers)
        return method_cfg(method, photos, folder / name, *opts)

    whole = {i: x["total_loss"] for i, x in train(make_cfg("whole")).items()}
    for n, (fault, workers) in enumerate(zip([*FAULTS[method], ("none", 0)], (2, 0, 2), strict=True)):
        run_in_child(make_cfg("killed", workers), photos, resume=n > 0, fault=fault)
    losses = losses_of(folder / "killed")
    # Not logged: a step behind which the process was killed while it wrote a checkpoint, also the final one, or evaluated.
    assert set(whole) - {2, 5, max(whole)} <= {i for i, _ in losses}
    assert [whole[i] for i, _ in losses] == [loss for _, loss in losses]
    assert_identical(final_checkpoint(folder / "killed"), final_checkpoint(folder / "whole"))
    assert not list((folder / "killed").glob(".*.tmp")), "what a killed process left was deleted"
    if method == "Mask R-CNN":
        results = [(folder / name / "metrics.json").read_text().splitlines()[-1] for name in ("whole", "killed")]
        assert '"bbox/AP"' in results[0] and results[0] == results[1], "text, as some figures are NaN"


@pytest.mark.slow
def test_two_processes_killed_for_real(photos, folder):
    """Detectron2's launcher with two CPU processes: gloo, naiveSyncBN, DDP."""

    def make_cfg(name: str) -> CfgNode:
        return pretrain_cfg(photos, folder / name)

    def launch(name: str) -> tuple[str, ...]:
        store = folder / f"store-{name}-{time.monotonic_ns()}"
        return ("--num-gpus", "2", "--dist-url", f"file://{store}")

    run(make_cfg("whole"), *launch("whole"))
    kill_when(make_cfg("killed"), has_written(5), *launch("killed"))
    run(make_cfg("killed"), *launch("killed"), "--resume")
    assert_identical(final_checkpoint(folder / "killed"), final_checkpoint(folder / "whole"))
