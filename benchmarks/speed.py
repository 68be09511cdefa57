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
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from stages import STAGES
from stages.timing import Measurement, Row, format_rows, use_one_thread

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
    args = build_parser().parse_args(argv)
    if args.stage == "all":
        measurements = measure_all(args)
    else:
        use_one_thread()
        try:
            measurements = {args.stage: STAGES[args.stage].run(args)}
        except (ValueError, ImportError) as error:
            sys.exit(f"error: {error}")
    rows = [row for measurement in measurements.values() for row in measurement.rows]
    print(f"\n{format_rows(rows)}")
    if args.output:
        table = [{**asdict(row), "ratio": row.ratio} for row in rows]
        details = {name: measurement.details for name, measurement in measurements.items()}
        write_record(args.output, {"task": "speed", "seed": args.seed, "table": table, "details": details})
        print(f"Written: {args.output}")


def measure_all(args: argparse.Namespace) -> dict[str, Measurement]:
    """Measure every stage in a process of its own: what one leaves in memory makes the next one faster or slower."""
    measurements = {}
    common = ["--repeats", str(args.repeats), "--seed", str(args.seed), *(["--quick"] if args.quick else [])]
    for name, stage in STAGES.items():
        print(f"== {name}: {stage.SUMMARY}", flush=True)
        with tempfile.TemporaryDirectory(prefix="d2_objssl-speed-") as folder:
            output = Path(folder) / "record.json"
            command = [sys.executable, __file__, name, *common, "--output", str(output)]
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            if process.returncode:
                print(f"{name} is left out: {process.stderr.strip()[-2000:]}", flush=True)
                continue
            record = json.loads(output.read_text())
            print(process.stdout.partition("Written:")[0].strip(), flush=True)
        rows = [Row(**{k: v for k, v in row.items() if k != "ratio"}) for row in record["table"]]
        measurements[name] = Measurement(rows, record["details"][name])
    return measurements


if __name__ == "__main__":
    main()
