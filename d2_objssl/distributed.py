"""The only calls of torch.distributed in the package. Every function is the identity at world size 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def gather_rows(xs: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """Concatenate the rows of all processes, which may differ in number, for several tensors at once. Without gradient.

    Args:
        xs: tensors (n, ...) of this process, of one data type and equal but for n, which may be 0.

    Returns:
        For each of them:
            rows: (n of process 0 + n of process 1 + ..., ...).
            offset: index of this process' first row.
    """
    xs = [x.detach() for x in xs]
    if comm.get_world_size() == 1:
        return [(x, 0) for x in xs]
    own_counts = torch.tensor([len(x) for x in xs], device=xs[0].device)
    by_process = [torch.empty_like(own_counts) for _ in range(comm.get_world_size())]
    dist.all_gather(by_process, own_counts)
    counts = torch.stack(by_process).tolist()
    padded = xs[0].new_zeros((len(xs), max(map(max, counts)), *xs[0].shape[1:]))
    for part, x in zip(padded, xs, strict=True):
        part[: len(x)] = x
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return [
        (
            torch.cat([g[i, : count[i]] for g, count in zip(gathered, counts, strict=True)]),
            sum(count[i] for count in counts[: comm.get_rank()]),
        )
        for i in range(len(xs))
    ]


def gather_keys(x: Tensor) -> tuple[Tensor, int]:
    """Concatenate equally shaped tensors of all processes in rank order. Without gradient.

    Args:
        x: (N, ...) of this process.

    Returns:
        keys: (G, ...), G = N times the number of processes.
        rank_offset: index of this process' first row.
    """
    x = x.detach().contiguous()
    if comm.get_world_size() == 1:
        return x, 0
    gathered = [torch.empty_like(x) for _ in range(comm.get_world_size())]
    dist.all_gather(gathered, x)
    return torch.cat(gathered), comm.get_rank() * x.shape[0]


def gather_with_gradient(x: Tensor) -> tuple[Tensor, int]:
    """`gather_keys` with gradient: what any process derives from the rows of `x` comes back to them, summed.

    Averaged over the processes, as DistributedDataParallel does, this is the gradient of the mean of their losses.
    """
    if comm.get_world_size() == 1:
        return x, 0
    return torch.cat(all_gather(x)), comm.get_rank() * x.shape[0]


def all_reduce_mean(x: Tensor) -> Tensor:
    """Mean of `x` over the processes. Without gradient."""
    x = x.detach().clone()
    if comm.get_world_size() == 1:
        return x
    dist.all_reduce(x)
    return x / comm.get_world_size()


class DelayedMax:
    """Maximum of a whole number over the processes, one call late, so that no process waits for another one.

    The numbers travel by gloo, from CPU to CPU, while the next step runs: GPUs are not synchronised.
    """

    def __init__(self) -> None:
        """To be called in all processes."""
        self._group = dist.new_group(backend="gloo") if comm.get_world_size() > 1 else None
        self._value = torch.zeros(1, dtype=torch.int64)
        self._pending: dist.Work | None = None

    def __call__(self, value: int) -> int:
        """Share `value`, at least 0; to be called in all processes, equally often.

        Returns:
            The maximum of what the processes gave in the call before; 0 in the first call. The same in all processes. In a
            single process: `value`.
        """
        if self._group is None:
            return value
        if self._pending is not None:
            self._pending.wait()
        latest = int(self._value)
        self._value = torch.tensor([value])
        self._pending = dist.all_reduce(self._value, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return latest
