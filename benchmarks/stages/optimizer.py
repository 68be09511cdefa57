"""One step of LARS, and one move of the teacher, of SlotCon's ResNet-50, against loops over the parameters."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from d2_objssl.engine import LARS

from .models import build_slotcon
from .plain_updates import PlainLARS, move_plainly, teacher_hook
from .timing import Measurement, Row, repeat_in_turns

SUMMARY = "one step of LARS, and one of the teacher's moving average"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this stage."""
    parser.add_argument("--steps", type=int, default=5, help="steps in a row (default: %(default)s)")


def run(args: argparse.Namespace) -> Measurement:
    """Time both on the student's parameters, with random gradients."""
    steps = 2 if args.quick else args.steps
    model = build_slotcon()
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        p.grad = torch.randn_like(p)
    assert model.teacher is not None
    ours, plain = LARS(params, lr=0.1, weight_decay=1e-5), PlainLARS(params)
    contestants = {
        "LARS": {"plain": plain.step, "ours": ours.step},
        "moving average": {
            "plain": partial(move_plainly, model.teacher, model.student),
            "ours": teacher_hook(model.teacher, model.student),
        },
    }
    rows, details = [], {}
    for (name, pair), goal in zip(contestants.items(), (4.0, 10.0), strict=True):
        for step in pair.values():
            step()  # buffers are made in the first one
        runs = repeat_in_turns({k: partial(_time, f, steps) for k, f in pair.items()}, args.repeats, args.seed)
        medians = {k: statistics.median(values) for k, values in runs.items()}
        rows.append(Row(f"{name}, one step", medians["plain"], medians["ours"], unit="ms CPU", goal=goal))
        details[name] = runs
    return Measurement(rows, {"num_parameters": sum(p.numel() for p in params), "ms_per_step": details})


def _time(step: Callable[[], object], steps: int) -> float:
    """CPU time, ms per step."""
    start = time.process_time()
    for _ in range(steps):
        step()
    return 1e3 * (time.process_time() - start) / steps
