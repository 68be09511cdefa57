"""The order of the training data: a function of (seed, position) alone.

Every sample of the endless stream has a position. Its index follows from a permutation seeded by (seed, epoch), its
augmentation from (seed, position). So a run that resumes at iteration i seeks to batch i and goes on exactly as the
uninterrupted run, whatever the number of workers, and W processes with batch B see what one process with W B sees
(with aspect-ratio grouping every process fills batches of its own, as in Detectron2).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from detectron2.utils import comm
from torch.utils.data import Sampler

SampleKey = tuple[int, int, int]  # (index in the data set, position in the stream, seed)


class ResumableBatchSampler(Sampler[list[SampleKey]]):
    """Endless batches of `SampleKey` for this process; starts at any batch."""

    def __init__(
        self,
        dataset_size: int,
        total_batch_size: int,
        *,
        seed: int,
        groups: np.ndarray | None = None,
        repeat_factors: np.ndarray | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """
        Args:
            dataset_size: number of images.
            total_batch_size: images of all processes per batch.
            seed: of the order and of the augmentations.
            groups: (dataset_size,) integers; a batch holds images of one group (aspect-ratio grouping). None: one.
            repeat_factors: (dataset_size,) floats, how often an image appears per epoch on average. None: once.
            rank, world_size: of the processes; default: the current ones.

        Raises:
            ValueError: if there is no image, or the batch cannot be shared out evenly.
        """
        self.rank = comm.get_rank() if rank is None else rank
        self.world_size = comm.get_world_size() if world_size is None else world_size
        if dataset_size < 1:
            raise ValueError("The training set is empty")
        if total_batch_size < 1 or total_batch_size % self.world_size:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH is {total_batch_size}; it must be a positive multiple of the number of "
                f"processes, {self.world_size}"
            )
        self.dataset_size = dataset_size
        self.batch_size = total_batch_size // self.world_size
        self.seed = seed
        self.groups = groups
        self.repeat_factors = repeat_factors
        self.start_batch = 0

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Indices of one epoch, a function of (seed, epoch); images with a fractional factor appear floor or ceil times."""
        rng = np.random.default_rng((self.seed, epoch))
        if self.repeat_factors is None:
            return rng.permutation(self.dataset_size)
        whole = np.floor(self.repeat_factors)
        repeats = whole + (rng.random(self.dataset_size) < self.repeat_factors - whole)
        return rng.permutation(np.repeat(np.arange(self.dataset_size), repeats.astype(np.int64)))

    def _stream(self, start: int) -> Iterator[tuple[int, int]]:
        """(position, index) of all processes from position `start` on."""
        first = 0
        for epoch in itertools.count():
            if self.repeat_factors is None and first + self.dataset_size <= start:
                first += self.dataset_size
                continue
            order = self.epoch_order(epoch)
            for i in range(max(start - first, 0), len(order)):
                yield first + i, int(order[i])
            first += len(order)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        total = self.batch_size * self.world_size
        if self.groups is None:
            stream = self._stream(self.start_batch * total)
            mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
            while True:
                batch = list(itertools.islice(stream, total))[mine]
                yield [(index, position, self.seed) for position, index in batch]
        # Batches of one group fill up at different times, so seeking means replaying the (cheap) order.
        buckets: dict[int, list[SampleKey]] = {}
        number = 0
        for position, index in itertools.islice(self._stream(0), self.rank, None, self.world_size):
            bucket = buckets.setdefault(int(self.groups[index]), [])
            bucket.append((index, position, self.seed))
            if len(bucket) == self.batch_size:
                if number >= self.start_batch:
                    yield list(bucket)
                bucket.clear()
                number += 1
