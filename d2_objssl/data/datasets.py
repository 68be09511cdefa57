"""Data sets by name alone: any folder of images, and well-known unlabelled sets under DETECTRON2_DATASETS.

* `images:PATH` in DATASETS.TRAIN or DATASETS.TEST: every image below a folder, or matching a glob; nothing to register.
* `voc:PATH:SPLIT`: a labelled folder in Pascal VOC's layout, and `bccd_*`: see `data/voc_datasets.py`.
* `coco_2017_train_images`, `coco_2017_unlabeled_images` (both together are COCO+), `imagenet_1k_train_images`,
  `bdd100k_train_images`: catalog names relative to the dataset root.
* `scenes_*`: generated on first use, see `data/scenes.py`.
"""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from .bad_images import printable
from .classification_datasets import register_class_folders
from .scenes import register_all_scenes
from .voc_datasets import VOC_PREFIX, register_bccd, register_voc_folder

logger = logging.getLogger(__name__)

IMAGE_PREFIX = "images:"
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"))
_NUM_KINDS = 5  # of other files, that a message names

# name -> (folder below the dataset root, number of images of the complete set)
_IMAGE_SETS = {
    "coco_2017_train_images": ("coco/train2017", 118_287),
    "coco_2017_unlabeled_images": ("coco/unlabeled2017", 123_403),
    "coco_2017_val_images": ("coco/val2017", 5_000),
    "imagenet_1k_train_images": ("imagenet/train", 1_281_167),
    "bdd100k_train_images": ("bdd100k/images/100k/train", 70_000),
}


def list_images(path: str) -> list[str]:
    """List the image files below a folder, or those that a glob matches, sorted.

    Folders are searched recursively and links are followed, each real folder once. Files count by their suffix; what is
    hidden (".name") is left out. Whether they can be read is found out when they are: links that lead nowhere are listed.

    Raises:
        FileNotFoundError: if the folder does not exist or the glob matches nothing.
        NotADirectoryError: if the path is a file.
        ValueError: if there is no image of a known type.
    """
    root = os.path.expanduser(path)
    if glob.has_magic(root) and not os.path.exists(root):
        candidates = glob.glob(root, recursive=True)
        if not candidates:
            raise FileNotFoundError(f'No file matches "{path}" (DATASETS: "{IMAGE_PREFIX}{path}")')
        roots = [c for c in candidates if os.path.isdir(c)] if "**" not in path else []
        files = _without_repetitions(c for c in candidates if not os.path.isdir(c))
    else:
        if not os.path.exists(root):
            raise FileNotFoundError(f'The folder "{path}" does not exist (DATASETS: "{IMAGE_PREFIX}{path}")')
        if not os.path.isdir(root):
            raise NotADirectoryError(
                f'"{path}" is a file; DATASETS "{IMAGE_PREFIX}PATH" takes a folder or a glob like "{path}*"'
            )
        roots, files = [root], []
    visited: set[str] = set()
    for root in sorted(roots):
        files.extend(_walk(root, visited))
    images = sorted(f for f in files if Path(f).suffix.lower() in IMAGE_SUFFIXES)
    others = Counter(Path(f).suffix.lower() for f in files if Path(f).suffix.lower() not in IMAGE_SUFFIXES)
    if not images:
        raise ValueError(
            f'"{path}" holds {len(files)} file(s), but no image of a known type ({" ".join(sorted(IMAGE_SUFFIXES))})'
        )
    if others:
        kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in others.most_common(_NUM_KINDS))
        logger.info(
            "%s: %d other files are no images by their names: %s", printable(path), others.total(), printable(kinds)
        )
    return images


def _without_repetitions(files: Iterable[str]) -> list[str]:
    """Drop what loops of links show again: "**" goes round them some 40 times."""
    real: dict[str, str] = {}
    first: dict[tuple[str, str], str] = {}
    for file in sorted(files, key=lambda f: (f.count(os.sep), f)):
        folder, name = os.path.split(file)
        if folder not in real:
            real[folder] = os.path.realpath(folder)
        first.setdefault((real[folder], name), file)
    return list(first.values())


def _walk(root: str, visited: set[str]) -> list[str]:
    """Files below `root`; `visited` holds the real paths already seen, which breaks loops of links."""
    files: list[str] = []

    def fail(error: OSError) -> None:
        logger.warning("Cannot read the folder %s: %s", printable(str(error.filename)), error.strerror)

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        # In a fixed order: of the links to one folder, the same one must win every time.
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        files.extend(os.path.join(folder, n) for n in names if not n.startswith("."))
    return files


def load_images(path: str) -> list[dict[str, Any]]:
    """Dataset dicts ("file_name", "image_id") of `list_images(path)`."""
    files = list_images(path)
    logger.info("Found %d images in %s", len(files), printable(path))
    return [{"file_name": f, "image_id": i} for i, f in enumerate(files)]


def register_image_folders(names: Iterable[str]) -> None:
    """Enter every `images:PATH`, `voc:PATH:SPLIT` and `folders:PATH` of `names` into the catalogs, unless it is there."""
    names = list(names)
    register_class_folders(names)
    for name in names:
        if name.startswith(VOC_PREFIX):
            register_voc_folder(name)
        elif name.startswith(IMAGE_PREFIX) and name not in DatasetCatalog:
            path = name[len(IMAGE_PREFIX) :]
            if not path:
                raise ValueError(f'DATASETS names "{name}": a folder or a glob must follow "{IMAGE_PREFIX}"')
            DatasetCatalog.register(name, lambda path=path: load_images(path))
            MetadataCatalog.get(name).set(image_root=path, evaluator_type="none")


def _register_known_sets(root: str) -> None:
    for name, (folder, num_images) in _IMAGE_SETS.items():
        path = os.path.join(root, folder)
        DatasetCatalog.register(name, lambda path=path: load_images(path))
        MetadataCatalog.get(name).set(image_root=path, num_images=num_images, evaluator_type="none")


_root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
_register_known_sets(_root)
register_all_scenes(_root)
register_bccd(_root)
