"""What is checked about data sets before a run: their names, that their files are there, and their sizes.

A registration says how many images its complete set has by `MetadataCatalog.get(name).num_images = N`. Below this is done
for the sets of Detectron2 that the configs use.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from .datasets import IMAGE_PREFIX

logger = logging.getLogger(__name__)

_NUM_IMAGES = {
    "coco_2014_train": 82_783,
    "coco_2014_val": 40_504,
    "coco_2017_train": 118_287,
    "coco_2017_val": 5_000,
    "lvis_v1_train": 100_170,
    "lvis_v1_val": 19_809,
    "voc_2007_train": 2_501,
    "voc_2007_val": 2_510,
    "voc_2007_trainval": 5_011,
    "voc_2007_test": 4_952,
    "voc_2012_train": 5_717,
    "voc_2012_val": 5_823,
    "voc_2012_trainval": 11_540,
    "cityscapes_fine_instance_seg_train": 2_975,
    "cityscapes_fine_instance_seg_val": 500,
    "cityscapes_fine_sem_seg_train": 2_975,
    "cityscapes_fine_sem_seg_val": 500,
}
# Entries of the metadata that are files or folders.
_PATHS = (
    "json_file", "panoptic_json", "list_file", "sem_seg_root", "panoptic_root", "gt_dir", "image_root", "image_dir",
    "depth_root", "camera_root",
)  # fmt: skip


def expected_size(metadata: Metadata) -> int | None:
    """Number of images of the complete data set; None where its registration does not say."""
    return metadata.get("num_images")


def check_datasets(names: Iterable[str], key: str) -> None:
    """Check that data sets are registered and that the files and folders that they are registered with are there.

    Folders of images (`images:PATH`) and sets that are generated on first use (metadata `generated`) are left out.

    Args:
        names: data sets.
        key: of the config, for the message, e.g. "DATASETS.TEST".

    Raises:
        ValueError: for a name that is not in the catalog.
        FileNotFoundError: if files or folders are missing.
    """
    for name in names:
        if name.startswith(IMAGE_PREFIX):
            continue
        if name not in DatasetCatalog:
            similar = difflib.get_close_matches(name, DatasetCatalog.list())
            hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
            raise ValueError(f'{key} names "{name}", which is no registered data set{hint}')
        metadata = MetadataCatalog.get(name)
        if metadata.get("generated", False):
            continue
        missing = [path for path in _required_paths(metadata) if "://" not in path and not os.path.exists(path)]
        if missing:
            raise FileNotFoundError(
                f'{key} names "{name}", but there is no {" and no ".join(missing)}: put the data set there, or set the '
                "environment variable DETECTRON2_DATASETS to the folder that holds it"
            )


def _required_paths(metadata: Metadata) -> list[str]:
    paths = [metadata.get(entry) for entry in _PATHS]
    if metadata.get("dirname") and metadata.get("split"):  # the layout of Pascal VOC
        folder = metadata.dirname
        paths += [os.path.join(folder, "Annotations"), os.path.join(folder, "JPEGImages")]
        paths.append(os.path.join(folder, "ImageSets", "Main", f"{metadata.split}.txt"))
    return [path for path in paths if path]


def check_size(name: str, num_images: int, *, require_complete: bool) -> None:
    """Compare the number of images of a data set, before images are filtered, with that of the complete set.

    Raises:
        ValueError: if they differ and `require_complete` (DATASETS.REQUIRE_COMPLETE); otherwise this is a warning.
    """
    expected = expected_size(MetadataCatalog.get(name))
    if expected is None or expected == num_images:
        return
    message = f'"{name}" has {num_images:,} images here, the complete set has {expected:,}'
    if require_complete:
        raise ValueError(f"{message} (DATASETS.REQUIRE_COMPLETE is True)")
    logger.warning("%s: results are not comparable with those of others.", message)


def _set_known_sizes() -> None:
    for name, num_images in _NUM_IMAGES.items():
        MetadataCatalog.get(name).num_images = num_images


_set_known_sizes()
