"""Mean and standard error over seeds."""

from __future__ import annotations

import math
import statistics


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; the latter is NaN for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def format_seeds(values: list[float], decimals: int = 1) -> str:
    """The mean, with its standard error where there are several values: "6.3 ± 0.8"."""
    mean, error = mean_and_error(values)
    return f"{mean:.{decimals}f}" if math.isnan(error) else f"{mean:.{decimals}f} ± {error:.{decimals}f}"
