#!/usr/bin/env python
"""Render the tables of the papers, their numbers and ours apart, from the records of what was run.

Reads records of evaluations (d2_objssl/evaluation/results.py): the JSON files of the given folders, and those in folders
`records` anywhere below them, where tools/train_net.py writes them. A record fills a cell if it was made with the configs of
the table as they are, to the end of their schedules and on complete data; see `result_tables.fits`. Several seeds give
their mean, its standard error and their number; cells of which nothing was run stay empty.

Writes NAME.md and NAME.png for every table, small_runs.md and .png of the records of `transfer.py` if there are any, and
README.md, a list of all tables in the folder, also of those that an earlier call has made.

Example:
    python benchmarks/report.py --records benchmarks/results output/tables --output benchmarks/tables
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from result_tables import PAPER_TABLES, Column, Table, load_table
from seed_statistics import format_seeds
from table_drawing import draw_table
from tabulate import tabulate

RESULTS = Path(__file__).resolve().parent / "results"
SMALL_RUNS = "Small runs: an equal, short schedule from several initialisations (mean ± standard error of the seeds)"
_PAPERS = sorted(path.stem for path in PAPER_TABLES.glob("*.yaml"))

logger = logging.getLogger(__name__)


def load_records(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Records of evaluations in FOLDER/*.json and FOLDER/**/records/*.json.

    What only looks like one, without all fields, is left out, with a warning.

    Raises:
        ValueError: if there is no such folder, or a file is no JSON.
    """
    records = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--records {folder} is no folder")
        for path in sorted({*folder.glob("*.json"), *folder.glob("**/records/*.json")}):
            try:
                record = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is no JSON: {error}") from error
            if not isinstance(record, dict) or not {"metrics", "dataset"} <= record.keys():
                continue  # of something else than an evaluation
            if missing := [field for field in ("task", "weights", "config") if field not in record]:
                logger.warning("%s fills no cell: the record has no %s", path, ", ".join(missing))
                continue
            records.append(record)
    return records


def table_rows(table: Table, records: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[str, str]], list[list[str]]]:
    """A table as text.

    Returns:
        headers: (name, "paper" or "ours"; "" for labels) of every column. A table without numbers of a paper has only ours.
        rows: the cells.
    """
    has_paper = any(number is not None for row in table.rows.values() for number in row.paper)
    headers = [(label, "") for label in table.labels]
    for column in table.columns:
        headers += [(column.name, "paper"), (column.name, "ours")] if has_paper else [(column.name, "ours")]
    rows = []
    for key, row in table.rows.items():
        cells = list(row.labels)
        for column, number in zip(table.columns, row.paper, strict=True):
            ours = _our_cell(table, key, column, number, records)
            cells += [number or "", ours] if has_paper else [ours]
        rows.append(cells)
    return headers, rows


def _our_cell(table: Table, row: str, column: Column, paper: str | None, records: Sequence[Mapping[str, Any]]) -> str:
    """What was measured, with as many decimals as the paper has; "" for nothing."""
    values = table.values(row, column, records)
    if not values:
        return ""
    decimals = len(paper.partition(".")[2]) if paper else 1
    return format_seeds(values, decimals) + (f" (n={len(values)})" if len(values) > 1 else "")


def markdown(table: Table, headers: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    """The table in Markdown, with its title, source and note."""
    names = [f"{name} ({kind})" if kind else name for name, kind in headers]
    text = tabulate(rows, names, tablefmt="pipe", disable_numparse=True, colalign=["left"] * len(names))
    parts = [f"# {table.title}", f"Paper: {table.source}. {filled_cells(table, headers, rows)}" if table.source else ""]
    return "\n\n".join(filter(None, [*parts, text, table.note])) + "\n"


def filled_cells(table: Table, headers: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    """How many cells of "ours" are filled, of those that can be run."""
    ours = [i for i, (_, kind) in enumerate(headers) if kind == "ours"]
    filled = sum(bool(row[i]) for row in rows for i in ours)
    possible = sum(column.evaluation in row.jobs for row in table.rows.values() for column in table.columns)
    return f"Ours: {filled} of {possible} cells that can be run here are filled."


def small_runs(folders: Sequence[Path]) -> tuple[list[tuple[str, str]], list[list[str]]]:
    """Headers and rows, as of `table_rows`, of the final results in the records transfer_*.json of `transfer.py`."""
    rows = []
    for path in (p for folder in folders for p in sorted(folder.glob("transfer_*.json"))):
        record = json.loads(path.read_text())
        changed = " ".join(record["finetune_opts"])
        task = f"{record['task']}{', ' if changed else ''}{changed} ({path.name})"
        for method, curves in record["results"].items():
            final = {metric: values[max(values, key=int)] for metric, values in curves.items()}
            seeds = max(len(values) for values in final.values())
            numbers = ", ".join(f"{name} {format_seeds(values)}" for name, values in final.items())
            rows.append([task, method, str(seeds), numbers])
            task = ""  # once
    return [("task", ""), ("initialisation", ""), ("seeds", ""), ("result", "ours")], rows


def index(folder: Path) -> tuple[str, int]:
    """The list, in Markdown, of all tables in a folder, whichever call has rendered them; and their number."""
    listed = []
    for name in _PAPERS:
        if (path := folder / f"{name}.md").exists():
            table = load_table(name)
            filled = re.search(r"Ours: .* are filled\.", path.read_text())
            listed.append([f"[{name}]({name}.md)", table.title, table.source, filled[0] if filled else ""])
    if (folder / "small_runs.md").exists():
        listed.append(["[small_runs](small_runs.md)", SMALL_RUNS, "", ""])
    text = tabulate(listed, ["table", "title", "source", "filled"], tablefmt="pipe", disable_numparse=True)
    return f"# Tables\n\nMade by `python benchmarks/report.py`.\n\n{text}\n", len(listed)


def main(argv: list[str] | None = None) -> int:
    """Render all tables; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--records", type=Path, nargs="+", default=[RESULTS], metavar="DIR", help="default: benchmarks/results"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/tables"), metavar="DIR")
    parser.add_argument(
        "--tables", nargs="+", choices=_PAPERS, default=_PAPERS, metavar="NAME", help="default: all papers'"
    )
    args = parser.parse_args(argv)
    try:
        records = load_records(args.records)
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(records)} records")
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.tables:
        table = load_table(name)
        headers, rows = table_rows(table, records)
        (args.output / f"{name}.md").write_text(markdown(table, headers, rows))
        draw_table(args.output / f"{name}.png", f"{table.title}\n{table.source}", headers, rows, note=table.note)
    headers, rows = small_runs(args.records)
    if rows:  # else what an earlier call has made of other records stays
        small = tabulate(rows, [name for name, _ in headers], tablefmt="pipe", disable_numparse=True)
        (args.output / "small_runs.md").write_text(f"# {SMALL_RUNS}\n\n{small}\n")
        draw_table(args.output / "small_runs.png", SMALL_RUNS, headers, rows)
    text, num_tables = index(args.output)
    (args.output / "README.md").write_text(text)
    num_written = len(args.tables) + bool(rows)
    print(f"Written: {num_written} tables, each .md and .png, and {args.output}/README.md, which lists {num_tables}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
