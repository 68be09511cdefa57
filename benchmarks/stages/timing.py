"""What all stages share: contestants take turns, medians, one row of the common table for each comparison."""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tabulate import tabulate


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        stage: what is measured.
        plain, ours: medians of the plain way and of this project, in `unit`; less is better.
        unit: e.g. "ms CPU an image", "MB".
        goal: the ratio plain / ours that is aimed at; None: none is.
    """

    stage: str
    plain: float
    ours: float
    unit: str
    goal: float | None = None

    @property
    def ratio(self) -> float:
        """How many times less ours takes; infinite where it takes too little to measure."""
        return self.plain / self.ours if self.ours > 0 else math.inf


@dataclass(frozen=True)
class Measurement:
    """What a stage found.

    Attributes:
        rows: for the common table.
        details: plain types, for the record.
    """

    rows: list[Row]
    details: dict[str, Any] = field(default_factory=dict)


def format_rows(rows: Sequence[Row]) -> str:
    """The common table: stage, plain way, ours, ratio, goal."""
    lines = [
        [
            row.stage,
            f"{row.plain:.4g}",
            f"{row.ours:.4g}",
            row.unit,
            f"{row.ratio:.2f}x",
            f"{row.goal}x" if row.goal else "",
        ]
        for row in rows
    ]
    headers = ["stage", "plain", "ours", "unit", "ratio", "goal"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def repeat_in_turns(contestants: dict[str, Callable[[], Any]], repeats: int, seed: int) -> dict[str, list[Any]]:
    """Run all contestants `repeats` times, alternating, so that a busy moment of the machine hits each of them.

    The global random generators start every repeat anew, the same for all contestants.

    Returns:
        What each run returned, by contestant.
    """
    runs: dict[str, list[Any]] = {name: [] for name in contestants}
    for repeat in range(repeats):
        for name, run in contestants.items():
            np.random.seed(seed + repeat)
            torch.manual_seed(seed + repeat)
            runs[name].append(run())
    return runs


def use_one_thread(worker_id: int = 0) -> None:
    """Have this process compute with one thread; also the `worker_init_fn` of loaders."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


@contextmanager
def quiet_loggers(*names: str) -> Iterator[None]:
    """Let nothing below critical errors of these loggers through for a while: what they say is no news here."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def peak_memory(run: Callable[[], object]) -> float:
    """By how much `run` raises the resident memory of this process at its peak, MB; NaN where Linux does not say."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give freed memory back, which would be used again unnoticed
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = status_mb("VmRSS")
        run()
        return status_mb("VmHWM") - before
    except OSError:
        return float("nan")


def status_mb(key: str) -> float:
    """A size that Linux states of this process, e.g. "VmRSS" or "VmHWM", its peak, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(key)) / 1024
