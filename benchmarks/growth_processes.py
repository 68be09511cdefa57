"""The same steps in several processes of this machine, on demand, and what travels between them."""

from __future__ import annotations

import logging
import multiprocessing
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from growth_steps import Step, step_batch
from stages.timing import use_one_thread
from torch.utils._python_dispatch import TorchDispatchMode

from d2_objssl.data import SSLBatch

_TIMEOUT = timedelta(minutes=5)
# Which argument of a collective is what this process gives to the others.
_GIVEN = {"allreduce_": 0, "broadcast_": 0, "allgather_": 1, "gather_": 1}


class Traffic(TorchDispatchMode):
    """Counts the collectives of torch.distributed within its context, DistributedDataParallel's included.

    Attributes:
        calls: how many, by collective.
        total_bytes: what this process gives to all of them, whatever gloo makes of it.
        key_bytes: the part of it that is gathered rows, (n, ...): embeddings. Statistics and counts are vectors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.total_bytes = 0
        self.key_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Count and go on."""
        space, _, name = func.name().partition("::")
        if space == "c10d" and name in _GIVEN:
            self.calls[name.rstrip("_")] += 1
            for x in args[_GIVEN[name]]:
                self.total_bytes += x.numel() * x.element_size()
                self.key_bytes += x.numel() * x.element_size() if name == "allgather_" and x.ndim > 1 else 0
        return func(*args, **(kwargs or {}))


def count_traffic(step: Step, batch: SSLBatch) -> dict[str, Any]:
    """What a step gives to the other processes: gradients, keys of the loss, and the rest, batch-norm statistics mostly."""
    with Traffic() as traffic:
        step(batch)
    gradients = sum(p.numel() * p.element_size() for p in step.model.parameters() if p.requires_grad)
    return {
        "calls": dict(traffic.calls),
        "gradient_bytes": gradients,
        "key_bytes": traffic.key_bytes,
        "other_bytes": traffic.total_bytes - gradients - traffic.key_bytes,
    }


def wall_seconds(step: Step, batch: SSLBatch) -> tuple[float, float]:
    """Wall time of a step, and the part of it in which this process did not compute.

    Then it waits for the other process or for what travels; on a busy machine also for its turn.
    """
    step.free_gradients()
    if comm.get_world_size() > 1:
        dist.barrier()
    wall, cpu = time.perf_counter(), time.thread_time()
    step(batch)
    wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
    return wall, max(wall - cpu, 0.0)


class Processes:
    """Processes of one gloo group, each with one thread, that do the same on demand."""

    def __init__(self, num_processes: int, cfgs: dict[str, CfgNode], seed: int) -> None:
        """
        Args:
            num_processes: at least 2.
            cfgs: configs by name; each process builds the steps of all of them.
            seed: of the weights; the images of each process differ.
        """
        # Forked from a clean server, which has imported the package once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["growth_processes"])
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(num_processes):
            ours, theirs = context.Pipe()
            args = (rank, num_processes, f"file://{self._folder.name}/store", theirs, cfgs, seed)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()  # so that the end of the process ends the pipe
            self._pipes.append(ours)
            self._processes.append(process)

    def call(self, function: Callable[[Step, SSLBatch], Any], name: str, batch_size: int) -> list[Any]:
        """Have all processes call `function(step, batch)`, importable by name.

        Args:
            function: takes the step of the config `name` and a batch.
            name: of a config.
            batch_size: images of each process.

        Returns:
            What it returned, in rank order.

        Raises:
            RuntimeError: if a process ended; its own traceback is printed.
        """
        try:
            for pipe in self._pipes:
                pipe.send((function, name, batch_size))
            return [pipe.recv() for pipe in self._pipes]
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(
                f'A process ended in {function.__name__} of "{name}"; see its traceback above'
            ) from error

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.terminate()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, num_processes: int, store: str, pipe: Connection, cfgs: dict[str, CfgNode], seed: int) -> None:
    """What a process does: join the group, build the steps, do what it is asked to until it is ended."""
    use_one_thread()
    logging.getLogger("d2_objssl").setLevel(logging.ERROR)
    # Of 1x1 convolutions in channels_last; the memory is the same.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=num_processes, timeout=_TIMEOUT)
    comm.create_local_process_group(num_processes)
    steps = {name: Step(cfg, seed) for name, cfg in cfgs.items()}
    while True:
        function, name, batch_size = pipe.recv()
        pipe.send(function(steps[name], step_batch(steps[name].cfg, batch_size, seed + rank)))
