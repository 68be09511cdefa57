"""Fills a folder with the region maps of a data set: in several processes, restartable, whatever kills it.

A map depends on its image and the settings alone, not on the number of processes or on restarts: before each image
`numpy.random` is seeded by the image's key.
"""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
import zlib
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from iopath.common.file_io import file_lock
from tqdm import tqdm

from ..parallel import use_one_thread
from .bad_images import printable
from .image_reading import read_rgb_image
from .region_files import ENTRIES, INDEX, MapEntry, MapSettings, file_bytes, read_entries
from .region_keys import image_files_by_key
from .region_maps import RegionSource, limit_region_ids
from .region_writer import RegionWriter, begin_maps, completed_images, finish_maps

logger = logging.getLogger(__name__)

_IMAGES_PER_TASK = 4
_TASKS_AHEAD = 4  # for each process


@dataclass
class GenerationReport:
    """What `generate_maps` did.

    Attributes:
        num_new: images of this call; the others were done before.
        num_limited: of them, those that had more than the allowed number of regions.
        seconds: duration of this call.
        seconds_per_image: in one process, for reading, segmenting and writing; the mean of this call.
        num_maps: maps of the data set in the folder.
        bytes_per_map: their mean size.
        ids_per_map: mean number of region ids.
        max_ids: largest number of region ids.
        unreadable: files of the images that could not be read, in the whole folder.
    """

    num_new: int = 0
    num_limited: int = 0
    seconds: float = 0.0
    seconds_per_image: float = 0.0
    num_maps: int = 0
    bytes_per_map: float = 0.0
    ids_per_map: float = 0.0
    max_ids: int = 0
    unreadable: list[str] = field(default_factory=list)


def generate_maps(
    root: str | os.PathLike[str],
    dataset_dicts: Sequence[dict[str, Any]],
    source: RegionSource,
    settings: MapSettings,
    *,
    max_regions: int,
    num_workers: int = 0,
    progress: bool = False,
) -> GenerationReport:
    """Make the maps that `root` lacks, and complete it. Of two processes that call this at once, one waits.

    Args:
        root: the folder; new, or of the same settings.
        dataset_dicts: from `source.prepare`, with "region_key".
        source: makes the maps; of the size of the images.
        settings: what is written about them.
        max_regions: of a label map with more regions, so many stay, the largest ones.
        num_workers: processes; 0 and 1: this one. More need the caller's `__main__` guard.
        progress: show a progress bar.

    Raises:
        ValueError: if `root` holds something else, or an image and its labels do not fit; what is done is kept.
        OSError: if a file cannot be written.
    """
    start = time.monotonic()
    report = GenerationReport()
    files = image_files_by_key(dataset_dicts)
    unique = {d["region_key"]: d for d in dataset_dicts}
    with file_lock(os.path.join(root, ".generation")):
        begin_maps(root, settings)
        done = completed_images(root)
        todo = [d for key, d in unique.items() if done.get(key) != file_bytes(d["file_name"])]
        made = _run(_MapMaker(Path(root), source, max_regions), todo, num_workers)
        num_done = len(unique) - len(todo)
        with closing(made), tqdm(total=len(unique), initial=num_done, unit="image", disable=not progress) as bar:
            for one in made:
                bar.update()
                report.num_new += 1
                report.num_limited += one.num_dropped > 0
                report.seconds_per_image += one.seconds / len(todo)
                if one.reason:
                    logger.warning("Cannot read %s (%s)", printable(files[one.entry.key]), printable(one.reason))
        if todo or not (Path(root) / INDEX).exists():
            finish_maps(root)
    _summarize(read_entries(Path(root) / ENTRIES), files, report)
    report.seconds = time.monotonic() - start
    return report


def _summarize(entries: Iterable[MapEntry], files: dict[str, str], report: GenerationReport) -> None:
    """Fill in what concerns all maps of the data set, whenever they were made."""
    num_bytes = num_ids = 0
    for entry in entries:
        if entry.key not in files:
            continue
        if entry.map_bytes == 0:
            report.unreadable.append(files[entry.key])
            continue
        report.num_maps += 1
        num_bytes += entry.map_bytes
        num_ids += entry.num_ids
        report.max_ids = max(report.max_ids, entry.num_ids)
    report.bytes_per_map = num_bytes / max(report.num_maps, 1)
    report.ids_per_map = num_ids / max(report.num_maps, 1)


class _Made(NamedTuple):
    entry: MapEntry
    num_dropped: int
    seconds: float
    reason: str  # why the image is unreadable; else ""


class _MapMaker:
    """Makes and writes maps in one process."""

    def __init__(self, root: Path, source: RegionSource, max_regions: int) -> None:
        self.root = root
        self.source = source
        self.max_regions = max_regions

    def open(self) -> RegionWriter:
        """A writer for this process alone."""
        return RegionWriter(self.root, str(os.getpid()), overlapping=self.source.overlapping)

    def make(self, dataset_dict: dict[str, Any], writer: RegionWriter) -> _Made:
        """Make the map of an image."""
        start = time.perf_counter()
        key, file = dataset_dict["region_key"], dataset_dict["file_name"]
        try:
            image = read_rgb_image(file)
        except OSError as error:
            entry = writer.write_unreadable(key, image_file=file)
            return _Made(entry, 0, time.perf_counter() - start, f"{type(error).__name__}: {error}")
        np.random.seed(zlib.crc32(key.encode()))
        region_map, num_dropped = self.source(image, dataset_dict), 0
        if not self.source.overlapping:
            region_map, num_dropped = limit_region_ids(region_map, self.max_regions)
        entry = writer.write(key, region_map, image_file=file, image_size=image.shape[:2])
        return _Made(entry, num_dropped, time.perf_counter() - start, "")


def _run(maker: _MapMaker, dataset_dicts: Sequence[dict[str, Any]], num_workers: int) -> Generator[_Made, None, None]:
    """Make maps in this process, or in others; in the order in which they are done."""
    if not dataset_dicts:
        return
    if num_workers <= 1:
        state = np.random.get_state()
        try:
            with maker.open() as writer:
                for dataset_dict in dataset_dicts:
                    yield maker.make(dataset_dict, writer)
        finally:
            np.random.set_state(state)
        return
    # Forked from a clean server that has imported the package once. Not from here: OpenCV and PyTorch have threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    tasks = (dataset_dicts[i : i + _IMAGES_PER_TASK] for i in range(0, len(dataset_dicts), _IMAGES_PER_TASK))
    pool = ProcessPoolExecutor(num_workers, context, initializer=_init_worker, initargs=(maker,))
    pending: set[Future[list[_Made]]] = set()
    try:
        for task in tasks:
            pending.add(pool.submit(_make_in_worker, task))
            if len(pending) >= num_workers * _TASKS_AHEAD:
                done, pending = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    yield from future.result()
        for future in concurrent.futures.as_completed(pending):
            yield from future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[_MapMaker, RegionWriter] | None = None  # of a worker process


def _init_worker(maker: _MapMaker) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process gets it as well, and ends the workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    use_one_thread()
    _worker = maker, maker.open()


def _exit_with_parent() -> None:
    """End this process when its parent is killed; the pool would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _make_in_worker(dataset_dicts: Sequence[dict[str, Any]]) -> list[_Made]:
    assert _worker is not None
    maker, writer = _worker
    return [maker.make(dataset_dict, writer) for dataset_dict in dataset_dicts]
