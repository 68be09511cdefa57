"""Two processes, started by each launcher, make the steps of one with their batch; a lost one ends the other."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from equal_steps import METHODS, two_steps
from tiny_runs import write_photos
from tiny_slotcon import REPO_ROOT

# Of the largest entry of a tensor. Student and teacher are in double precision, the criterion in single precision.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture(scope="module", params=["torchrun", "detectron2"])
def launched(request: pytest.FixtureRequest, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two processes that run tests/equal_steps.py to their end: what they wrote, and how and when they ended."""
    folder = tmp_path_factory.mktemp(request.param)
    command = [str(REPO_ROOT / "tests" / "equal_steps.py"), str(photos), str(folder)]
    if request.param == "torchrun":
        command[:0] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    else:
        command[1:1] = ["--num-gpus", "2", "--dist-url", f"file://{folder}/store"]
    process = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert (folder / "pids").exists(), process.stdout[-5000:]
    return {"folder": folder, "process": process, "ended": time.time()}


@pytest.fixture(scope="module")
def alone(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process computes, for each method."""
    folder = tmp_path_factory.mktemp("alone")
    return {method: two_steps(method, photos, folder) for method in METHODS}


def assert_close(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item()
        difference = (ours[name] - value).abs().max().item()
        assert difference <= TOLERANCE * max(scale, 1e-6), f"{what} {name}: {difference} of {scale}"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one_with_the_doubled_batch(
    launched: dict[str, Any], alone: dict[str, dict[str, Any]], method: str
) -> None:
    """Images, gradients, LARS, the teacher, the centre and batch norm, over two steps."""
    two, one = torch.load(launched["folder"] / f"{method}.pth"), alone[method]
    if method == "SlotCon":
        pairs = [[m["positive_pairs"] for m in process] for process in two["metrics"]]
        assert pairs[0] == pairs[1], "the mean of the processes' means is the mean over all pairs"
    for step in (0, 1):
        assert_close(two["gradients"][step], one["gradients"][step], f"gradient of step {step}")
    # PyTorch's running variance is the unbiased one, that of naiveSyncBN the one by which it divides.
    kept = {k: v for k, v in one["state"].items() if "running_var" not in k and v.is_floating_point()}
    assert_close({k: two["state"][k] for k in kept}, kept, "state")
    assert two["differing"] == [[], []]


@pytest.mark.slow
def test_a_killed_process_ends_the_other_one_and_is_named(launched: dict[str, Any]) -> None:
    """By gloo at once, and by the launcher, within half a minute, whatever the other one waits for."""
    process, file = launched["process"], launched["folder"] / "pids"
    assert process.returncode != 0
    assert "SIGKILL" in process.stdout
    assert "process 1 terminated" in process.stdout or "local_rank: 1" in process.stdout
    assert launched["ended"] - file.stat().st_mtime < 60
    for pid in map(int, file.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
