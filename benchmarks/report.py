#!/usr/bin/env python
"""Render the tables of the papers, their numbers and ours apart, from the records of what was run.

Reads records of evaluations (d2_objssl/evaluation/results.py): the JSON files of the given folders, and those in folders
`records` anywhere below them, where tools/train_net.py writes them. A record fills a cell if it was made with the configs of
the table as they are, to the end of their schedules and on complete data; see `result_tables.fits`. Several seeds give
their mean, its standard error and their number; cells of which nothing was run stay empty.

Writes NAME.md and NAME.png for every table, small_runs.md and .png of the records of `transfer.py`, and README.md, a list.

Example:
    python benchmarks/report.py --records benchmarks/results output/tables --output benchmarks/tables
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from result_tables import PAPER_TABLES, Column, Table, load_table
from seed_statistics import format_seeds
from table_drawing import draw_table
from tabulate import tabulate

RESULTS = Path(__file__).resolve().parent / "results"


def load_records(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Records of evaluations in FOLDER/*.json and FOLDER/**/records/*.json, one for each checkpoint and data set.

    Raises:
        ValueError: if there is no such folder, or a file is no JSON.
    """
    records: dict[tuple[str, ...], dict[str, Any]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--records {folder} is no folder")
        for path in sorted({*folder.glob("*.json"), *folder.glob("**/records/*.json")}):
            try:
                record = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is no JSON: {error}") from error
            if "metrics" in record and "dataset" in record:
                evaluated = record.get("checkpoint") or record["weights"] or {"sha256": str(path)}
                records[record["task"], record["dataset"], evaluated["sha256"]] = record
    return list(records.values())


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
    """The table in Markdown, with its title and source."""
    names = [f"{name} ({kind})" if kind else name for name, kind in headers]
    text = tabulate(rows, names, tablefmt="pipe", disable_numparse=True, colalign=["left"] * len(names))
    parts = [f"# {table.title}", f"Paper: {table.source}. {filled_cells(table, headers, rows)}" if table.source else ""]
    return "\n\n".join([*filter(None, parts), text]) + "\n"


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


def main(argv: list[str] | None = None) -> int:
    """Render all tables; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--records", type=Path, nargs="+", default=[RESULTS], metavar="DIR", help="default: benchmarks/results"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/tables"), metavar="DIR")
    names = sorted(path.stem for path in PAPER_TABLES.glob("*.yaml"))
    parser.add_argument(
        "--tables", nargs="+", choices=names, default=names, metavar="NAME", help="default: all papers'"
    )
    args = parser.parse_args(argv)
    try:
        records = load_records(args.records)
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(records)} records")
    args.output.mkdir(parents=True, exist_ok=True)
    index = []
    for name in args.tables:
        table = load_table(name)
        headers, rows = table_rows(table, records)
        (args.output / f"{name}.md").write_text(markdown(table, headers, rows))
        draw_table(args.output / f"{name}.png", f"{table.title}\n{table.source}", headers, rows)
        index.append([f"[{name}]({name}.md)", table.title, table.source, filled_cells(table, headers, rows)])
    headers, rows = small_runs(args.records)
    title = "Small runs: an equal, short schedule from several initialisations (mean ± standard error of the seeds)"
    small = tabulate(rows, [name for name, _ in headers], tablefmt="pipe", disable_numparse=True)
    (args.output / "small_runs.md").write_text(f"# {title}\n\n{small}\n")
    draw_table(args.output / "small_runs.png", title, headers, rows)
    index.append(["[small_runs](small_runs.md)", title, "", ""])
    listed = tabulate(index, ["table", "title", "source", "filled"], tablefmt="pipe", disable_numparse=True)
    (args.output / "README.md").write_text(f"# Tables\n\nMade by `python benchmarks/report.py`.\n\n{listed}\n")
    print(f"Written: {args.output}/README.md and {len(index)} tables, each .md and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
