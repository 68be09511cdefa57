"""Augmentation of semantic segmentation, INPUT.AUGMENTATION "sem_seg": random scale, random crop of one size, flip.

As in MMSegmentation and DeepLab, the scale is a factor of the image's size, and where the scaled image is smaller than the
crop, it is padded on the right and at the bottom: with the mean colour, which is 0 after normalisation, and with the label
that the loss ignores. In tests only the size changes.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from fvcore.transforms.transform import NoOpTransform, PadTransform, Transform

from .finetune_augmentation import AUGMENTATION_REGISTRY


class RandomScale(T.Augmentation):
    """Resize an image by a factor that is drawn uniformly."""

    def __init__(self, base_size: int, scale_range: tuple[float, float]) -> None:
        """
        Args:
            base_size: shorter side of the image at factor 1, pixels; 0: its own.
            scale_range: of the factor.
        """
        super().__init__()
        self.base_size, self.scale_range = base_size, scale_range

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        scale = np.random.uniform(*self.scale_range)
        if self.base_size:
            scale *= self.base_size / min(height, width)
        new_height, new_width = (max(round(side * scale), 1) for side in (height, width))
        return T.ResizeTransform(height, width, new_height, new_width)


class MeanPadTransform(PadTransform):
    """fvcore's padding, with a colour instead of one value for all channels."""

    def __init__(
        self, right: int, bottom: int, *, width: int, height: int, color: tuple[float, ...], label: int
    ) -> None:
        """
        Args:
            right, bottom: number of columns and rows that are added.
            width, height: of the image before.
            color: of new pixels, 0-255, in the image's order of channels.
            label: of new pixels.
        """
        super().__init__(0, 0, right, bottom, width, height, seg_pad_value=label)
        self.color = color

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return cv2.copyMakeBorder(img, 0, self.y1, 0, self.x1, cv2.BORDER_CONSTANT, value=self.color)


class PadToSize(T.Augmentation):
    """Pad an image that is smaller than a square on the right and at the bottom."""

    def __init__(self, size: int, color: tuple[float, ...], label: int) -> None:
        """
        Args:
            size: side of the square, pixels.
            color, label: see `MeanPadTransform`.
        """
        super().__init__()
        self.size, self.color, self.label = size, color, label

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        right, bottom = max(self.size - width, 0), max(self.size - height, 0)
        if right == bottom == 0:
            return NoOpTransform()
        return MeanPadTransform(right, bottom, width=width, height=height, color=self.color, label=self.label)


@AUGMENTATION_REGISTRY.register()
def sem_seg(cfg: CfgNode, is_train: bool) -> dict[str, Any]:
    """Arguments of `DatasetMapper` by INPUT.SEM_SEG, INPUT.RANDOM_FLIP and MODEL.SEM_SEG_HEAD.IGNORE_VALUE.

    Raises:
        ValueError: naming the key that is out of range.
    """
    keys = cfg.INPUT.SEM_SEG
    low, high = keys.SCALE_RANGE
    if not 0 < low <= high:
        raise ValueError(
            f"INPUT.SEM_SEG.SCALE_RANGE is {tuple(keys.SCALE_RANGE)}; it must be (low, high), 0 < low <= high"
        )
    if keys.CROP_SIZE < 1 or keys.BASE_SIZE < 0:
        raise ValueError(
            f"INPUT.SEM_SEG.CROP_SIZE is {keys.CROP_SIZE} and BASE_SIZE {keys.BASE_SIZE}; the one must be positive, the "
            "other positive or 0"
        )
    if cfg.INPUT.RANDOM_FLIP not in ("horizontal", "none"):
        raise ValueError(f'INPUT.RANDOM_FLIP is "{cfg.INPUT.RANDOM_FLIP}"; with "sem_seg" it is "horizontal" or "none"')
    if not is_train:
        return {"augmentations": [RandomScale(keys.BASE_SIZE, (1.0, 1.0))] if keys.BASE_SIZE else []}
    augmentations: list[T.Augmentation] = [
        RandomScale(keys.BASE_SIZE, (low, high)),
        PadToSize(keys.CROP_SIZE, tuple(cfg.MODEL.PIXEL_MEAN), cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE),
        T.RandomCrop("absolute", (keys.CROP_SIZE, keys.CROP_SIZE)),
    ]
    if cfg.INPUT.RANDOM_FLIP == "horizontal":
        augmentations.append(T.RandomFlip())
    return {"augmentations": augmentations, "recompute_boxes": False}
