"""Whether the disk has room for what a run will write: a full one is noticed at the start, not at the first checkpoint."""

from __future__ import annotations

import glob
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn

from .processes import on_main_process

logger = logging.getLogger(__name__)

# A block of usual file systems. At stride 8 a map of 480 x 640 pixels has 4,800 cells of a byte, before compression.
_MASK_BYTES = 4096
_MASK_ROUNDS = 2  # the masks in use and those being made


class DiskSpace(HookBase):
    """Refuses to start a run whose checkpoints and bootstrapped masks do not fit into the free space of its folder.

    Comes behind the hook that takes the folder, in all processes.
    """

    def __init__(self, folder: str, period: int, max_to_keep: int | None = None, num_masks: int = 0) -> None:
        """
        Args:
            folder: OUTPUT_DIR.
            period: iterations between checkpoints.
            max_to_keep: how many of them stay; None: all.
            num_masks: images that get bootstrapped masks; 0: there is no bootstrapping.
        """
        self._folder = folder
        self._period = period
        self._max_to_keep = max_to_keep
        self._num_masks = num_masks

    def before_train(self) -> None:
        """Compare.

        Raises:
            OSError: naming needed and free bytes.
        """
        on_main_process(self._compare)

    def _compare(self) -> None:
        if self.trainer.start_iter >= self.trainer.max_iter:  # a finished run writes nothing
            return
        checkpointer = self.trainer.checkpointer
        size = checkpoint_bytes(checkpointer.model, self.trainer.optimizer)
        # Also those of earlier runs, which may be written over.
        sizes = {
            path: os.path.getsize(path) for path in glob.glob(os.path.join(glob.escape(self._folder), "model_*.pth"))
        }
        checkpoints = self._growth(size, checkpointer.periodic_checkpoints(), sizes)
        present = _count_masks(os.path.join(self._folder, "regions"))
        masks = max(_MASK_ROUNDS * self._num_masks - present, 0) * _MASK_BYTES
        needed, free = checkpoints + masks, shutil.disk_usage(self._folder).free
        plan = f"{math.ceil(checkpoints / size)} checkpoints of about {size:,} bytes" + (
            f" and {masks:,} bytes of region masks" if masks else ""
        )
        if needed > free:
            raise OSError(
                f"OUTPUT_DIR {self._folder} has {free:,} bytes free, but the run will write {plan}: {needed:,} bytes. Free some "
                "space, choose another OUTPUT_DIR, a larger SOLVER.CHECKPOINT_PERIOD, or a small SOLVER.MAX_TO_KEEP"
            )
        logger.info("The run will write %s; %s bytes are free in %s", plan, f"{free:,}", self._folder)

    def _growth(self, size: int, old: Mapping[str, int], sizes: Mapping[str, int]) -> int:
        """Bytes by which the checkpoints will have grown at most: what `hooks.Checkpoints` will do, on paper.

        Args:
            size: of a new checkpoint.
            old: path -> iteration of the numbered ones of this run, from the oldest to the newest.
            sizes: path -> bytes of all that are there.
        """
        start, end = self.trainer.start_iter, self.trainer.max_iter
        final = os.path.join(self._folder, "model_final.pth")
        present = dict(sizes)
        recent = [path for path, iteration in old.items() if iteration < start]
        grown = most = 0

        def write(path: str) -> None:
            nonlocal grown, most
            most = max(most, grown + size)  # the new file lies beside the one that it replaces
            grown += size - present.get(path, 0)
            present[path] = size

        for step in range((start // self._period + 1) * self._period, end + 1, self._period):
            if step == end:
                write(final)
            recent.append(os.path.join(self._folder, f"model_{step - 1:07d}.pth"))
            write(recent[-1])
            if self._max_to_keep is not None and len(recent) > self._max_to_keep:
                grown -= present.pop(recent.pop(0), 0)
        if end % self._period:
            write(final)
        return most


def _count_masks(folder: str) -> int:
    """Files of the rounds of bootstrapping in `folder`, begun ones included: what is no longer needed will be deleted."""
    rounds = (
        [r for r in os.listdir(folder) if re.fullmatch(r"round_\d{4,}(\.partial)?", r)] if os.path.isdir(folder) else []
    )
    return sum(len(files) for r in rounds for _, _, files in os.walk(os.path.join(folder, r)))


def checkpoint_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Estimate the size of a checkpoint: the model, and a momentum or, with Adam, two for every trained weight."""
    copies = 2 if isinstance(optimizer, torch.optim.AdamW) else 1
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    return _num_bytes(model.state_dict().values()) + copies * _num_bytes(trained)


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
