#!/usr/bin/env python
"""How the cost of a training step grows: with the batch, the prototypes K, the regions and the processes.

    python benchmarks/growth.py --output benchmarks/results/growth.json --figure benchmarks/figures/growth.png
    python benchmarks/growth.py --quick                                  # smaller sizes, a minute or two
    python benchmarks/growth.py --draw benchmarks/results/growth.json --figure growth.png     # a record anew

Steps are those of the trainer (forward, backward, checks, LARS, the teacher's move) on random pixels. Times are CPU time of
one thread, but for processes, where they are wall time; sizes take turns, and each figure is the median over the repeats.
Memory is the peak of a step beyond what lives between two steps. Two processes share the caches and the memory of the
machine. KEY VALUE pairs at the end change the methods' configs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from growth_drawing import draw_growth
from growth_parts import Sizes, grow_batch, grow_processes, grow_prototypes, grow_regions
from stages.timing import quiet_loggers, use_one_thread
from tabulate import tabulate

from d2_objssl.evaluation.results import write_record

PARTS = {"batch": grow_batch, "prototypes": grow_prototypes, "regions": grow_regions, "processes": grow_processes}
_QUICK = Sizes(batch_sizes=(4, 8), batch_size=4, side=112, repeats=2)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="smaller batches and images, two repeats")
    parser.add_argument("--repeats", type=int, help="runs of each size (default: 3; --quick: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--figure", type=Path, help="PNG")
    parser.add_argument("--draw", type=Path, metavar="RECORD", help="measure nothing, draw this record to --figure")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs, as for tools/train_net.py")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse, measure, print, write, draw."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.repeats is not None and args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}; it must be at least 1")
    if args.draw:
        if not args.figure:
            parser.error("--draw needs --figure, the file to draw to")
        record = json.loads(args.draw.read_text())
        if record.get("task") != "growth":
            sys.exit(f'error: {args.draw} is a record of the task "{record.get("task")}", not of "growth"')
        draw_growth(args.figure, record)
        return
    sizes = replace(_QUICK if args.quick else Sizes(), seed=args.seed, opts=args.opts)
    if args.repeats is not None:
        sizes = replace(sizes, repeats=args.repeats)
    record = run(sizes, args.parts)
    if args.output:
        write_record(args.output, record)
        print(f"Written: {args.output}")
    if args.figure:
        draw_growth(args.figure, record)
        print(f"Written: {args.figure}")


def run(sizes: Sizes, parts: Sequence[str]) -> dict[str, Any]:
    """Measure and print the parts; returns the record."""
    use_one_thread()
    record: dict[str, Any] = {"task": "growth", "seed": sizes.seed, "repeats": sizes.repeats}
    for name in parts:
        start = time.perf_counter()
        with quiet_loggers("d2_objssl"):
            record[name] = PARTS[name](sizes)
        print(f"== {name}: {record[name]['setting']} ({time.perf_counter() - start:.0f} s)\n")
        print(f"{format_part(name, record[name])}\n", flush=True)
    return record


def format_part(name: str, part: dict[str, Any]) -> str:
    """The table of a part, and what explains it."""
    points = part["points"]
    if name == "batch":
        return f"{_batch_table(points)}\n\n{_batch_lines(part)}"
    if name == "processes":
        return _processes_table(points)
    tables = [_heads_table(name, points), _operators_table(name, points)]
    if name == "prototypes":
        tables.append(_pieces_table(points))
    return "\n\n".join(tables)


def _batch_table(points: Sequence[dict[str, Any]]) -> str:
    headers = ["precision", "checkpointing", "batch", "s a step", "ms an image", "peak MB"]
    rows = [
        [
            p["precision"],
            "yes" if p["checkpointing"] else "no",
            p["batch_size"],
            f"{p['cpu_s']:.2f}",
            f"{p['ms_per_image']:.0f}",
            f"{p['peak_mb']:.0f}",
        ]
        for p in points
    ]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _batch_lines(part: dict[str, Any]) -> str:
    """Constant part and slope of each line."""
    texts = [f"Weights, teacher and momentum: {part['state_mb']:.0f} MB. Over N images a step takes"]
    texts += [
        f"  {line['precision']}{', checkpointing' if line['checkpointing'] else ''}: {line['cpu_s']:.2f} s + "
        f"{1e3 * line['cpu_s_per_image']:.0f} ms N,  {line['peak_mb']:.0f} MB + {line['peak_mb_per_image']:.1f} MB N"
        for line in part["lines"]
    ]
    return "\n".join(texts)


def _heads_table(name: str, points: Sequence[dict[str, Any]]) -> str:
    tensors = list(points[0]["tensors_mb"])
    headers = [name, "s a step", "ms an image", "peak MB", "s without backbone", "peak MB without"]
    headers += [f"MB of {tensor}" for tensor in tensors]
    rows = [
        [
            p[name],
            f"{p['step']['cpu_s']:.2f}",
            f"{p['step']['ms_per_image']:.0f}",
            f"{p['step']['peak_mb']:.0f}",
            f"{p['heads']['cpu_s']:.2f}",
            f"{p['heads']['peak_mb']:.0f}",
            *(f"{p['tensors_mb'][tensor]:.1f}" for tensor in tensors),
        ]
        for p in points
    ]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _operators_table(name: str, points: Sequence[dict[str, Any]]) -> str:
    rows = [[p[name], ", ".join(f"{op} {share:.0%}" for op, share in p["operators"].items())] for p in points]
    headers = [name, "time without the backbone, by operator"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _pieces_table(points: Sequence[dict[str, Any]]) -> str:
    headers = ["prototypes", *(f"ms of {piece}" for piece in points[0]["pieces"])]
    rows = [[p["prototypes"], *(f"{1e3 * seconds:.0f}" for seconds in p["pieces"].values())] for p in points]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _processes_table(points: Sequence[dict[str, Any]]) -> str:
    headers = ["method", "processes x batch", "norm", "s a step", "of which waiting", "ms an image", "peak MB each"]
    headers += ["MB of gradients", "kB of keys", "kB of statistics", "collectives"]
    rows = []
    for p in points:
        sent = p["traffic"] or {"gradient_bytes": 0, "key_bytes": 0, "other_bytes": 0, "calls": {}}
        rows.append(
            [
                p["method"],
                f"{p['processes']} x {p['batch_size']}",
                p["norm"],
                f"{p['wall_s']:.2f}",
                f"{p['waiting_s']:.2f}",
                f"{p['ms_per_image']:.0f}",
                f"{p['peak_mb']:.0f}",
                f"{1e-6 * sent['gradient_bytes']:.0f}",
                f"{1e-3 * sent['key_bytes']:.0f}",
                f"{1e-3 * sent['other_bytes']:.0f}",
                sum(sent["calls"].values()),
            ]
        )
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
