"""Which classes each labelled image of a data set shows, and on which share of its area: measured once, kept in a file.

    H, W  size of the image as it is read, that is, after rotation by its EXIF orientation, pixels

Measuring reads every label, so the result is kept in a cache folder, never beside the user's images. It is made anew when
the labels change: other images, classes or ignored label, label files of another size or time, other annotations.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import file_lock
from PIL import Image

from ..parallel import map_in_processes
from ..weight_files import write_atomically
from .ground_truth import check_same_size, paint_objects, read_label_map, shape_of
from .image_reading import check_ordinary_file

logger = logging.getLogger(__name__)

_VERSION = 1  # raise it with any change to what is measured
_LOG_PERIOD_S = 5.0
_NUM_EXAMPLES = 5  # files that a message names
_ARRAYS = ("images", "classes", "is_instance", "shares")

ClassShare = tuple[bool, int, float]  # (of the annotations, class, share of the image's area)


@dataclass(frozen=True)
class LabelSet:
    """What the labels of a data set mean.

    Attributes:
        name: of the data set.
        source: which labels count: "sem_seg", "instances" or "both".
        stuff_classes: names by label of the label maps; None: unknown, every label is a class.
        thing_classes: names by category of the annotations; None: unknown.
        ignore_label: of the label maps; None: nothing is ignored.
    """

    name: str
    source: str
    stuff_classes: tuple[str, ...] | None
    thing_classes: tuple[str, ...] | None
    ignore_label: int | None

    def needs(self, key: str) -> bool:
        """Whether dataset dicts must have this key."""
        used = {"sem_seg": {"sem_seg_file_name"}, "instances": {"annotations"}}
        return key in used.get(self.source, {"sem_seg_file_name", "annotations"})


@dataclass(frozen=True)
class PairIndex:
    """A row for each image and each class in it, by image.

    Attributes:
        images: (P,) int64, number of the image in the data set.
        classes: (P,) int64, label or category.
        is_instance: (P,) bool, True where the class is a category of the annotations.
        shares: (P,) float64, share of the image's area, in (0, 1].
    """

    images: np.ndarray
    classes: np.ndarray
    is_instance: np.ndarray
    shares: np.ndarray


def load_pair_index(
    dataset_dicts: Sequence[dict[str, Any]], labels: LabelSet, *, cache_dir: str, num_workers: int = 0
) -> PairIndex:
    """Read the index of a data set from the cache; measure the labels where it is missing or out of date.

    Any number of processes may call this at once: one measures, the others wait.

    Args:
        dataset_dicts: as in Detectron2's catalog.
        labels: what they mean.
        cache_dir: folder of the index.
        num_workers: processes to measure with; 0 and 1: this one.

    Raises:
        ValueError: naming the file, for an image without labels, of another size than its labels, or with a class that
            the data set does not have.
        OSError: naming the file, if a label cannot be read or the cache not be written.
    """
    for key in ("sem_seg_file_name", "annotations"):
        missing = [d["file_name"] for d in dataset_dicts if labels.needs(key) and key not in d]
        if missing:
            raise ValueError(
                f'{labels.name} has {len(missing)} image(s) without "{key}", which INPUT.PAIRS.SOURCE "{labels.source}" '
                f"needs; the first: {missing[:_NUM_EXAMPLES]}"
            )
    os.makedirs(cache_dir, exist_ok=True)
    path = os.path.join(cache_dir, re.sub(r"[^\w.-]", "_", labels.name) + ".npz")
    with file_lock(path):
        digest = _digest(dataset_dicts, labels)
        index = _read(path, digest)
        if index is None:
            index = _measure_all(dataset_dicts, labels, num_workers)
            arrays = {name: getattr(index, name) for name in _ARRAYS}
            write_atomically(path, lambda file: np.savez(file, digest=np.array(digest), **arrays))
            logger.info("The index of %s is kept in %s", labels.name, path)
    return index


def _digest(dataset_dicts: Iterable[dict[str, Any]], labels: LabelSet) -> str:
    """A hash of all that the index depends on."""
    sha = hashlib.sha256(repr((_VERSION, labels)).encode())
    for d in dataset_dicts:
        sha.update(repr((d["file_name"], d.get("height"), d.get("width"))).encode())
        if labels.needs("sem_seg_file_name"):
            file = d["sem_seg_file_name"]
            stat = os.stat(file)
            sha.update(repr((file, stat.st_size, stat.st_mtime_ns)).encode())
        if labels.needs("annotations"):
            for annotation in d["annotations"]:
                shape = shape_of(annotation).get("segmentation")
                # A mask's text would leave out most of its pixels.
                shape_bytes = shape.tobytes() if isinstance(shape, np.ndarray) else repr(shape).encode()
                sha.update(repr(annotation["category_id"]).encode() + shape_bytes)
    return sha.hexdigest()


def _read(path: str, digest: str) -> PairIndex | None:
    """The index in this file; None if there is none, or one of other labels."""
    if not os.path.exists(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["digest"]) == digest:
                return PairIndex(**{name: file[name] for name in _ARRAYS})
        reason = "the labels have changed"
    except Exception as error:  # numpy's and zipfile's readers raise almost anything
        reason = f"it is damaged ({error})"
    logger.info("The index %s is made anew: %s", path, reason)
    return None


def _measure_all(dataset_dicts: Sequence[dict[str, Any]], labels: LabelSet, num_workers: int) -> PairIndex:
    measure = functools.partial(measure_image, labels=labels)
    images, rows = [], []
    for i, shares in enumerate(
        _track(map_in_processes(measure, dataset_dicts, num_workers, chunk_size=32), len(dataset_dicts), labels.name)
    ):
        images += [i] * len(shares)
        rows += shares
    return PairIndex(
        images=np.array(images, dtype=np.int64),
        classes=np.array([class_id for _, class_id, _ in rows], dtype=np.int64),
        is_instance=np.array([is_instance for is_instance, _, _ in rows], dtype=bool),
        shares=np.array([share for _, _, share in rows], dtype=np.float64),
    )


def _track(results: Iterable[list[ClassShare]], total: int, name: str) -> Iterator[list[ClassShare]]:
    """Pass the results on, with a log line every `_LOG_PERIOD_S`."""
    start = logged = time.monotonic()
    for done, result in enumerate(results, 1):
        yield result
        now = time.monotonic()
        if now - logged > _LOG_PERIOD_S:
            logged = now
            logger.info(
                "%s: labels of %d of %d images, ETA %.0f s", name, done, total, (now - start) / done * (total - done)
            )


def measure_image(dataset_dict: dict[str, Any], labels: LabelSet) -> list[ClassShare]:
    """Measure all classes of an image; none where its label is ignored throughout.

    Raises:
        ValueError, OSError: see `load_pair_index`.
    """
    size = _image_size(dataset_dict["file_name"])
    shares = []
    if labels.needs("sem_seg_file_name"):
        shares += _measure_label_map(dataset_dict, labels, size)
    if labels.needs("annotations"):
        shares += _measure_annotations(dataset_dict, labels, size)
    return shares


def _image_size(file_name: str) -> tuple[int, int] | None:
    """(H, W) from the header; None if it cannot be read, as the data loader will notice and count."""
    try:
        check_ordinary_file(file_name)
        with PathManager.open(file_name, "rb") as file, Image.open(file) as image:
            width, height = image.size
            return (width, height) if image.getexif().get(0x0112, 1) in range(5, 9) else (height, width)
    except Exception:  # Pillow's readers raise almost anything
        return None


def _measure_label_map(
    dataset_dict: dict[str, Any], labels: LabelSet, size: tuple[int, int] | None
) -> list[ClassShare]:
    file = dataset_dict["sem_seg_file_name"]
    label_map = read_label_map(file)
    if size is not None:
        check_same_size(f"The label map {file} of {dataset_dict['file_name']}", label_map.shape, size)
    classes, counts = np.unique(label_map, return_counts=True)
    shares = [
        (False, int(c), float(n / label_map.size))
        for c, n in zip(classes, counts, strict=True)
        if c != labels.ignore_label
    ]
    _check_classes((c for _, c, _ in shares), labels.stuff_classes, file, labels)
    return shares


def _measure_annotations(
    dataset_dict: dict[str, Any], labels: LabelSet, size: tuple[int, int] | None
) -> list[ClassShare]:
    file_name = dataset_dict["file_name"]
    by_class: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in dataset_dict["annotations"]:
        by_class[int(annotation["category_id"])].append(annotation)
        if "segmentation" not in shape_of(annotation):
            raise ValueError(f"{file_name} has an annotation without a segmentation; a pair needs the object's pixels")
    _check_classes(by_class, labels.thing_classes, f"An annotation of {file_name}", labels)
    if "height" in dataset_dict and "width" in dataset_dict:
        labelled = (dataset_dict["height"], dataset_dict["width"])
        if size is not None:
            check_same_size(f"The annotations of {file_name}", labelled, size)
        size = labelled
    if size is None:  # unreadable, and the data loader will say so
        return []
    return [
        (True, c, float((paint_objects(annotations, *size, file_name) > 0).mean()))
        for c, annotations in sorted(by_class.items())
    ]


def _check_classes(classes: Iterable[int], names: Sequence[str] | None, what: str, labels: LabelSet) -> None:
    unknown = sorted(c for c in classes if c < 0 or (names is not None and c >= len(names)))
    if unknown:
        known = "labels are not negative" if names is None else f"its {len(names)} classes are 0 to {len(names) - 1}"
        raise ValueError(
            f"{what} has the class {', '.join(map(str, unknown[:_NUM_EXAMPLES]))}, which {labels.name} does not have: "
            f"{known}, and it ignores {labels.ignore_label}"
        )
