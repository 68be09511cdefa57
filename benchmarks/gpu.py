#!/usr/bin/env python
"""Speed and memory of pretraining on one GPU: SlotCon, DetCon-B and CYBORGS, ResNet-50, at the papers' settings on COCO.

    python benchmarks/gpu.py --output benchmarks/results/gpu.json               # on a GPU
    python benchmarks/gpu.py --only step profile --minutes 4
    python benchmarks/gpu.py --device cpu --tiny                                # minutes on a CPU: everything runs

    step         training steps on batches that lie on the device: images/s, memory; batch sizes, precisions
    compile      the same with torch.compile, without and with CUDA graphs
    profile      operators and kernels, the share of time in which the device idles, what waits for it and where
    loader       images/s of the input pipeline alone, by workers; colours changed by them or on the device
    end_to_end   images/s of the trainer with its loader

Needs no data set: pixels are random, JPEGs are generated. What matters most comes first; when --minutes are over nothing
new is begun. The record is written after every measurement. One that fails (no memory, no compiler) is recorded as failed.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_input import loader_tasks, training_tasks
from gpu_profile import profile_tasks
from gpu_settings import Settings, Task, Workspace
from gpu_steps import compile_tasks, step_tasks
from stages.timing import quiet_loggers
from tabulate import tabulate

from d2_objssl.evaluation.results import write_record

MEASUREMENTS: dict[str, Callable[[Settings, Workspace], list[Task]]] = {
    "step": lambda settings, _: step_tasks(settings),
    "end_to_end": training_tasks,
    "profile": lambda settings, _: profile_tasks(settings),
    "compile": lambda settings, _: compile_tasks(settings),
    "loader": loader_tasks,
}

IMAGES_OF_COCO = 118_287  # train2017
# SlotCon, supplement, Table 3: COCO, 8x RTX 3090, batch 1024, AMP. The other papers state neither.
PAPER: dict[str, Any] = {
    "method": "SlotCon",
    "gpus": "8x RTX 3090",
    "batch_size": 1024,
    "epoch_seconds": 143,
    "memory_gb_per_gpu": 16.0,
}
# Of SlotCon, on an H200 with bfloat16.
GOAL = {"images_per_second": 3000, "batch_size": 512, "epoch_seconds": 40}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", nargs="+", choices=list(MEASUREMENTS), default=list(MEASUREMENTS), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing new after these (default: 8)")
    parser.add_argument("--output", type=Path, help="JSON file for the record")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="narrow networks, small batches: to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def choose_settings(device: str, *, tiny: bool, seed: int) -> Settings:
    """The sizes of a run."""
    if tiny:
        return Settings(
            device, tiny=True, batch_sizes=(2, 4), warmup_steps=1, steps=2, workers=(1,), num_photographs=4, seed=seed
        )
    cores = len(os.sched_getaffinity(0))
    return Settings(device, workers=tuple(n for n in (4, 8, 16) if n <= cores) or (cores,), seed=seed)


def describe_device(device: str) -> dict[str, Any]:
    """What the figures depend on, beside what every record has."""
    if device == "cpu":
        return {"name": "cpu"}
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader", "--id=0"]
    found = subprocess.run(query, capture_output=True, text=True, check=False) if shutil.which(query[0]) else None
    return {
        "name": properties.name,
        "memory_gib": properties.total_memory / 2**30,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver_power_clock": found.stdout.strip() if found else None,  # version, limit, largest of the SM
        "usable_cores": len(os.sched_getaffinity(0)),
        "shared_memory_gib": shutil.disk_usage("/dev/shm").total / 2**30,  # the loader's batches go through it
    }


def run_tasks(tasks: Sequence[Task], *, seconds: float) -> Iterator[dict[str, Any]]:
    """Measure one task after the other, the essential ones first; errors are results, too.

    Args:
        seconds: after these the remaining tasks are skipped.

    Yields:
        For each task measurement, name and method; and what it returned with the seconds that it took, or "error" and
        "traceback", or "skipped".
    """
    end = time.monotonic() + seconds
    for task in sorted(tasks, key=lambda task: not task.essential):
        row = {"measurement": task.measurement, "name": task.name, "method": task.method}
        start = time.monotonic()
        if start >= end:
            yield row | {"skipped": "time limit"}
            continue
        try:
            row |= task.run()
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:1000]
            row["traceback"] = traceback.format_exc()[-3000:]
        # Behind the except clause: the traceback held the model.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        yield row | {"seconds": round(time.monotonic() - start, 1)}


def format_row(row: dict[str, Any]) -> list[str]:
    """measurement, name, images/s, memory, epoch, remarks."""

    def number(key: str, digits: int, factor: float = 1.0) -> str:
        value = row.get(key)
        return "" if value is None else f"{factor * value:.{digits}f}"

    remarks = []
    if message := row.get("error") or row.get("skipped"):
        remarks.append(message.split("\n")[0][:60])
    if "idle_share" in row:
        remarks.append(f"device idle {number('idle_share', 0, 100)} %")
    if "waiting_share" in row:
        remarks.append(f"waits for the loader {number('waiting_share', 0, 100)} %")
    if "calls_per_step" in row:
        remarks.append(f"{row['step_ms']:.1f} ms a step, most: {row['operators'][0]['name']}")
    if row.get("skipped_steps"):
        remarks.append(f"{row['skipped_steps']} steps skipped")
    cells = [number("images_per_second", 0), number("memory_gib", 1), number("epoch_seconds", 1)]
    return [row["measurement"], row["name"], *cells, "; ".join(remarks)]


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows, and below them the paper's figures and the goal."""
    names = [
        f"SlotCon, batch {PAPER['batch_size']}, {PAPER['gpus']}, AMP",
        f"SlotCon, batch {GOAL['batch_size']}, bfloat16",
    ]
    cells = [
        f"{IMAGES_OF_COCO / PAPER['epoch_seconds']:.0f}",
        f"{PAPER['memory_gb_per_gpu']} GB",
        f"{PAPER['epoch_seconds']}",
    ]
    paper = ["paper", names[0], *cells, "128 images a GPU"]
    goal = ["goal", names[1], f"{GOAL['images_per_second']}", "", f"{GOAL['epoch_seconds']}", "one H200"]
    headers = ["measurement", "what", "images/s", "GiB", "epoch, s", "remarks"]
    return tabulate([*map(format_row, rows), paper, goal], headers, tablefmt="github", disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print, write after every measurement; returns the rows."""
    args = build_parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: PyTorch finds no GPU here; to see that everything runs: --device cpu --tiny")
    if args.device == "cpu" and not args.tiny:
        sys.exit("error: --device cpu needs --tiny: whole networks would take hours; benchmarks/speed.py is for CPUs")
    settings = choose_settings(args.device, tiny=args.tiny, seed=args.seed)
    record: dict[str, Any] = {"task": "gpu", "seed": args.seed, "device": describe_device(args.device)}
    record |= {"settings": asdict(settings), "goal": GOAL, "paper": PAPER}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="d2_objssl-gpu-") as folder, quiet_loggers("d2_objssl", "detectron2"):
        workspace = Workspace(Path(folder), settings)
        tasks = [task for name in args.only for task in MEASUREMENTS[name](settings, workspace)]
        for row in run_tasks(tasks, seconds=60 * args.minutes):
            rows.append(row)
            print(" | ".join(cell for cell in format_row(row) if cell), flush=True)
            if args.output:
                write_record(args.output, record | {"measurements": rows})
    print(f"\n{format_table(rows)}")
    if args.tiny:
        print("--tiny: narrow networks and small batches; these figures say nothing about the methods.")
    if args.output:
        print(f"Written: {args.output}")
    return rows


if __name__ == "__main__":
    main()
