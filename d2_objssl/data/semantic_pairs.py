"""SemCL's data: pairs (anchor, not-anchor) made of images and semantic LABELS.

    H, W  size of the image as it is read, that is, after rotation by its EXIF orientation, pixels

Each (image, class) of which the class covers at least t of the image makes a pair (section 3.1 and Figure 2 of the
paper). The anchor shows the pixels of the class, the not-anchor all others; what they do not show is black. They are
composed when an image is read, so nothing is written but the index of `pair_index.py`.

The paper's "less than [sqrt(t) height] x [sqrt(t) width]" is taken as an area: share of the image < t.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts

from .ground_truth import check_same_size, paint_objects, read_label_map
from .pair_index import LabelSet, load_pair_index

logger = logging.getLogger(__name__)

# name -> (pairs, images) of the paper's Table 1
PAPER_COUNTS = {
    "voc_2012_trainaug_sem_seg": (14_203, 10_582),
    "cityscapes_fine_sem_seg_train": (20_280, 2_975),
    # The paper's ADE20K is the full data set, not the 20,210 images and 150 classes of the scene parsing challenge.
    "ade20k_sem_seg_train": (270_218, 25_574),
    "coco_2017_train_stuff_things_sem_seg": (712_212, 118_287),
    "coco_2017_train_panoptic_separated": (712_212, 118_287),
}


def load_pair_dicts(cfg: CfgNode) -> list[dict[str, Any]]:
    """List the pairs of DATASETS.TRAIN by INPUT.PAIRS, and log how many there are.

    Returns:
        A dict for each (image, class): "file_name", "image_id", "pair_class", and either "sem_seg_file_name" or
        "annotations", "height" and "width", the annotations being those of the class.

    Raises:
        ValueError: for a setting out of range, a data set without a pair, and see `pair_index.load_pair_index`.
    """
    pairs = cfg.INPUT.PAIRS
    if pairs.SOURCE not in ("sem_seg", "instances", "both"):
        raise ValueError(f'INPUT.PAIRS.SOURCE is "{pairs.SOURCE}"; it must be "none", "sem_seg", "instances" or "both"')
    if not 0 <= pairs.MIN_AREA < 1:
        raise ValueError(f"INPUT.PAIRS.MIN_AREA is {pairs.MIN_AREA}; it must be from 0 to below 1")
    found: list[dict[str, Any]] = []
    for name in cfg.DATASETS.TRAIN:
        found += _load_data_set(
            name,
            source=pairs.SOURCE,
            min_area=pairs.MIN_AREA,
            skip_classes=pairs.SKIP_CLASSES,
            cache_dir=pairs.CACHE_DIR or os.path.join(cfg.OUTPUT_DIR, "pair_index"),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )
    return found


def _load_data_set(
    name: str, *, source: str, min_area: float, skip_classes: Sequence[str], cache_dir: str, num_workers: int
) -> list[dict[str, Any]]:
    dicts = get_detection_dataset_dicts(name, filter_empty=False, check_consistency=False)
    metadata = MetadataCatalog.get(name)
    stuff, things = (metadata.get(key) for key in ("stuff_classes", "thing_classes"))
    labels = LabelSet(
        name=name,
        source=source,
        stuff_classes=None if stuff is None else tuple(stuff),
        thing_classes=None if things is None else tuple(things),
        ignore_label=metadata.get("ignore_label"),
    )
    index = load_pair_index(dicts, labels, cache_dir=cache_dir, num_workers=num_workers)
    skipped = [i for i, class_name in enumerate(labels.stuff_classes or ()) if class_name in skip_classes]
    is_skipped = ~index.is_instance & np.isin(index.classes, skipped)
    is_small = index.shares < min_area
    chosen = np.flatnonzero(~is_skipped & ~is_small)
    num_pairs, num_empty = len(chosen), len(dicts) - len(np.unique(index.images))
    logger.info(
        "%s: %d pairs (image, class) of %d images%s. Left out: %d with less than %g of the image's area, %d of the "
        "classes %s, %d image(s) without any label or with an ignored label throughout",
        *(name, num_pairs, len(dicts), _compare_with_paper(name)),
        *((is_small & ~is_skipped).sum(), min_area, is_skipped.sum(), tuple(skip_classes), num_empty),
    )
    if num_pairs == 0:
        raise ValueError(
            f"{name} has no pair: no class of its {len(dicts)} images covers {min_area} of an image "
            "(INPUT.PAIRS.MIN_AREA) and is none of INPUT.PAIRS.SKIP_CLASSES"
        )
    rows = zip(index.images[chosen].tolist(), index.classes[chosen].tolist(), index.is_instance[chosen], strict=True)
    return [_pair_dict(dicts[i], class_id, is_instance) for i, class_id, is_instance in rows]


def _compare_with_paper(name: str) -> str:
    if name not in PAPER_COUNTS:
        return ""
    return " (paper: {:,} pairs of {:,} images)".format(*PAPER_COUNTS[name])


def _pair_dict(dataset_dict: dict[str, Any], class_id: int, is_instance: bool) -> dict[str, Any]:
    keys = ("file_name", "image_id", *(("height", "width") if is_instance else ("sem_seg_file_name",)))
    pair = {k: dataset_dict[k] for k in keys if k in dataset_dict}
    if is_instance:
        objects = [a for a in dataset_dict["annotations"] if a["category_id"] == class_id]
        pair["annotations"] = [{"segmentation": a["segmentation"]} for a in objects]
    return {**pair, "pair_class": class_id}


def read_pair_mask(pair_dict: dict[str, Any], height: int, width: int) -> np.ndarray:
    """The pixels of the class of a pair.

    Args:
        pair_dict: from `load_pair_dicts`.
        height, width: H, W.

    Returns:
        (H, W) bool.

    Raises:
        ValueError: naming the file, if the label is of another size than the image.
    """
    file_name = pair_dict["file_name"]
    if "sem_seg_file_name" in pair_dict:
        label_map = read_label_map(pair_dict["sem_seg_file_name"])
        what = f"The label map {pair_dict['sem_seg_file_name']} of {file_name}"
        check_same_size(what, label_map.shape, (height, width))
        return label_map == pair_dict["pair_class"]
    labelled = (pair_dict.get("height", height), pair_dict.get("width", width))
    check_same_size(f"The annotations of {file_name}", labelled, (height, width))
    return paint_objects(pair_dict["annotations"], height, width, file_name) > 0


def compose_pair(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut an image into an object and its surroundings, on black.

    Args:
        image: (H, W, 3) uint8.
        mask: (H, W) bool, the object.

    Returns:
        anchor, not_anchor: (H, W, 3) uint8; they add up to the image.
    """
    anchor = image * mask[:, :, None]
    return anchor, image - anchor
