"""Labels of a data set as maps of an image's pixels.

    H, W  size of the image as it is read, that is, after rotation by its EXIF orientation, pixels

Detectron2 takes labels to be in the frame of the rotated image, and so do we; a map of another size is an error, never
resized.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from detectron2.structures.masks import polygons_to_bitmask
from pycocotools import mask as coco_mask

from ..proposals import boxes_to_bits
from .image_reading import check_ordinary_file


def shape_of(annotation: dict[str, Any]) -> dict[str, Any]:
    """What of an annotation tells the pixels of its object: the segmentation, else the box; empty if it has neither."""
    segmentation = annotation.get("segmentation")
    if segmentation is not None and len(segmentation) > 0:
        return {"segmentation": segmentation}
    return {k: annotation[k] for k in ("bbox", "bbox_mode") if k in annotation}


def paint_objects(annotations: Sequence[dict[str, Any]], height: int, width: int, file_name: str) -> np.ndarray:
    """Paint the objects of an image over each other by descending area, so that the small ones are on top.

    Args:
        annotations: as in a dataset dict; a segmentation is polygons, a run-length encoding, or an (H, W) mask.
        height, width: H, W.
        file_name: of the image, for messages.

    Returns:
        (H, W) int32: i + 1 where annotation i is on top, 0 where there is none.

    Raises:
        ValueError: if a mask is not (H, W).
    """
    masks = [object_mask(shape_of(a), height, width, file_name) for a in annotations]
    region_map = np.zeros((height, width), dtype=np.int32)
    for i in sorted(range(len(masks)), key=lambda i: -np.count_nonzero(masks[i])):
        np.copyto(region_map, i + 1, where=masks[i])
    return region_map


def object_mask(shape: dict[str, Any], height: int, width: int, file_name: str) -> np.ndarray:
    """Find the pixels of an object.

    Args:
        shape: what `shape_of` returned, not empty.
        height, width: H, W.
        file_name: of the image, for messages.

    Returns:
        (H, W) bool.

    Raises:
        ValueError: if the segmentation is a mask of another size.
    """
    if "segmentation" not in shape:
        box = BoxMode.convert(list(shape["bbox"]), shape["bbox_mode"], BoxMode.XYXY_ABS)
        return boxes_to_bits([box], height, width) > 0
    segmentation = shape["segmentation"]
    if isinstance(segmentation, list):
        return polygons_to_bitmask(segmentation, height, width)
    if isinstance(segmentation, dict):  # COCO's run-length encoding
        if isinstance(segmentation["counts"], list):
            segmentation = coco_mask.frPyObjects(segmentation, *segmentation["size"])
        segmentation = coco_mask.decode(segmentation)
    check_same_size(f"A mask among the annotations of {file_name}", segmentation.shape, (height, width))
    return segmentation.astype(bool)


def read_label_map(file: str) -> np.ndarray:
    """Read a label map as it is stored, palette indices and 16 bits included.

    Returns:
        (h, w) int32, after rotation by its own EXIF orientation.

    Raises:
        OSError: naming the file, if it is missing or damaged.
        ValueError: if it does not hold one integer a pixel.
    """
    try:
        check_ordinary_file(file)
        labels = read_image(file)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything, and without the file's name
        raise OSError(f"{file}: cannot read this label map: {error}") from error
    if labels.ndim != 2 or labels.dtype.kind not in "bui":
        raise ValueError(
            f"{file} is no label map: it has the shape {labels.shape} and type {labels.dtype}, not one integer a pixel"
        )
    return labels.astype(np.int32)


def find_unknown_labels(labels: np.ndarray, num_classes: int, ignore_label: int) -> list[int]:
    """Labels of a map, of any shape, that are neither classes (0 to num_classes - 1) nor the ignored one: the first ten."""
    is_unknown = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_label)
    return np.unique(labels[is_unknown]).tolist()[:10] if is_unknown.any() else []


def check_same_size(what: str, found: Sequence[int], expected: Sequence[int]) -> None:
    """Refuse labels that are not those of the image.

    Args:
        what: the labels and their image, for the message.
        found: (height, width) of the labels.
        expected: (H, W).
    """
    if tuple(found) != tuple(expected):
        raise ValueError(
            f"{what}: the size is {found[0]} x {found[1]} (height x width), but that of the image is "
            f"{expected[0]} x {expected[1]}, after rotation by its EXIF orientation"
        )
