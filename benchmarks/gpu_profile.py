"""Where the time of a training step goes: operators and kernels, time in which the device idles, what waits for it."""

from __future__ import annotations

import statistics
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from gpu_settings import METHODS, REPO_ROOT, Settings, Task
from gpu_steps import Variant, build_step
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_NUM_LISTED = 15  # operators, kernels, places
# Calls that wait for the device, or stand for something that does.
_SYNCHRONISING = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "aten::_local_scalar_dense",
    "aten::nonzero",
)


def measure_profile(variant: Variant, settings: Settings) -> dict[str, Any]:
    """Profile a few steps; the idle share compares the device's work with steps that are not profiled.

    Returns:
        step_ms: median step without the profiler. operators, kernels: those with the most time of their own, on the device
        where it is a GPU. calls_per_step: of what waits for the device. On a GPU also device_ms, in which at least one
        kernel or copy runs in a step, idle_share, and waits_per_step: by the innermost line of this project.
    """
    on_gpu = settings.device == "cuda"
    step, stopwatch = build_step(variant, settings)
    end = settings.warmup_steps + settings.steps
    step.train(0, end)
    step_ms = 1e3 * statistics.median(stopwatch.seconds(skip=settings.warmup_steps))
    num_profiled = min(settings.steps, 5)
    # Not an iteration in which metrics are logged, one of 20.
    start = -(-end // 20) * 20
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities, acc_events=True) as profiled:
        step.train(start, start + num_profiled)
        if on_gpu:
            torch.cuda.synchronize()
    averages = [row for row in profiled.key_averages() if not getattr(row, "is_user_annotation", False)]
    operators = [row for row in averages if row.device_type == DeviceType.CPU and row.key.startswith("aten::")]
    kernels = [row for row in averages if row.device_type != DeviceType.CPU]
    own_time = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    counts = {row.key: row.count / num_profiled for row in averages if row.key in _SYNCHRONISING}
    result = {
        "step_ms": step_ms,
        "operators": _rank(operators, own_time, num_profiled),
        "kernels": _rank(kernels, own_time, num_profiled),
        "calls_per_step": {name: counts.get(name, 0.0) for name in _SYNCHRONISING},
    }
    if on_gpu:
        device_ms = busy_time(_device_intervals(profiled)) / 1e3 / num_profiled
        waits = count_waits(lambda: step.train(start, start + num_profiled))
        result |= {"device_ms": device_ms, "idle_share": max(1 - device_ms / step_ms, 0.0)}
        result["waits_per_step"] = {p: n / num_profiled for p, n in waits.most_common(_NUM_LISTED)}
    return result


def _rank(rows: list[Any], own_time: str, num_steps: int) -> list[dict[str, Any]]:
    """The rows with the most time of their own, as figures of one of the steps."""
    total = sum(getattr(row, own_time) for row in rows) or 1.0
    rows = sorted(rows, key=lambda row: getattr(row, own_time), reverse=True)[:_NUM_LISTED]
    return [
        {
            "name": row.key[:120],  # kernels are templates with long names
            "ms_per_step": getattr(row, own_time) / 1e3 / num_steps,
            "share": getattr(row, own_time) / total,
            "calls_per_step": row.count / num_steps,
        }
        for row in rows
    ]


def _device_intervals(profiled: profile) -> list[tuple[float, float]]:
    """(start, end) of kernels and copies, microseconds."""
    events = [e for e in profiled.events() or () if e.device_type != DeviceType.CPU and not e.is_user_annotation]
    return [(event.time_range.start, event.time_range.end) for event in events]


def busy_time(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end): kernels of several streams may overlap."""
    busy, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        busy += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return busy


def count_waits(run: Callable[[], Any]) -> Counter[str]:
    """How often PyTorch warns of an operation that waits for the device, by the innermost line of d2_objssl."""
    found: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            found[_place()] += 1

    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return found


def _place() -> str:
    """FILE:LINE (function) of the innermost caller in d2_objssl; "elsewhere" where there is none."""
    package = str(REPO_ROOT / "d2_objssl")
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(package):
            return f"{frame.filename.removeprefix(f'{REPO_ROOT}/')}:{frame.lineno} ({frame.name})"
    return "elsewhere"


def profile_tasks(settings: Settings) -> list[Task]:
    """Every method at its largest batch, in bfloat16."""
    tasks = []
    for method in METHODS:
        variant = Variant(method, settings.batch_sizes[-1])
        run = partial(measure_profile, variant, settings)
        tasks.append(Task("profile", variant.name, run, method=method, essential=method == "SlotCon"))
    return tasks
