#!/usr/bin/env python
"""Where a training step of SlotCon's ResNet-50 spends its time on a CPU: operators before and after, side by side.

    python benchmarks/step_profile.py
    python benchmarks/step_profile.py --batch-size 4 --rows 20 --output benchmarks/results/step_profile.json

"plain" is the step of `stages/step.py`: this network with PyTorch's default memory layout, a projector of 1x1 convolutions, and
optimiser and teacher as loops; "float32" and "bfloat16" are the step as the trainer makes it. Times are of one thread.
For a GPU see gpu.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from stages.step import OwnStep, PlainStep, make_batch
from stages.timing import use_one_thread
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from d2_objssl.data.collation import SSLBatch
from d2_objssl.evaluation.results import write_record

Operators = dict[str, tuple[float, int]]  # name -> time in itself, ms, and calls, of a step


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8, help="images (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="that are profiled (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=12, help="operators in the table (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the figures of all operators")
    return parser


def profile_step(step: OwnStep, batch: SSLBatch, num_steps: int) -> Operators:
    """Profile some steps behind a first one, which makes buffers."""
    step(batch)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(num_steps):
            step(batch)
    return {
        event.key: (event.self_cpu_time_total / 1e3 / num_steps, round(event.count / num_steps))
        for event in profiler.key_averages()
    }


def format_profiles(profiles: dict[str, Operators], num_rows: int) -> str:
    """The operators that take longest in any of the profiles; the last lines have the rest and the sum."""
    names = sorted(set().union(*profiles.values()), key=lambda n: -max(p.get(n, (0, 0))[0] for p in profiles.values()))
    lines = []
    for name in names[:num_rows]:
        cells = [profiles[k].get(name, (0.0, 0)) for k in profiles]
        lines.append([name, *(f"{ms:.0f} ({calls})" if calls else "" for ms, calls in cells)])
    rest = [sum(ms for name, (ms, _) in p.items() if name not in names[:num_rows]) for p in profiles.values()]
    total = [sum(ms for ms, _ in p.values()) for p in profiles.values()]
    lines += [["others", *(f"{ms:.0f}" for ms in rest)], ["all", *(f"{ms:.0f}" for ms in total)]]
    headers = ["ms of a step (calls)", *profiles]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print, write."""
    args = build_parser().parse_args(argv)
    use_one_thread()
    batch = make_batch(args.batch_size, args.seed)
    profiles = {}
    for name, dtype in (("plain", None), ("float32", None), ("bfloat16", torch.bfloat16)):
        step = PlainStep(args.seed) if name == "plain" else OwnStep(args.seed, dtype=dtype)
        profiles[name] = profile_step(step, batch, args.steps)
    print(format_profiles(profiles, args.rows))
    if args.output:
        content = {"task": "profile", "seed": args.seed, "batch_size": args.batch_size, "ms_and_calls": profiles}
        write_record(args.output, content)
        print(f"Written: {args.output}")


if __name__ == "__main__":
    main()
