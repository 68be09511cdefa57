#!/usr/bin/env python
"""Endurance of runs: killed at random moments again and again, and memory over many iterations. No part of the tests.

Kills: small runs of the five methods in turn, in processes that get SIGKILL at random moments, with and without workers,
and are resumed, until each is finished. Its last checkpoint (weights, optimiser, generators, place in the data) and all
losses must equal, bit by bit, those of a run that nothing stopped. Half of the moments are within the first second behind
a step, a quarter in the start of a process, a quarter in the time that a third of a run takes.

Memory: one pretraining run with stored region maps and two workers. The main process and the workers must not grow: the
slope of a line through their memory in the second half of the run stays below MAX_GROWTH. Memory is what they hold beside
files, pages that they share counted in part (Pss_Anon and Pss_Shmem of /proc/PID/smaps_rollup). Detectron2's event storage
keeps every number that is logged: that of the main process grows by about 1 KB an iteration. Beside it, the peak of the
resident memory (VmHWM), libraries included, early and late in the run.

Examples:
    python tests/soak.py --output benchmarks/results/soak.json
    python tests/soak.py --kills 20 --methods SlotCon CYBORGS --iterations 0
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from killed_runs import METHODS, losses_of, method_cfg, start_child
from PIL import Image
from stored_maps import store_maps
from tiny_runs import assert_identical, final_checkpoint, write_photos

from d2_objssl.data.datasets import list_images
from d2_objssl.data.region_keys import assign_region_keys
from d2_objssl.engine import Trainer
from d2_objssl.evaluation.results import write_record

_RUN: list[Any] = ["SOLVER.MAX_ITER", 24, "SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.MAX_TO_KEEP", 2]
_KILLS_OF_A_RUN = 20  # at most; then it may end
_CHILD_SECONDS = 600.0  # that a process gets for a whole run
_SAMPLES = 40  # of the memory in a run
_SIZE, _PEAK = ("Pss_Anon:", "Pss_Shmem:"), ("VmHWM:",)
MAX_GROWTH = 4096.0  # bytes an iteration, of a process

# ------------------------------------------------------------------------------------------------ kills


def soak_kills(num_kills: int, methods: list[str], folder: Path, rng: random.Random) -> dict[str, Any]:
    """Kill runs until there were `num_kills`, finish the last one, and compare each with the run that nothing stopped.

    Returns:
        For each method: kills, finished (runs), and of the kills those "before_a_step" of their process and those after
        which there was half a file ("left_half_a_file"), perhaps from the kill before.

    Raises:
        AssertionError: if a run differs, or a process ends by itself with an error.
    """
    photos = write_photos(folder / "photos")
    seconds: dict[str, float] = {}
    counts: dict[str, Counter[str]] = {method: Counter() for method in methods}
    for number, method in enumerate(itertools.cycle(methods)):
        if sum(c["kills"] for c in counts.values()) >= num_kills:
            break
        whole, killed = folder / method, folder / f"{method}-{number}"
        if method not in seconds:
            started = time.monotonic()
            assert not _run(method_cfg(method, photos, whole, *_RUN), photos, kill_after=None)
            seconds[method] = time.monotonic() - started
        left = min(num_kills - sum(c["kills"] for c in counts.values()), _KILLS_OF_A_RUN)
        counts[method] += _run_with_kills(method, photos, killed, rng, left, seconds[method])
        _compare(killed, whole)
        shutil.rmtree(killed)
        print(f"{method}: {dict(counts[method])}; the same as without an interruption", flush=True)
    names = ("kills", "finished", "before_a_step", "left_half_a_file")
    return {method: {name: c[name] for name in names} for method, c in counts.items()}


def _run_with_kills(
    method: str, photos: Path, output_dir: Path, rng: random.Random, max_kills: int, seconds: float
) -> Counter[str]:
    """Run to the end, with up to `max_kills` kills on the way; `seconds`: of a whole run."""
    count: Counter[str] = Counter(finished=1)
    while True:
        cfg = method_cfg(method, photos, output_dir, *_RUN, "DATALOADER.NUM_WORKERS", rng.choice((0, 0, 2)))
        place = rng.choice(("start", "step", "step", "run"))
        delay = rng.uniform(0, {"start": seconds / 4, "step": 1.0, "run": seconds / 3}[place])
        steps = len(_losses(output_dir))
        kill_after = None if count["kills"] == max_kills else (steps + (place != "start"), delay)
        if not _run(cfg, photos, kill_after=kill_after):
            return count
        count["kills"] += 1
        count["before_a_step"] += len(_losses(output_dir)) == steps
        count["left_half_a_file"] += any(output_dir.glob(".*.tmp"))


def _run(cfg: CfgNode, photos: Path, *, kill_after: tuple[int, float] | None) -> bool:
    """Run in a process; tell whether it was killed: so many seconds after there are so many losses in its folder."""
    output_dir = Path(cfg.OUTPUT_DIR)
    process = start_child(cfg, photos, resume=(output_dir / "last_checkpoint").exists())
    if kill_after is not None:
        num_losses, delay = kill_after
        while process.is_alive() and len(_losses(output_dir)) < num_losses:
            time.sleep(0.01)
        process.join(timeout=delay)
        process.kill()
        process.join()
    process.join(timeout=_CHILD_SECONDS)
    if process.exitcode == 0 or (kill_after is not None and process.exitcode == -9):
        return process.exitcode != 0
    process.kill()
    log = (output_dir / "log.txt").read_text(errors="replace")
    raise AssertionError(f"{output_dir.name}: exit code {process.exitcode}\n{log[-5000:]}")


def _losses(output_dir: Path) -> list[str]:
    """The lines of losses so far, of which the last may be cut: the process is alive, or was killed."""
    file = output_dir / "losses.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def _compare(killed: Path, whole: Path) -> None:
    expected = dict(losses_of(whole))
    assert all(expected[i] == loss for i, loss in losses_of(killed)), f"{killed.name}: other losses"
    assert_identical(final_checkpoint(killed), final_checkpoint(whole), killed.name)


# ------------------------------------------------------------------------------------------------ memory


class MemoryLog(HookBase):
    """Notes the memory of this process and of its workers, `_SAMPLES` times in a run.

    Attributes:
        iterations: when.
        sizes, peaks: bytes, by the name of the process.
    """

    def __init__(self) -> None:
        self.iterations: list[int] = []
        self.sizes: dict[str, list[int]] = {}
        self.peaks: dict[str, list[int]] = {}

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % max(self.trainer.max_iter // _SAMPLES, 1):
            return
        self.iterations.append(self.trainer.iter + 1)
        workers = sorted(multiprocessing.active_children(), key=lambda process: process.pid or 0)
        for name, pid in [("main", os.getpid()), *((f"worker {i}", w.pid) for i, w in enumerate(workers))]:
            self.sizes.setdefault(name, []).append(_sum_fields(Path(f"/proc/{pid}/smaps_rollup"), _SIZE))
            self.peaks.setdefault(name, []).append(_sum_fields(Path(f"/proc/{pid}/status"), _PEAK))


def _sum_fields(file: Path, names: tuple[str, ...]) -> int:
    """Bytes."""
    fields = (line.split() for line in file.read_text().splitlines())
    return sum(1024 * int(words[1]) for words in fields if words[0] in names)


def soak_memory(iterations: int, folder: Path) -> dict[str, dict[str, float]]:
    """Pretrain in this process and measure.

    Returns:
        For each process start_mb, end_mb (first and last sample, 1e6 bytes), bytes_per_iteration (of the second half), and
        start_peak_mb, end_peak_mb (VmHWM).
    """
    photos = write_photos(folder / "photos", count=200)
    files = list_images(str(photos))
    dicts: list[dict[str, Any]] = [{"file_name": file} for file in files]
    assign_region_keys(dicts, [str(photos)])
    cells = np.random.default_rng(0).integers(0, 9, (len(files), 5, 6), dtype=np.int16)
    sizes = [Image.open(file).size for file in files]
    maps = [cv2.resize(c, size, interpolation=cv2.INTER_NEAREST) for c, size in zip(cells, sizes, strict=True)]
    regions: list[Any] = ["INPUT.REGIONS.SOURCE", "file", "INPUT.REGIONS.ROOT"]
    regions.append(store_maps(folder / "regions", dicts, maps))
    run = ["SOLVER.MAX_ITER", iterations, "SOLVER.CHECKPOINT_PERIOD", max(iterations // 4, 1), "SOLVER.MAX_TO_KEEP", 1]
    cfg = method_cfg("DetConB", photos, folder / "run", *regions, *run, "DATALOADER.NUM_WORKERS", 2)
    Path(cfg.OUTPUT_DIR).mkdir()
    seed_all_rng(0)
    trainer, log = Trainer(cfg), MemoryLog()
    trainer.register_hooks([log])
    trainer.train()
    return {name: _growth(log.iterations, sizes, log.peaks[name]) for name, sizes in log.sizes.items()}


def _growth(iterations: list[int], sizes: list[int], peaks: list[int]) -> dict[str, float]:
    half = len(iterations) // 2
    slope = float(np.polyfit(iterations[half:], sizes[half:], 1)[0])
    figures = {"start_mb": sizes[0] / 1e6, "end_mb": sizes[-1] / 1e6, "bytes_per_iteration": slope}
    figures |= {"start_peak_mb": peaks[0] / 1e6, "end_peak_mb": peaks[-1] / 1e6}
    return {key: round(value, 1) for key, value in figures.items()}


# ------------------------------------------------------------------------------------------------ the command


@contextmanager
def _work_folder(path: Path | None) -> Iterator[Path]:
    """The folder `path`, which stays, or a temporary one."""
    if path is None:
        with tempfile.TemporaryDirectory(prefix="d2_objssl-soak-") as folder:
            yield Path(folder)
    else:
        path.mkdir(parents=True)
        yield path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=200, help="how often a process is killed (default: 200); 0: no runs"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all of them")
    parser.add_argument(
        "--iterations", type=int, default=2000, help="of the memory run (default: 2000); 0: no such run"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, help="a new folder for the runs, which stays (default: a temporary one)")
    parser.add_argument("--output", help="JSON record")
    return parser


def main(args: argparse.Namespace) -> None:
    """Run both parts and write the record; end with an error where memory grows."""
    torch.set_num_threads(1)
    record: dict[str, Any] = {"task": "soak", "seed": args.seed}
    memory: dict[str, dict[str, float]] = {}
    with _work_folder(args.folder) as folder:
        # First: what is left of killed processes shares pages with this one, and their part grows when those end.
        if args.iterations > 0:
            memory = soak_memory(args.iterations, folder / "memory")
            record["memory"] = {"iterations": args.iterations, "max_growth": MAX_GROWTH, "processes": memory}
        if args.kills > 0:
            kills = soak_kills(args.kills, args.methods, folder / "kills", random.Random(args.seed))
            record["kills"] = {"total": sum(c["kills"] for c in kills.values()), "by_method": kills}
    if args.output:
        write_record(args.output, record)
    for name, figures in memory.items():
        print(f"{name}: {figures}")
    if growing := [name for name, figures in memory.items() if figures["bytes_per_iteration"] > MAX_GROWTH]:
        raise SystemExit(f"{', '.join(growing)}: more than {MAX_GROWTH:.0f} bytes an iteration")


if __name__ == "__main__":
    main(_parser().parse_args())
