"""Whether the disk has room for what a run will write: a full one is noticed at the start, not at the first checkpoint."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable

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
        checkpointer = self.trainer.checkpointer
        size = checkpoint_bytes(checkpointer.model, self.trainer.optimizer)
        count = self._count_new_checkpoints(len(checkpointer.periodic_checkpoints()))
        masks = _MASK_ROUNDS * self._num_masks * _MASK_BYTES
        needed, free = count * size + masks, shutil.disk_usage(self._folder).free
        plan = f"{count} checkpoints of about {size:,} bytes" + (
            f" and {masks:,} bytes of region masks" if masks else ""
        )
        if needed > free:
            raise OSError(
                f"OUTPUT_DIR {self._folder} has {free:,} bytes free, but the run will write {plan}: {needed:,} bytes. Free some "
                "space, choose another OUTPUT_DIR, a larger SOLVER.CHECKPOINT_PERIOD, or a small SOLVER.MAX_TO_KEEP"
            )
        logger.info("The run will write %s; %s bytes are free in %s", plan, f"{free:,}", self._folder)

    def _count_new_checkpoints(self, num_old: int) -> int:
        """Checkpoints that will be there at once beside the old ones: the periodic ones, and the final one."""
        periodic = self.trainer.max_iter // self._period - self.trainer.start_iter // self._period
        if self._max_to_keep is not None:  # an old one is deleted when the new one is there
            periodic = min(periodic, max(self._max_to_keep - num_old, 0) + 1)
        return max(periodic, 0) + 1


def checkpoint_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Estimate the size of a checkpoint: the model, and a momentum or, with Adam, two for every trained weight."""
    copies = 2 if isinstance(optimizer, torch.optim.AdamW) else 1
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    return _num_bytes(model.state_dict().values()) + copies * _num_bytes(trained)


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
