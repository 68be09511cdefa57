"""Errors in one of several processes that work together: all of them end, instead of waiting for each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from detectron2.utils import comm

T = TypeVar("T")


@contextmanager
def fail_together() -> Iterator[None]:
    """Wait, at the end of the `with` block, for all processes; if the block failed in any of them, raise in all.

    Raises:
        RuntimeError: naming the process that failed. In that process: its own error.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    messages = comm.all_gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"Process {rank} of {len(messages)} failed: {message}")


def on_main_process(function: Callable[[], T]) -> T:
    """Call `function` in the main process only; all processes get its result, or its error as `fail_together` does."""
    result: Any = None
    with fail_together():
        if comm.is_main_process():
            result = function()
    return comm.all_gather(result)[0]
