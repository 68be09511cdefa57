"""benchmarks/gpu.py: its measurements run on a CPU at tiny sizes, and the record has what was measured and what failed."""

import json
import warnings
from collections.abc import Callable

import gpu
import pytest
import torch
from gpu_profile import busy_time, count_waits
from gpu_settings import Task

from d2_objssl.engine.config_checks import run_checks

pytestmark = pytest.mark.usefixtures("keep_threads")


@pytest.fixture
def run_first_tasks(monkeypatch, tmp_path) -> Callable[..., dict[str, dict]]:
    """Runs gpu.py with the first task of the chosen measurements alone; the rows of its record by measurement."""
    shortened = {name: lambda *args, make=make: make(*args)[:1] for name, make in gpu.MEASUREMENTS.items()}
    monkeypatch.setattr(gpu, "MEASUREMENTS", shortened)

    def run(*arguments: str) -> dict[str, dict]:
        record = tmp_path / "gpu.json"
        gpu.main(["--tiny", "--output", str(record), *arguments])
        written = json.loads(record.read_text())
        assert {"command", "versions", "hardware", "device", "goal", "paper"} <= written.keys()
        return {row["measurement"]: row for row in written["measurements"]}

    return run


def _check(rows: dict[str, dict]) -> None:
    assert all("error" not in row and "skipped" not in row for row in rows.values()), rows
    for name in rows.keys() - {"profile"}:
        epoch_seconds = 118_287 / rows[name]["images_per_second"]
        assert rows[name]["epoch_seconds"] == pytest.approx(epoch_seconds) and epoch_seconds > 0
    if "profile" in rows:
        assert sum(operator["share"] for operator in rows["profile"]["operators"]) > 0.5
        assert rows["profile"]["calls_per_step"]["aten::_local_scalar_dense"] >= 1  # the guard reads losses


def test_steps_on_a_cpu(run_first_tasks):
    rows = run_first_tasks("--device", "cpu", "--only", "step")
    _check(rows)
    assert rows["step"]["dtype"] == "bfloat16" and rows["step"]["memory_gib"] is None
    assert len(rows["step"]["step_seconds"]) == 2


@pytest.mark.slow
def test_every_measurement_on_a_cpu(run_first_tasks):
    rows = run_first_tasks("--device", "cpu")
    assert rows.keys() == {"step", "compile", "profile", "loader", "end_to_end"}
    _check(rows)
    assert 0 <= rows["end_to_end"]["waiting_share"] <= 1


@pytest.mark.gpu
def test_every_measurement_on_a_gpu(run_first_tasks):
    rows = run_first_tasks()
    _check(rows)
    assert rows["step"]["memory_gib"] > 0
    assert 0 <= rows["profile"]["idle_share"] <= 1 and rows["profile"]["kernels"]
    assert any(place.startswith("d2_objssl/engine/") for place in rows["profile"]["waits_per_step"])


def test_what_fails_is_recorded_and_the_rest_runs(monkeypatch, tmp_path, capsys):
    record = tmp_path / "gpu.json"
    seen_before_end = []

    def fail():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    def read_record():
        seen_before_end.extend(json.loads(record.read_text())["measurements"])
        return {"images_per_second": 10.0}

    tasks = [Task("step", "later", read_record), Task("step", "first", fail, essential=True)]
    monkeypatch.setattr(gpu, "MEASUREMENTS", {"step": lambda settings, workspace: tasks})
    gpu.main(["--device", "cpu", "--tiny", "--only", "step", "--output", str(record)])
    assert [row["name"] for row in seen_before_end] == ["first"]  # written when the next one begins
    first, later = json.loads(record.read_text())["measurements"]
    assert first["error"].startswith("OutOfMemoryError: CUDA out of memory") and "in fail" in first["traceback"]
    assert later["images_per_second"] == 10.0
    assert "OutOfMemoryError" in capsys.readouterr().out
    assert [row["skipped"] for row in gpu.run_tasks(tasks, seconds=0)] == ["time limit"] * 2


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu --tiny"):
        gpu.main([])


def test_kernels_that_overlap_count_once():
    assert busy_time([(5, 7), (0, 2), (1, 3), (1, 2)]) == 5


def test_waits_are_counted_by_the_line_of_the_package(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    def run():
        wait()
        run_checks(wait, wait)  # of d2_objssl, calls its arguments

    (inside, twice), (outside, once) = count_waits(run).most_common()
    assert inside.startswith("d2_objssl/engine/config_checks.py:") and twice == 2
    assert outside == "elsewhere" and once == 1
    assert modes == ["warn", 0]
