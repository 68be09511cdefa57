"""Whole images, and their label maps, as squares of one size that can be batched.

S  side of the square, pixels
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from fvcore.transforms.transform import CropTransform, TransformList
from torch import Tensor
from torch.utils.data import Dataset

from .ground_truth import check_same_size, read_label_map
from .image_reading import read_rgb_image

IGNORED_CLASS = 255  # of the pixels of a class map that do not count


class CenterCrops(Dataset):
    """Images resized by their shorter side, of which the central square is cut out.

    An item is a dict with "index", its place in the data set, "image" (3, S, S) uint8 RGB, and, where there are labels,
    "classes" (S, S) uint8, resized to the nearest pixel and cut out in the same place.
    """

    def __init__(
        self,
        dataset_dicts: Sequence[dict[str, Any]],
        *,
        short_side: int,
        crop_size: int,
        class_of_label: Mapping[int, int] | None = None,
    ) -> None:
        """
        Args:
            dataset_dicts: with "file_name" and, for label maps, "sem_seg_file_name".
            short_side: of the resized image, pixels.
            crop_size: S.
            class_of_label: see `read_class_map`; None: no labels are read.

        Raises:
            ValueError: if the square is larger than the shorter side.
        """
        if crop_size > short_side:
            raise ValueError(f"a crop of {crop_size} pixels does not fit into a short side of {short_side}")
        self.dataset_dicts = dataset_dicts
        self.short_side = short_side
        self.crop_size = crop_size
        self.class_of_label = class_of_label

    def __len__(self) -> int:
        return len(self.dataset_dicts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        d = self.dataset_dicts[index]
        image = read_rgb_image(d["file_name"])
        transforms = center_crop(*image.shape[:2], short_side=self.short_side, crop_size=self.crop_size)
        item = {"index": index, "image": _to_tensor(transforms.apply_image(image).transpose(2, 0, 1))}
        if self.class_of_label is not None:
            classes = read_class_map(d["sem_seg_file_name"], self.class_of_label)
            check_same_size(f"{d['sem_seg_file_name']}, labels of {d['file_name']}", classes.shape, image.shape[:2])
            item["classes"] = _to_tensor(transforms.apply_segmentation(classes))
        return item


def center_crop(height: int, width: int, *, short_side: int, crop_size: int) -> TransformList:
    """The transforms of an image of `height` x `width` pixels: resize it, keeping its ratio, then cut out its centre."""
    new_height, new_width = T.ResizeShortestEdge.get_output_shape(height, width, short_side, sys.maxsize)
    x0, y0 = (new_width - crop_size) // 2, (new_height - crop_size) // 2
    resize = T.ResizeTransform(height, width, new_height, new_width)
    return TransformList([resize, CropTransform(x0, y0, crop_size, crop_size, new_width, new_height)])


def read_class_map(file: str, class_of_label: Mapping[int, int]) -> np.ndarray:
    """Read a label map as a map of classes.

    Args:
        file: as in `read_label_map`.
        class_of_label: the class, below 255, of each label; IGNORED_CLASS for labels that do not count.

    Returns:
        (H, W) uint8 classes, IGNORED_CLASS where the pixel does not count.

    Raises:
        ValueError: naming the file, if it has a label that `class_of_label` does not know.
    """
    labels = read_label_map(file)
    unknown = sorted(set(np.unique(labels).tolist()) - class_of_label.keys())
    if unknown:
        raise ValueError(f"{file} has the label {unknown[0]}, which belongs to no class of the data set")
    lookup = np.full(max(class_of_label) + 1, IGNORED_CLASS, dtype=np.uint8)
    for label, value in class_of_label.items():
        lookup[label] = value
    return lookup[labels]


def _to_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy(order="C"))  # Pillow's arrays are read-only
