"""Where a training step waits for the device: nowhere but at the places known here.

There is no device here that one could wait for. So a step of one process runs on the CPU, and what would wait on a GPU is
recognised by its operation: reading a value, selecting by a mask, drawing one element, making a tensor of Python numbers
(an unpinned copy to the device). What only several processes do, and PyTorch's SyncBatchNorm, which selects by a mask,
is not seen here.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import HookBase
from killed_runs import method_cfg
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import d2_objssl
from d2_objssl.engine import Trainer
from d2_objssl.proposals import spherical_kmeans

PACKAGE = str(Path(d2_objssl.__file__).parent)
WAITING = {
    "aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default", "aten.equal.default",
    "aten.bincount.default", "aten._unique2.default", "aten.repeat_interleave.Tensor",
}  # fmt: skip
READING = {"tolist", "cpu", "numpy", "item", "tensor", "new_tensor", "as_tensor"}
# Of numbers that are on the CPU already, and of code that GPUs do not run.
ON_CPU = {
    "train_step.run_step", "optimizer._trust_ratio", "cyborgs._add_metrics", "cyborgs._consistency_loss",
    "device_augmentation._blur", "device_augmentation.apply_colors",
}  # fmt: skip
CLUSTERING = {"proposals.spherical_kmeans": 8, "proposals._train_centroids": 8}  # of 2 views by student and teacher
RUNS = {
    "SlotCon": ("SlotCon", (), {"slotcon.true_rows": 2}),
    "SlotCon, colours": ("SlotCon", ("INPUT.SSL.AUGMENT_DEVICE", "model"), {"slotcon.true_rows": 2}),
    "DetConB": ("DetConB", (), {}),
    "DetConB, cells": ("DetConB", ("MODEL.SSL.DETCON.POOLING", "sample"), {}),
    "DetConB, one region": ("DetConB", ("MODEL.SSL.DETCON.NUM_REGIONS", 1), {}),
    "CYBORGS": ("CYBORGS", (), CLUSTERING),
    "SemCL": ("SemCL", (), {}),
}


def place() -> str | None:
    """Function of this package in which the current call is made; None where it makes the data, as workers do."""
    codes = [f.f_code for f, _ in traceback.walk_stack(None) if f.f_code.co_filename.startswith(PACKAGE)]
    if not codes or any("/data/" in c.co_filename and "device_augmentation" not in c.co_filename for c in codes):
        return None
    return f"{Path(codes[0].co_filename).stem}.{codes[0].co_name}"


class WaitingOperations(TorchDispatchMode):
    """Counts operations that read what they compute, by the function that has them."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = str(func).startswith(("aten.index.Tensor", "aten.index_put")) and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        one_drawn = str(func) == "aten.multinomial.default" and args[1] == 1
        if (by_mask or one_drawn or str(func) in WAITING) and (where := place()):
            self.found[where] += 1
        return func(*args, **(kwargs or {}))


class ReadingFunctions(TorchFunctionMode):
    """Counts calls that bring values to or from Python, likewise."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READING and (where := place()):
            self.found[where] += 1
        return func(*args, **(kwargs or {}))


class Watched(HookBase):
    """Records the second iteration of a run."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.modes = WaitingOperations(self.found), ReadingFunctions(self.found)

    def before_step(self) -> None:
        if self.trainer.iter == 1:
            for mode in self.modes:
                mode.__enter__()

    def after_step(self) -> None:
        if self.trainer.iter == 1:
            for mode in reversed(self.modes):
                mode.__exit__(None, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_a_step_waits_only_where_it_says_so(photos: Path, folder: Path, run: str) -> None:
    method, opts, expected = RUNS[run]
    trainer = Trainer(method_cfg(method, photos, folder, *opts))
    trainer.max_iter = 2
    trainer.register_hooks([watched := Watched()])
    trainer.train()
    found = {where: count for where, count in watched.found.items() if where not in ON_CPU}
    assert found == {"train_step.read_scalars": 1, **expected}


def test_what_waits_is_found() -> None:
    found: Counter[str] = Counter()
    with WaitingOperations(found), ReadingFunctions(found):
        labels = torch.zeros(4, dtype=torch.long)
        spherical_kmeans(torch.ones(3, 2), 1, 1, 0)  # .all() in an if, selection by a mask, .cpu(), .numpy()
        assert labels.tolist() == [0] * 4  # not in the package
    assert found == {"proposals.spherical_kmeans": 2, "proposals._train_centroids": 2}
