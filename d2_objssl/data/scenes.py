"""Synthetic detection scenes as data sets, generated on first use and labelled in four formats.

A generated folder holds one split:

    images/000000.jpg ...                    the scenes
    annotations/instances.json               COCO: categories 1 to 6 = `SHAPES`, exact polygons of the visible pixels
    annotations/panoptic.json, panoptic/     COCO panoptic: the same categories, and 7 = background (stuff)
    sem_seg/000000.png ...                   uint8: 0 = background, otherwise the COCO category id
    voc/{Annotations,ImageSets,JPEGImages}   Pascal VOC: split "all"; JPEGImages is a link to images
    scenes.json                              the settings, written last: the folder is complete

The catalog names are those of `PRESETS`, below DETECTRON2_DATASETS/scenes; `NAME_sem_seg` and `NAME_voc` read the same
files. How the scenes look is in `scene_rendering.py`, how they are labelled in `scene_labels.py`.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, load_sem_seg, load_voc_instances
from iopath.common.file_io import file_lock
from tqdm import tqdm

from .scene_labels import VOC_SPLIT, write_indices, write_scene
from .scene_rendering import SHAPES, Scene, check_size, render_scene

__all__ = [
    "GENERATOR_VERSION",
    "LABELS",
    "PRESETS",
    "SHAPES",
    "Scene",
    "generate_scenes",
    "register_all_scenes",
    "register_scenes",
    "render_scene",
]

logger = logging.getLogger(__name__)

GENERATOR_VERSION = 1  # raise it with any change to what is drawn or written
LOG_PERIOD_S = 5.0
LABELS = ("instances", "panoptic", "sem_seg", "voc")
# name -> (number of images, (height, width), seed). Splits are disjoint because their seeds differ.
PRESETS: dict[str, tuple[int, tuple[int, int], int]] = {
    "scenes_unlabeled": (2000, (128, 128), 1),
    "scenes_train": (100, (128, 128), 2),
    "scenes_val": (100, (128, 128), 3),
    "scenes_tiny_train": (16, (96, 96), 4),
    "scenes_tiny_val": (8, (96, 96), 5),
}

_MANIFEST = "scenes.json"


def register_all_scenes(root: str) -> None:
    """Enter every split of `PRESETS` into the catalogs. Draws nothing yet.

    Args:
        root: the dataset root; the splits go to root/scenes/NAME.
    """
    for name, (num_images, size, seed) in PRESETS.items():
        register_scenes(name, num_images=num_images, size=size, seed=seed, root=root)


def register_scenes(name: str, *, num_images: int, size: tuple[int, int], seed: int, root: str | None = None) -> None:
    """Enter a split into the catalogs as `name`, `name`_sem_seg and `name`_voc. It is generated on first use.

    Any number of processes may ask the DatasetCatalog for it at once: one generates, the others wait.

    Args:
        name: the catalog name, and the folder's name below root/scenes.
        num_images: how many scenes; at least 2 for `name`_voc, because of Detectron2's reader.
        size: (height, width) in pixels.
        seed: of the split; splits with different seeds are disjoint.
        root: the dataset root; by default DETECTRON2_DATASETS, or ./datasets.

    Raises:
        ValueError: if a setting is out of range or the name is taken.
    """
    _check_settings(num_images, size, seed, LABELS)
    if name in DatasetCatalog:
        raise ValueError(f'the dataset "{name}" is registered already')
    root = os.path.expanduser(root if root is not None else os.getenv("DETECTRON2_DATASETS", "datasets"))
    folder = os.path.join(root, "scenes", name)
    image_root, voc_root = os.path.join(folder, "images"), os.path.join(folder, "voc")
    json_file, sem_seg_root = os.path.join(folder, "annotations", "instances.json"), os.path.join(folder, "sem_seg")

    def register(suffix: str, load: Callable[[], list[dict[str, Any]]], **metadata: Any) -> None:
        def generate_and_load() -> list[dict[str, Any]]:
            generate_scenes(folder, num_images=num_images, size=size, seed=seed)
            return load()

        DatasetCatalog.register(name + suffix, generate_and_load)
        MetadataCatalog.get(name + suffix).set(generated=True, **metadata)

    register(
        "",
        lambda: load_coco_json(json_file, image_root, name),
        thing_classes=list(SHAPES),
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(SHAPES))},
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
    )
    register(
        "_sem_seg",
        lambda: load_sem_seg(sem_seg_root, image_root),
        stuff_classes=["background", *SHAPES],
        ignore_label=255,
        image_root=image_root,
        sem_seg_root=sem_seg_root,
        evaluator_type="sem_seg",
    )
    register(
        "_voc",
        lambda: load_voc_instances(voc_root, VOC_SPLIT, SHAPES),
        thing_classes=list(SHAPES),
        dirname=voc_root,
        year=2012,
        split=VOC_SPLIT,
        evaluator_type="pascal_voc",
    )


def generate_scenes(
    root: str | Path,
    *,
    num_images: int,
    size: tuple[int, int],
    seed: int,
    labels: Sequence[str] = LABELS,
    num_workers: int = 0,
    progress: bool = False,
) -> Path:
    """Write a split to the folder `root`, unless it is there already.

    The scenes are written to a hidden sibling folder that is renamed when complete; a lock beside it makes concurrent
    callers wait for the one that generates. A folder with anything else in it is never touched.

    Args:
        root: the folder to make; an empty one may exist.
        num_images: how many scenes, 0 to num_images - 1 of the seed's.
        size: (height, width) in pixels.
        seed: of the split; splits with different seeds are disjoint.
        labels: what to write beside the images, of `LABELS`.
        num_workers: processes to draw with; 0 and 1 draw in this one. More need the caller's `__main__` guard.
        progress: show a progress bar instead of logging every few seconds.

    Returns:
        `root`, complete.

    Raises:
        ValueError: if a setting is out of range, `root` cannot be written, or holds something else.
    """
    settings = _check_settings(num_images, size, seed, labels)
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}; it must not be negative")
    folder = Path(root).expanduser().resolve()
    try:
        if _is_complete(folder, settings):
            return Path(root)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(folder.parent / f".{folder.name}")):
            if not _is_complete(folder, settings):  # another process may have been first
                _generate(folder, settings, num_workers, progress)
    except OSError as error:
        raise ValueError(f"cannot write scenes to {root}: {error}") from error
    return Path(root)


def _check_settings(num_images: int, size: tuple[int, int], seed: int, labels: Sequence[str]) -> dict[str, Any]:
    """The settings as the manifest holds them, or a ValueError."""
    if num_images <= 0:
        raise ValueError(f"num_images is {num_images}; it must be positive")
    check_size(size)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; it must be in [0, 2**32)")
    unknown = sorted(set(labels) - set(LABELS))
    if unknown:
        raise ValueError(f"unknown labels {unknown}; they are {list(LABELS)}")
    return {
        "version": GENERATOR_VERSION,
        "seed": int(seed),
        "size": [int(side) for side in size],
        "num_images": int(num_images),
        "labels": [label for label in LABELS if label in labels],
    }


def _is_complete(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the scenes are there; False if nothing is, and a ValueError if something else is."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        found, checksums = dict(manifest["scenes"]), dict(manifest["checksums"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{folder} exists, but has no valid {_MANIFEST}, so these are no generated scenes: choose another folder"
        ) from error
    differences = [f"{k} is {found.get(k)}, not {v}" for k, v in settings.items() if found.get(k) != v]
    if differences:
        raise ValueError(
            f"{folder} holds other scenes ({'; '.join(differences)}): choose another folder or name, or remove this one"
        )
    for name, checksum in checksums.items():
        if not (folder / name).is_file() or _checksum(folder / name) != checksum:
            raise ValueError(f"{folder / name} is missing or was changed: remove {folder} to generate it anew")
    return True


def _checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _generate(folder: Path, settings: dict[str, Any], num_workers: int, progress: bool) -> None:
    """Make the complete folder; the caller holds its lock."""
    prefix = f".{folder.name}.partial-"
    for stale in folder.parent.glob(glob.escape(prefix) + "*"):  # of killed generators: we hold the lock
        shutil.rmtree(stale)
    partial = folder.parent / (prefix + uuid.uuid4().hex)
    partial.mkdir()
    try:
        _write_split(partial, settings, num_workers, progress)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_split(folder: Path, settings: dict[str, Any], num_workers: int, progress: bool) -> None:
    labels, num_images = settings["labels"], settings["num_images"]
    subfolders = ["images", "annotations", *(label for label in ("panoptic", "sem_seg") if label in labels)]
    if "voc" in labels:
        subfolders += ["voc/Annotations", "voc/ImageSets/Main"]
    for subfolder in subfolders:
        (folder / subfolder).mkdir(parents=True)
    logger.info("Generating %d scenes of %d x %d px", num_images, *settings["size"])
    write = functools.partial(write_scene, folder=folder, settings=settings)
    records = list(_track(_map(write, num_images, num_workers), num_images, progress))
    write_indices(folder, settings, records)
    sample = {records[i]["image"]["file_name"] for i in (0, num_images // 2, num_images - 1)}
    files = [folder / "images" / name for name in sorted(sample)] + sorted((folder / "annotations").iterdir())
    checksums = {file.relative_to(folder).as_posix(): _checksum(file) for file in files}
    (folder / _MANIFEST).write_text(json.dumps({"scenes": settings, "checksums": checksums}, indent=2) + "\n")


def _map(write: Callable[[int], dict[str, Any]], num_images: int, num_workers: int) -> Iterator[dict[str, Any]]:
    """Apply `write` to every index, in order, in this process or in `num_workers` others."""
    if num_workers <= 1:
        yield from map(write, range(num_images))
        return
    # Not "fork", which copies the locks of OpenCV's threads but not the threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        yield from pool.map(write, range(num_images), chunksize=8)


def _track(records: Iterable[dict[str, Any]], total: int, progress: bool) -> Iterator[dict[str, Any]]:
    """Pass `records` on, with a progress bar or a log line every `LOG_PERIOD_S`."""
    if progress:
        yield from tqdm(records, total=total, unit="scene")
        return
    start = logged = time.monotonic()
    for done, record in enumerate(records, 1):
        yield record
        now = time.monotonic()
        if now - logged > LOG_PERIOD_S:
            logged = now
            logger.info("%d of %d scenes, ETA %.0f s", done, total, (now - start) / done * (total - done))
