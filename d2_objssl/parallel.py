"""One function on many images, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import cv2
import torch

T = TypeVar("T")


def map_in_processes(
    function: Callable[[Any], T], items: Sequence[Any], num_workers: int, *, chunk_size: int
) -> Iterator[T]:
    """Apply a function to every item, in order.

    Args:
        function: can be pickled, and so can its results.
        items: its arguments.
        num_workers: processes; 0 and 1: this one. More need the caller's `__main__` guard.
        chunk_size: items that a process gets at a time.
    """
    if num_workers <= 1:
        yield from map(function, items)
        return
    # Not "fork", which copies the locks of OpenCV's threads but not the threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker) as pool:
        yield from pool.map(function, items, chunksize=chunk_size)


def use_one_thread() -> None:
    """Let OpenCV and PyTorch use one thread in this process: it is one of several."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def _start_worker() -> None:
    use_one_thread()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's process waits for work for ever, also when SIGKILL ended the process that would give it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
