"""The figure of growth.py's record: one panel for each curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

_COLORS = {"bfloat16": "#0b5394", "float32": "#cc4125"}
_STEP, _HEADS, _GRAY = "#0b5394", "#e69138", "#777777"
_STYLES = ("--", ":")


def draw_growth(path: Path, record: dict[str, Any]) -> None:
    """Draw the parts that a record of growth.py has to a PNG."""
    panels = [(part, draw) for part, draw in _PANELS if part in record]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure((4.7 * columns, 3.9 * lines), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for i, (part, draw) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, i)
        draw(axes, record[part])
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(path)


def _batch(axes: Axes, part: dict[str, Any], key: str) -> None:
    """Four lines over the batch size."""
    for line in part["lines"]:
        precision, checkpointing = line["precision"], line["checkpointing"]
        points = [p for p in part["points"] if (p["precision"], p["checkpointing"]) == (precision, checkpointing)]
        label = f"{precision}{', checkpointed' if checkpointing else ''}"
        x, y = [p["batch_size"] for p in points], [p[key] for p in points]
        style = "--" if checkpointing else "-"
        axes.plot(x, y, "o", linestyle=style, color=_COLORS[precision], label=label)
    _size_axis(axes, "batch size N, images", x)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _batch_time(axes: Axes, part: dict[str, Any]) -> None:
    _batch(axes, part, "ms_per_image")
    axes.set_ylabel("CPU time, ms an image")
    _title(axes, "Time over the batch", part)


def _batch_memory(axes: Axes, part: dict[str, Any]) -> None:
    _batch(axes, part, "peak_mb")
    axes.set_ylabel("peak memory of a step, MB")
    _title(axes, "Memory over the batch", part)


def _time(axes: Axes, part: dict[str, Any], name: str) -> None:
    """Whole steps, and all but the backbone."""
    x = [p[name] for p in part["points"]]
    for key, color, label in (("step", _STEP, "whole step"), ("heads", _HEADS, "without the backbone")):
        axes.plot(x, [p[key]["cpu_s"] for p in part["points"]], "o-", color=color, label=label)
    _log_values(axes)
    axes.set_ylabel("CPU time, s a step")
    axes.legend(fontsize=8)


def _prototypes_time(axes: Axes, part: dict[str, Any]) -> None:
    _time(axes, part, "prototypes")
    _size_axis(axes, "prototypes K", [p["prototypes"] for p in part["points"]])
    _title(axes, "Time over the prototypes", part)


def _prototypes_memory(axes: Axes, part: dict[str, Any]) -> None:
    points = part["points"]
    x = [p["prototypes"] for p in points]
    for key, color, label in (("step", _STEP, "whole step"), ("heads", _HEADS, "without the backbone")):
        axes.plot(x, [p[key]["peak_mb"] for p in points], "o-", color=color, label=label)
    for tensor, style in zip(points[0]["tensors_mb"], _STYLES, strict=True):
        axes.plot(x, [p["tensors_mb"][tensor] for p in points], style, color=_GRAY, label=f"one tensor of {tensor}")
    _log_values(axes)
    _size_axis(axes, "prototypes K", x)
    axes.set_ylabel("peak memory of a step, MB")
    axes.legend(fontsize=8)
    _title(axes, "Memory over the prototypes", part)


def _regions(axes: Axes, part: dict[str, Any]) -> None:
    _time(axes, part, "regions")
    _size_axis(axes, "regions of a view M", [p["regions"] for p in part["points"]])
    _title(axes, "Time over the regions", part)


def _processes(axes: Axes, part: dict[str, Any]) -> None:
    """A bar for each point: computing below, waiting above."""
    for i, p in enumerate(part["points"]):
        color = _STEP if p["method"] == "SlotCon" else _HEADS
        busy = p["wall_s"] - p["waiting_s"]
        axes.bar(i, busy, color=color, label=p["method"])
        axes.bar(i, p["waiting_s"], bottom=busy, color="white", edgecolor=_GRAY, hatch="///", label="waiting")
        axes.text(i, p["wall_s"], f"{p['ms_per_image']:.0f}", ha="center", va="bottom", fontsize=7)
    labels = [f"{p['processes']} × {p['batch_size']}\n{p['norm']}" for p in part["points"]]
    axes.set_xticks(range(len(labels)), labels, fontsize=7)
    axes.set_xlabel("processes × images of each; above the bars: ms an image")
    axes.set_ylabel("wall time, s a step")
    axes.margins(y=0.12)
    handles, names = axes.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8)
    _title(axes, "One and two processes", part)


def _size_axis(axes: Axes, label: str, sizes: Sequence[int]) -> None:
    """A logarithmic axis with the sizes as its only ticks."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(label)


def _log_values(axes: Axes) -> None:
    """A logarithmic axis of values with ticks at 1, 2, 5, 10, ..."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _title(axes: Axes, what: str, part: dict[str, Any]) -> None:
    axes.set_title(f"{what}\n{part['setting']}", fontsize=9)


# Times above memories.
_PANELS: list[tuple[str, Callable[[Axes, dict[str, Any]], None]]] = [
    ("batch", _batch_time),
    ("prototypes", _prototypes_time),
    ("regions", _regions),
    ("batch", _batch_memory),
    ("prototypes", _prototypes_memory),
    ("processes", _processes),
]
