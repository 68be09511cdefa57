"""One bootstrapping of the region masks of a whole data set, in a folder of files, by all processes, through kills.

The images of the data set, in its fixed order, form clustering batches 0, 1, ... What a batch gives depends on the
network, the images and (seed, round, number of the batch) alone: not on the number of processes, and not on what was done
before. So a round that was interrupted goes on where it stopped, if the network is the same. Memory is bounded by a batch,
whatever the data set.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.utils import comm
from detectron2.utils.logger import log_every_n_seconds

from ..data.bad_images import are_too_many, printable
from ..data.region_files import MapSettings, file_bytes
from ..data.region_writer import RegionWriter, begin_maps, completed_images, finish_maps
from .feature_clustering import BoundedImage, FeatureClusterer, read_ahead
from .processes import fail_together, on_main_process

logger = logging.getLogger(__name__)

_BATCHES_PER_SYNC = 8  # after these a process learns whether another one has failed
_LOG_SECONDS = 30.0


@dataclass(frozen=True)
class RoundCounts:
    """What was written, in images and bytes."""

    num_maps: int = 0
    num_unreadable: int = 0
    num_bytes: int = 0

    def __add__(self, other: RoundCounts) -> RoundCounts:
        return RoundCounts(
            self.num_maps + other.num_maps,
            self.num_unreadable + other.num_unreadable,
            self.num_bytes + other.num_bytes,
        )


class MaskMaker:
    """Makes the region maps of a data set with the present state of a network."""

    def __init__(
        self,
        *,
        build_clusterer: Callable[[], FeatureClusterer],
        images_per_clustering: int,
        dataset: Sequence[dict[str, Any]],
        dataset_names: list[str],
        max_unreadable: float,
        between_batches: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            build_clusterer: called once a round, in all processes.
            images_per_clustering: size of a clustering batch.
            dataset: dataset dicts with "file_name" and "region_key".
            dataset_names: of DATASETS.TRAIN; the index of the maps names them.
            max_unreadable: a share of unreadable images that is surely larger stops the run, see `are_too_many`.
            between_batches: called in all processes every few clustering batches; may stop the run.
        """
        self._build_clusterer = build_clusterer
        self._images_per_clustering = images_per_clustering
        self._dataset = dataset
        # What is listed twice has one mask, of its first place.
        first: dict[str, int] = {}
        for i, dataset_dict in enumerate(dataset):
            first.setdefault(dataset_dict["region_key"], i)
        self._indices = list(first.values())
        self._dataset_names = dataset_names
        self._max_unreadable = max_unreadable
        self._between_batches = between_batches

    def try_out(self) -> None:
        """Cluster a black image: a wrong setting or a missing package is found before training, not after the warm-up."""
        self._build_clusterer().cluster([np.zeros((64, 64, 3), dtype=np.uint8)], (0,))

    def make(self, number: int, root: Path, seed: int) -> None:
        """Fill the folder `root`; to be called in all processes, for which it must be one folder.

        The maps grow in `root`.partial, which is renamed when all of them are there. What an interrupted call left there,
        or in `root`, is kept if it is of the same network, images and settings, and deleted if not.

        Args:
            number: r of the round.
            root: the folder.
            seed: of the run.

        Raises:
            OSError: if the maps cannot be written.
            RuntimeError: if another process failed, or too many images are unreadable.
        """
        clusterer = self._build_clusterer()
        map_settings = self._describe(clusterer, number, seed)
        partial = root.with_name(f"{root.name}.partial")
        with _explain_write_errors(partial):
            todo = on_main_process(lambda: self._prepare(root, partial, map_settings))
        if todo is None:
            logger.info("The region masks of round %d are complete in %s", number, root)
            return
        start = time.perf_counter()
        counts = self._cluster_all(clusterer, todo, partial, (seed, number))
        with _explain_write_errors(partial):
            on_main_process(lambda: _complete(partial, root))
        seconds = time.perf_counter() - start
        logger.info(
            "Bootstrapped %d region masks in %.0f s: %.1f ms and %.0f bytes an image. %d images could not be read. %s",
            counts.num_maps,
            seconds,
            1000 * seconds / max(counts.num_maps, 1),
            counts.num_bytes / max(counts.num_maps, 1),
            counts.num_unreadable,
            root,
        )

    def _describe(self, clusterer: FeatureClusterer, number: int, seed: int) -> MapSettings:
        """All that the maps depend on; the network and the images by their hashes."""
        keys = hashlib.sha256("\n".join(self._dataset[i]["region_key"] for i in self._indices).encode())
        options = clusterer.describe() | {
            "round": number,
            "seed": seed,
            "images_per_clustering": self._images_per_clustering,
            "images": keys.hexdigest(),
        }
        return MapSettings(
            "bootstrap", options, overlapping=False, resolution="features", dataset_names=self._dataset_names
        )

    def _prepare(self, root: Path, partial: Path, settings: MapSettings) -> list[int] | None:
        """Make or clean the folder; returns the batches that are still to be done, None if `root` is complete."""
        if root.exists():
            if _is_of(root, settings):
                return None
            shutil.rmtree(root)
        if partial.exists() and not _is_of(partial, settings):
            logger.info("%s was begun with another network or other settings: it is made anew", partial)
            shutil.rmtree(partial)
        begin_maps(partial, settings)
        sizes = completed_images(partial)
        num_batches = -(-len(self._indices) // self._images_per_clustering)
        if not sizes:
            return list(range(num_batches))
        todo = [b for b in range(num_batches) if not self._is_done(b, sizes)]
        logger.info("Going on in %s: %d of %d clustering batches are left", partial, len(todo), num_batches)
        return todo

    def _is_done(self, batch: int, sizes: dict[str, int]) -> bool:
        """Whether all images of a batch are among `sizes` (key: bytes of the image file), and still have that size."""
        images = self._images_of(batch)
        return all(d["region_key"] in sizes and sizes[d["region_key"]] == file_bytes(d["file_name"]) for d in images)

    def _images_of(self, batch: int) -> list[dict[str, Any]]:
        """Dataset dicts of a clustering batch."""
        size = self._images_per_clustering
        return [self._dataset[i] for i in self._indices[batch * size : (batch + 1) * size]]

    def _cluster_all(
        self, clusterer: FeatureClusterer, todo: list[int], partial: Path, seed: tuple[int, int]
    ) -> RoundCounts:
        """Do the batches `todo`, shared out over the processes; returns the counts of all processes."""
        rank, world_size = comm.get_rank(), comm.get_world_size()
        own = todo[rank::world_size]
        files = ([d["file_name"] for d in self._images_of(b)] for b in own)
        batches = zip(own, read_ahead(files), strict=True)
        counts = RoundCounts()
        start = time.perf_counter()
        with fail_together(), _explain_write_errors(partial):
            writer = RegionWriter(partial, f"rank{rank}", overlapping=False)
        with writer:
            for first in range(0, len(todo), world_size * _BATCHES_PER_SYNC):
                with fail_together(), _explain_write_errors(partial):
                    for batch, images in islice(batches, _BATCHES_PER_SYNC):
                        maps = clusterer.cluster([i.pixels for i in images if i.pixels is not None], (*seed, batch))
                        counts += self._write(writer, batch, images, maps)
                        self._check_unreadable(counts)
                _log_progress(min(first + world_size * _BATCHES_PER_SYNC, len(todo)), len(todo), start)
                if self._between_batches is not None:
                    self._between_batches()
        return sum(comm.all_gather(counts), RoundCounts())

    def _write(
        self, writer: RegionWriter, batch: int, images: list[BoundedImage], maps: list[np.ndarray]
    ) -> RoundCounts:
        """Write the maps of a batch; unreadable images, which have none, are noted as such."""
        counts = RoundCounts()
        remaining = iter(maps)
        for dataset_dict, image in zip(self._images_of(batch), images, strict=True):
            key, file = dataset_dict["region_key"], dataset_dict["file_name"]
            if image.pixels is None:
                logger.warning("Cannot read %s (%s); it gets no region mask.", printable(file), printable(image.reason))
                writer.write_unreadable(key, image_file=file)
                counts += RoundCounts(num_unreadable=1)
            else:
                entry = writer.write(key, next(remaining), image_file=file, image_size=image.size)
                counts += RoundCounts(num_maps=1, num_bytes=entry.map_bytes)
        return counts

    def _check_unreadable(self, counts: RoundCounts) -> None:
        seen = counts.num_maps + counts.num_unreadable
        if are_too_many(counts.num_unreadable, seen, self._max_unreadable):
            raise RuntimeError(
                f"{counts.num_unreadable} of {seen} images could not be read, more than DATALOADER.MAX_BAD_IMAGES "
                f"({self._max_unreadable:.0%}) allows; see the warnings above"
            )


def _log_progress(done: int, total: int, start: float) -> None:
    minutes = (time.perf_counter() - start) / done * (total - done) / 60
    message = f"Bootstrapping region masks: {done} of {total} clustering batches, {minutes:.1f} minutes left"
    log_every_n_seconds(logging.INFO, message, n=_LOG_SECONDS, name=__name__)


@contextmanager
def _explain_write_errors(folder: Path) -> Iterator[None]:
    """Name the folder in errors of the file system, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"Cannot write region masks to {folder}: {error}. Free some space, correct the permissions or choose another "
            "OUTPUT_DIR, then start again with --resume: what is complete is kept"
        ) from error


def _is_of(folder: Path, settings: MapSettings) -> bool:
    """Whether `folder` holds maps of these settings, complete or not."""
    try:
        begin_maps(folder, settings)
    except ValueError:
        return False
    return True


def _complete(partial: Path, root: Path) -> None:
    finish_maps(partial)
    os.replace(partial, root)
