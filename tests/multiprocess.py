"""Run a function in several processes that form a gloo process group."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

# Children are forked from a clean server that has imported the package once: as safe as "spawn", and faster.
_START_METHOD = "forkserver"


def run_in_processes(
    function: Callable[..., Any], *args: Any, world_size: int = 2, timeout: float = 120.0
) -> list[Any]:
    """Call `function(*args)` in `world_size` processes of one group.

    Args:
        function: importable by name; returns tensors and plain containers.
        args: picklable.
        timeout: seconds after which processes that have not finished are killed.

    Returns:
        What the processes returned, in rank order.

    Raises:
        TimeoutError: if a process hangs. An exception of a process is raised with its traceback.
    """
    multiprocessing.get_context(_START_METHOD).set_forkserver_preload(["d2_objssl"])
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _main, (function, args, world_size, folder, timeout), world_size, join=False, start_method=_START_METHOD
        )
        deadline = time.monotonic() + timeout
        try:
            while not context.join(timeout=max(deadline - time.monotonic(), 0.01)):
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{function.__name__} did not finish in {world_size} processes in {timeout} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(Path(folder) / f"{rank}.pth") for rank in range(world_size)]


def _main(
    rank: int, function: Callable[..., Any], args: tuple[Any, ...], world_size: int, folder: str, timeout: float
) -> None:
    torch.set_num_threads(1)
    # A file as the meeting point needs no free port.
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
    comm.create_local_process_group(world_size)
    torch.save(function(*args), Path(folder) / f"{rank}.pth")
    dist.barrier()
    dist.destroy_process_group()
