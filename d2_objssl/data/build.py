"""The training loader of both phases. Order (see `sampling.py`) and augmentation are functions of (seed, position) alone."""

from __future__ import annotations

import copy
import logging
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_test_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from .bad_images import BadImages, StrictMapper, printable, why_unreadable
from .collation import collate_views
from .dataset_mapper import ObjSSLDatasetMapper
from .depth_mapper import DepthDatasetMapper
from .loading import load_dataset_dicts, load_test_dicts
from .pair_mapper import PairDatasetMapper
from .region_maps import FileRegions
from .sampling import ResumableBatchSampler, SampleKey
from .sem_seg_mapper import SemSegDatasetMapper

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 20
_GRACE_SECONDS = 60  # a worker lives so long after SIGTERM, for the step or the evaluation that needs its batches


@contextmanager
def _seeded(seed: int, position: int) -> Iterator[None]:
    """Seed the global generators for one sample, and give them back as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    entropy = np.random.SeedSequence((seed, position)).generate_state(3)
    random.seed(int(entropy[0]))
    np.random.seed(entropy[1])
    torch.default_generator.manual_seed(int(entropy[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class MappedDataset(Dataset):
    """A data set whose samples are addressed by `SampleKey`; an unreadable image is replaced by another one.

    So is an image whose region map or label map cannot be read; maps that do not fit their image are errors. The
    replacement follows from the sample's seed. The mapped dict of a replaced sample has the extra key "replaced", a
    list of (path, reason).
    """

    def __init__(self, dataset: Sequence[dict[str, Any]], mapper: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.dataset = dataset
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        index, position, seed = key
        fallback = np.random.default_rng((seed, position, 1))
        replaced: list[tuple[str, str]] = []
        for _ in range(_MAX_ATTEMPTS):
            dataset_dict = self.dataset[index]
            try:
                with _seeded(seed, position):
                    mapped = self.mapper(dataset_dict)
            except Exception as error:
                file_name = str(dataset_dict["file_name"])
                reason = why_unreadable(error, file_name)
                if reason is None:
                    raise
                replaced.append((file_name, reason))
                index = int(fallback.integers(len(self.dataset)))
                continue
            if replaced:
                mapped["replaced"] = replaced
            return mapped
        path, reason = replaced[-1]
        raise RuntimeError(
            f"{_MAX_ATTEMPTS} images drawn in a row could not be read; the last one was {printable(path)} "
            f"({printable(reason)}). "
            "Check DATASETS.TRAIN."
        )


class TrainLoader:
    """Iterable of training batches that starts anywhere and keeps count of unreadable images.

    Attributes:
        num_images: size of the data set.
        sampler: the `ResumableBatchSampler`.
        dataset: the `MappedDataset`.
        bad_images: what could not be read so far in this process.
        num_cut: how many samples had more regions than MODEL.SSL.DETCON.MAX_REGION_IDS so far in this process.
    """

    def __init__(self, loader: DataLoader, num_images: int, max_bad: float) -> None:
        self.loader = loader
        self.num_images = num_images
        self.bad_images = BadImages(max_bad)
        self.sampler: ResumableBatchSampler = loader.batch_sampler  # type: ignore[assignment]
        self.dataset: MappedDataset = loader.dataset  # type: ignore[assignment]
        self.num_cut = 0

    def seek(self, batch: int) -> None:
        """Let the next iterator start with this batch of the stream."""
        self.sampler.start_batch = batch

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self._count(batch)
            yield batch

    def from_start(self) -> Iterator[Any]:
        """Iterate from the first batch on, in this process, whatever the position of other iterators."""
        sampler = copy.copy(self.sampler)
        sampler.start_batch = 0
        return iter(DataLoader(self.loader.dataset, batch_sampler=sampler, collate_fn=self.loader.collate_fn))

    @property
    def region_root(self) -> str | None:
        """The folder whose region maps are read, if any."""
        return getattr(getattr(self.dataset.mapper, "region_source", None), "root", None)

    def set_region_root(self, root: str | None) -> None:
        """Read region maps from the folder `root`, or none; iterators that exist already do not notice.

        Raises:
            ValueError: if the folder lacks maps of training images, or regions do not come from files.
        """
        source = getattr(self.dataset.mapper, "region_source", None)
        if not isinstance(source, FileRegions):
            raise ValueError(f'{root}: a folder of region maps needs INPUT.REGIONS.SOURCE "file" or "bootstrap"')
        source.set_root(root)
        source.check(self.dataset.dataset)

    def _count(self, batch: Any) -> None:
        replaced = getattr(batch, "replaced", None)
        if replaced is None:
            replaced = [r for d in batch for r in d.pop("replaced", ())]
        self._count_dropped_regions(getattr(batch, "dropped_regions", ()))
        self.bad_images.count(len(batch), replaced)

    def _count_dropped_regions(self, dropped: Sequence[tuple[str, int]]) -> None:
        if dropped and self.num_cut == 0:
            logger.warning(
                "%s has %d region(s) more than MODEL.SSL.DETCON.MAX_REGION_IDS: the smallest ones are no regions. "
                "This is said for one image only; `TrainLoader.num_cut` counts them.",
                *dropped[0],
            )
        self.num_cut += len(dropped)


def _init_worker(worker_id: int) -> None:
    """Let the main process alone decide what a signal to the whole process group ends (engine.preemption)."""
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # It may also come from the main process, at its end, which then waits for this one: so it is put off, not ignored.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))


def build_train_loader(cfg: CfgNode, mapper: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> TrainLoader:
    """Build the loader of DATASETS.TRAIN for pretraining (INPUT.SSL.NUM_VIEWS > 0) or fine-tuning.

    Args:
        cfg: DATASETS.TRAIN, DATALOADER.*, SOLVER.IMS_PER_BATCH, INPUT.SSL.NUM_VIEWS, INPUT.REGIONS and SEED are read.
        mapper: default `ObjSSLDatasetMapper(cfg, True)`, `PairDatasetMapper` for pairs (INPUT.PAIRS),
            `SemSegDatasetMapper` for semantic segmentation, or `DepthDatasetMapper` for depth.

    Returns:
        Loader of `SSLBatch` in pretraining, of lists of dicts in fine-tuning.
    """
    dicts = load_dataset_dicts(cfg)
    pretrain = cfg.INPUT.SSL.NUM_VIEWS > 0
    sampler = _build_sampler(cfg, dicts)
    # Serialised to one array: the memory of the workers does not grow by reference counting.
    dataset = MappedDataset(DatasetFromList(dicts, copy=False), mapper or _build_mapper(cfg, True))
    loader: DataLoader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=collate_views if pretrain else _no_collation,
        worker_init_fn=_init_worker,
        pin_memory=torch.cuda.is_available() and cfg.MODEL.DEVICE.startswith("cuda"),
        # The loader draws a base seed when it starts; from a generator of its own, so that the global one stays put.
        generator=torch.Generator().manual_seed(0),
    )
    return TrainLoader(loader, len(dicts), cfg.DATALOADER.MAX_BAD_IMAGES)


def _build_sampler(cfg: CfgNode, dicts: list[dict[str, Any]]) -> ResumableBatchSampler:
    """The sampler of DATALOADER.SAMPLER_TRAIN and DATALOADER.ASPECT_RATIO_GROUPING."""
    pretrain = cfg.INPUT.SSL.NUM_VIEWS > 0
    groups = repeat_factors = None
    if not pretrain and cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        if all("width" in d and "height" in d for d in dicts):
            groups = np.array([d["width"] > d["height"] for d in dicts], dtype=np.int8)
        else:
            logger.info(
                "DATALOADER.ASPECT_RATIO_GROUPING has no effect: the data set does not say how large its images are"
            )
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "RepeatFactorTrainingSampler":
        if not all("annotations" in d for d in dicts):
            raise ValueError(
                f'DATALOADER.SAMPLER_TRAIN is "{name}", which counts the objects of each class, but DATASETS.TRAIN '
                f"{list(cfg.DATASETS.TRAIN)} has none in this run"
            )
        repeat_factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        ).numpy()
    elif name != "TrainingSampler":
        raise ValueError(
            f'DATALOADER.SAMPLER_TRAIN is "{name}"; those that resume: "TrainingSampler", "RepeatFactorTrainingSampler"'
        )
    return ResumableBatchSampler(
        len(dicts),
        cfg.SOLVER.IMS_PER_BATCH,
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        groups=groups,
        repeat_factors=repeat_factors,
    )


def _build_mapper(cfg: CfgNode, is_train: bool) -> ObjSSLDatasetMapper:
    if is_train and cfg.INPUT.SSL.NUM_VIEWS > 0 and cfg.INPUT.PAIRS.SOURCE != "none":
        return PairDatasetMapper(cfg, True)
    if cfg.MODEL.META_ARCHITECTURE == "DepthEstimator":
        return DepthDatasetMapper(cfg, is_train)
    is_semantic = cfg.MODEL.META_ARCHITECTURE in ("SemanticSegmentor", "SlidingWindowSegmentor")
    return (SemSegDatasetMapper if is_semantic else ObjSSLDatasetMapper)(cfg, is_train)


def _no_collation(batch: list[Any]) -> list[Any]:
    return batch


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Detectron2's test loader with this package's mapper.

    Raises:
        ValueError, OSError: see `loading.load_test_dicts`; OSError while it is iterated, naming the image that cannot
            be read.
    """
    dicts = load_test_dicts(cfg, dataset_name)
    mapper = StrictMapper(_build_mapper(cfg, False), dataset_name)
    loader = build_detection_test_loader(dicts, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS)
    loader.worker_init_fn = _init_worker
    return loader
