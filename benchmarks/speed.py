#!/usr/bin/env python
"""Speed of d2_objssl against the plain way of doing the same with public libraries, both in one run.

    python benchmarks/speed.py data                        # JPEGs that it generates itself
    python benchmarks/speed.py data --images DIR --repeats 9 --workers 1 2 --output benchmarks/results/speed_data.json
    python benchmarks/speed.py all --quick                 # every stage in short, one table; `make bench`

Times are CPU time of one thread unless a stage says otherwise; the contestants take turns, and each figure is the median
over the repeats. Ratios carry over to other machines, milliseconds do not. `--output` writes the figures with the command,
the seed, the versions and the hardware.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from stages import STAGES
from stages.timing import Row, format_rows, use_one_thread

from d2_objssl.evaluation.results import write_record


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    subparsers = parser.add_subparsers(dest="stage", required=True)
    for name in [*STAGES, "all"]:
        summary = STAGES[name].SUMMARY if name in STAGES else "every stage, one table"
        subparser = subparsers.add_parser(name, help=summary, description=f"Measure: {summary}.", formatter_class=raw)
        subparser.add_argument("--repeats", type=int, default=5, help="runs of each contestant (default: %(default)s)")
        subparser.add_argument("--seed", type=int, default=0)
        subparser.add_argument("--quick", action="store_true", help="smaller sizes, a minute at most for each stage")
        subparser.add_argument("--output", type=Path, help="JSON file for the figures")
        if name in STAGES:
            STAGES[name].add_arguments(subparser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print, write."""
    parser = build_parser()
    args = parser.parse_args(argv)
    names = list(STAGES) if args.stage == "all" else [args.stage]
    rows: list[Row] = []
    details = {}
    for name in names:
        stage_args = args
        if args.stage == "all":
            common = ["--repeats", str(args.repeats), "--seed", str(args.seed), *(["--quick"] if args.quick else [])]
            stage_args = parser.parse_args([name, *common])
            print(f"== {name}: {STAGES[name].SUMMARY}", flush=True)
        use_one_thread()
        try:
            measurement = STAGES[name].run(stage_args)
        except (ValueError, ImportError) as error:
            if args.stage != "all":
                sys.exit(f"error: {error}")
            print(f"{name} is left out: {error}", flush=True)
            continue
        rows += measurement.rows
        details[name] = measurement.details
    print(f"\n{format_rows(rows)}")
    if args.output:
        table = [{**asdict(row), "ratio": row.ratio} for row in rows]
        write_record(args.output, {"task": "speed", "seed": args.seed, "table": table, "details": details})
        print(f"Written: {args.output}")


if __name__ == "__main__":
    main()
