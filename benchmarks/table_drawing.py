"""A table as a picture."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_CHARACTER = 0.078  # width, inches, at 9 points
_LINE = 0.24  # height of a row, inches
_MARGIN = 0.2
_COLORS = {"paper": "#555555", "ours": "#0b5394", "": "black"}


def draw_table(
    path: Path,
    title: str,
    headers: Sequence[tuple[str, str]],
    rows: Sequence[Sequence[str]],
    *,
    note: str = "",
    dpi: int = 130,
) -> None:
    """Draw a table to a PNG.

    Args:
        path: of the file.
        title: text above.
        headers: (name, "paper", "ours" or "") of every column; neighbours of one name share it.
        rows: the cells.
        note: text below, which is broken into lines.
        dpi: dots per inch.
    """
    groups = [(name, len(list(group))) for name, group in itertools.groupby(headers, key=lambda h: h[0])]
    widths = _column_widths(headers, groups, rows)
    left = [_MARGIN + sum(widths[:i]) for i in range(len(widths) + 1)]
    title_lines = title.count("\n") + 1
    width = max(left[-1], _MARGIN + max(map(len, title.split("\n"))) * _CHARACTER * 1.1) + _MARGIN
    note_lines = textwrap.wrap(note, int((width - 2 * _MARGIN) / (0.85 * _CHARACTER)))
    height = 2 * _MARGIN + _LINE * (len(rows) + 2.6 + title_lines + len(note_lines))
    figure = Figure((width, height), dpi=dpi)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for i, line in enumerate(title.split("\n")):
        y = _MARGIN + (i + 0.5) * _LINE
        axes.text(_MARGIN, y, line, fontsize=10 if i == 0 else 8, weight="bold" if i == 0 else "normal", va="center")
    top = _MARGIN + (title_lines + 0.4) * _LINE

    def rule(y: float, line_width: float) -> None:
        axes.plot([_MARGIN, left[-1]], [y, y], color="black", linewidth=line_width)

    rule(top, 1.2)
    first = 0
    for name, count in groups:
        is_label = headers[first][1] == ""
        x = left[first] if is_label else (left[first] + left[first + count]) / 2
        axes.text(x, top + 0.55 * _LINE, name, fontsize=9, va="center", ha="left" if is_label else "center")
        first += count
    for row, y in zip([[kind for _, kind in headers], *rows], itertools.count(1.5), strict=False):
        for i, cell in enumerate(row):
            kind = headers[i][1]
            x = (left[i] + left[i + 1]) / 2 if kind else left[i]
            axes.text(
                x, top + y * _LINE, cell, fontsize=9, va="center", ha="center" if kind else "left", color=_COLORS[kind]
            )
    rule(top + 2 * _LINE, 0.7)
    rule(top + (len(rows) + 2.1) * _LINE, 1.2)
    for y, line in enumerate(note_lines, start=len(rows) + 3):
        axes.text(_MARGIN, top + y * _LINE, line, fontsize=8, va="center")
    canvas.print_png(path)


def _column_widths(
    headers: Sequence[tuple[str, str]], groups: Sequence[tuple[str, int]], rows: Sequence[Sequence[str]]
) -> list[float]:
    """Widths, inches: for the widest cell, and for a name that several columns share."""
    characters = [max([len(kind), *(len(row[i]) for row in rows)]) + 2 for i, (_, kind) in enumerate(headers)]
    first = 0
    for name, count in groups:
        missing = len(name) + 2 - sum(characters[first : first + count])
        for i in range(first, first + count):
            characters[i] += max(missing, 0) / count
        first += count
    return [c * _CHARACTER for c in characters]
