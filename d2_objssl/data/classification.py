"""The images of a classifier: INPUT.AUGMENTATION "classification".

Training: a random part of the image, resized to a square, and a flip. Tests: the shorter side resized, the centre cut out.
The sizes, 256 and 224 pixels, the parts and the flip are those of torchvision's recipe for ImageNet, which the linear
protocol of MoCo and the semi-supervised one of SimCLR share. Deviation: in training, resizing is bicubic, as in
pretraining, where torchvision's is bilinear.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from fvcore.transforms.transform import NoOpTransform, Transform

from .augmentation import FastHFlipTransform, ResizedCropTransform, sample_crop_boxes
from .center_crops import center_crop
from .finetune_augmentation import AUGMENTATION_REGISTRY


class RandomResizedCrop(T.Augmentation):
    """Cut out a random box and resize it to a square, as torchvision's RandomResizedCrop."""

    def __init__(self, size: int, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
        """
        Args:
            size: side of the result, pixels.
            scale: range of the box's share of the image's area.
            ratio: range of its width / height.
        """
        super().__init__()
        self.size, self.scale, self.ratio = size, scale, ratio

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        (box,) = sample_crop_boxes(height, width, num_views=1, scale=self.scale, ratio=self.ratio)
        x0, y0, x1, y1 = (int(v) for v in box)
        return ResizedCropTransform(x0, y0, x1 - x0, y1 - y0, self.size, height, width)


class RandomHFlip(T.Augmentation):
    """Flip horizontally with a probability."""

    def __init__(self, prob: float) -> None:
        super().__init__()
        self.prob = prob

    def get_transform(self, image: np.ndarray) -> Transform:
        return FastHFlipTransform(image.shape[1]) if np.random.uniform() < self.prob else NoOpTransform()


class ResizedCenterCrop(T.Augmentation):
    """Resize an image by its shorter side and cut out the central square; see `center_crop`."""

    def __init__(self, short_side: int, crop_size: int) -> None:
        """
        Args:
            short_side: of the resized image, pixels.
            crop_size: side of the square, pixels; at most `short_side`.
        """
        super().__init__()
        self.short_side, self.crop_size = short_side, crop_size

    def get_transform(self, image: np.ndarray) -> Transform:
        return center_crop(*image.shape[:2], short_side=self.short_side, crop_size=self.crop_size)


@AUGMENTATION_REGISTRY.register()
def classification(cfg: CfgNode, is_train: bool) -> dict[str, Any]:
    """Arguments of `DatasetMapper` by INPUT.CLASSIFICATION.

    Raises:
        ValueError: if images of tests would be smaller than what is cut out of them.
    """
    keys = cfg.INPUT.CLASSIFICATION
    if not 0 < keys.CROP_SIZE <= keys.TEST_SHORT_SIDE:
        raise ValueError(
            f"INPUT.CLASSIFICATION.CROP_SIZE is {keys.CROP_SIZE}; it must be positive and at most TEST_SHORT_SIDE, "
            f"{keys.TEST_SHORT_SIDE}"
        )
    augmentations: list[T.Augmentation]
    if is_train:
        crop = RandomResizedCrop(keys.CROP_SIZE, tuple(keys.CROP_SCALE), tuple(keys.CROP_RATIO))
        augmentations = [crop, RandomHFlip(keys.FLIP_PROB)]
    else:
        augmentations = [ResizedCenterCrop(keys.TEST_SHORT_SIDE, keys.CROP_SIZE)]
    return {"augmentations": augmentations, "recompute_boxes": False}
