"""Images a second of data loaders: the plain way, this project's training loader, and reading the files as the floor."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from d2_objssl.data import build_train_loader
from d2_objssl.data.image_reading import read_rgb_image
from d2_objssl.engine import setup_cfg

from .models import SLOTCON_CONFIG
from .timing import use_one_thread

Stage = tuple[str, Callable[[Any], Any]]
_BATCH_SIZE = 16
_WARM_UP = 4  # batches: the workers start, and fill their queues


class StagedDataset(Dataset):
    """What a chain of stages makes of files."""

    def __init__(self, paths: Sequence[str], stages: Sequence[Stage]) -> None:
        self.paths, self.stages = paths, stages

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        state: Any = self.paths[index]
        for _, stage in self.stages:
            state = stage(state)
        return state


def measure_rates(
    folder: Path, paths: Sequence[str], plain: Sequence[Stage], workers: Sequence[int], num_images: int, seed: int
) -> dict[str, dict[str, float]]:
    """Images a second, by number of workers and contestant.

    Args:
        folder: where the files are.
        paths: the files; repeated as often as needed.
        plain: stages from a path to what can be collated.
        workers: numbers of workers.
        num_images: that are timed.
        seed: of the order.
    """
    decoding: list[Stage] = [("decode", read_rgb_image), ("drop", lambda image: torch.zeros(1))]
    num_batches = _WARM_UP + num_images // _BATCH_SIZE
    repeated = list(itertools.islice(itertools.cycle(paths), num_batches * _BATCH_SIZE))
    rates = {}
    for num_workers in workers:
        loaders = {
            "plain": plain_loader(repeated, plain, num_workers),
            "ours": own_loader(folder, num_workers, seed),
            "ours, colours left to the model": own_loader(
                folder, num_workers, seed, "INPUT.SSL.AUGMENT_DEVICE", "model"
            ),
            "decoding alone": plain_loader(repeated, decoding, num_workers),
        }
        rates[str(num_workers)] = {
            name: images_per_second(loader, num_images // _BATCH_SIZE) for name, loader in loaders.items()
        }
    return rates


def plain_loader(paths: list[str], stages: Sequence[Stage], num_workers: int) -> Iterable[Any]:
    """PyTorch's loader."""
    dataset = StagedDataset(paths, stages)
    return DataLoader(dataset, _BATCH_SIZE, num_workers=num_workers, worker_init_fn=use_one_thread)


def own_loader(folder: Path, num_workers: int, seed: int, *opts: str) -> Iterable[Any]:
    """The training loader of SlotCon's COCO config."""
    with tempfile.TemporaryDirectory(prefix="d2_objssl-speed-") as output_dir:
        common = ["DATASETS.TRAIN", f"('images:{folder}',)", "DATALOADER.NUM_WORKERS", str(num_workers)]
        common += [
            "MODEL.DEVICE",
            "cpu",
            "SOLVER.IMS_PER_BATCH",
            str(_BATCH_SIZE),
            "SEED",
            str(seed),
            "OUTPUT_DIR",
            output_dir,
        ]
        return build_train_loader(setup_cfg(str(SLOTCON_CONFIG), [*common, *opts]))


def images_per_second(loader: Iterable[Any], num_batches: int) -> float:
    """Wall-clock rate behind the first batches."""
    batches = iter(loader)
    for _ in range(_WARM_UP):
        next(batches)
    start = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    return num_batches * _BATCH_SIZE / (time.perf_counter() - start)
