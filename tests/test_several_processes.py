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
from torch import Tensor

# Of the largest entry of a tensor. The first gradient differs by the rounding of the criterion, which is in single
# precision; what follows from the first step by as much magnified.
FIRST_TOLERANCE, TOLERANCE = 1e-5, 2e-3
NO_GRADIENT = 1e-5  # largest entry of what rounding leaves of it for biases before a batch norm


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


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, what: str) -> None:
    for name, value in expected.items():
        difference = (ours[name] - value).abs().max().item()
        scale = value.abs().max().item()
        assert difference <= tolerance * scale, f"{what} of {name}: {difference} of {scale}"


def moves(run: dict[str, Any], names: list[str]) -> dict[str, Tensor]:
    """What two steps change."""
    return {name: run["end"][name] - run["start"][name] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one_with_the_doubled_batch(
    launched: dict[str, Any], alone: dict[str, dict[str, Any]], method: str
) -> None:
    """Images, gradients, optimiser, teacher, centre and batch norm, over two steps.

    Region ids of process 1 have no counterpart in the other view in the second step (`equal_steps.DrawnByImage`).
    """
    two, one = torch.load(launched["folder"] / f"{method}.pth"), alone[method]
    if method == "SlotCon":
        assert two["pairs"][0] == two["pairs"][1], "else the mean of two means is not the mean over all pairs"
    if method in ("DetConS", "DetConB", "CYBORGS"):
        first, second = two["pairs"]
        assert first[1] > 0 and second[0] > 0 and second[1] == 0
    trained = [name for name, g in one["gradients"][0].items() if g.abs().max() > NO_GRADIENT]
    assert len(trained) > 0.95 * len(one["gradients"][0])
    for step, tolerance in enumerate((FIRST_TOLERANCE, TOLERANCE)):
        expected = {name: one["gradients"][step][name] for name in trained}
        assert_close(two["gradients"][step], expected, tolerance, f"gradient {step}")
    # Moves of the criterion are shorter than single precision tells apart. PyTorch's running variance is the unbiased
    # one, that of naiveSyncBN the one by which it divides.
    moving = [n for n in one["end"] if n.replace("teacher.", "student.") in trained or n.endswith("running_mean")]
    moving = [n for n in moving if not n.startswith("criterion.")]
    assert_close(moves(two, moving), moves(one, moving), TOLERANCE, "move")
    if method == "SlotCon":
        torch.testing.assert_close(two["end"]["criterion.center"], one["end"]["criterion.center"])
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
