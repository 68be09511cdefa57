"""From an image to augmented views, on uint8 from end to end.

    H, W  size of the image, pixels    S  side of a view, pixels    V  views of an image    R  stacked region maps

A view is made in the order crop, flip, colour jitter, greyscale, blur, solarise; `color_transforms.py` has the last
four. Images are contiguous (H, W, 3) uint8 RGB arrays, in and out; no operation changes its input. Boxes are XYXY_ABS,
continuous coordinates. Randomness comes from the global `numpy.random` alone, as in Detectron2's own augmentations, so
that a data loader can seed it.

What the published pipelines do with Pillow is done here with OpenCV and PyTorch, several times faster and equal up to
rounding. The crop's mean absolute difference from torchvision on Pillow images over photographs is 0.03 grey levels
(tests/data/test_augmentation.py states the bound); `color_transforms.py` has those of the colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from detectron2.data.transforms import Augmentation
from fvcore.transforms.transform import (
    HFlipTransform,
    NoOpTransform,
    PadTransform,
    ScaleTransform,
    Transform,
    TransformList,
)

from .color_transforms import ColorJitterTransform, GaussianBlurTransform, GrayscaleTransform, SolarizeTransform

# --- Geometry ----------------------------------------------------------------------------------------------------


def sample_crop_boxes(
    height: int,
    width: int,
    *,
    num_views: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    min_overlap: float = 0.01,
    num_tries: int = 10,
    same_crop: bool = False,
) -> np.ndarray:
    """Draw the crops of an image's views, distributed as those of torchvision's RandomResizedCrop.

    Args:
        height, width: of the image.
        num_views: V.
        scale: range of a crop's share of the image's area (uniform).
        ratio: range of a crop's width / height (log-uniform).
        min_overlap: share of its own area that a later crop has in common with the first one...
        num_tries: ...if this many draws suffice; after them the next draw is taken as it is.
        same_crop: all views get the first crop.

    Returns:
        (V, 4) int64, XYXY_ABS: whole pixels inside the image.

    Source: SlotCon, official settings; the first crop is unconditional.
    """
    boxes = [_sample_crop_box(height, width, scale, ratio)]
    for _ in range(1, num_views):
        if same_crop:
            boxes.append(boxes[0])
            continue
        for _ in range(num_tries):
            box = _sample_crop_box(height, width, scale, ratio)
            if _covered_share(box, boxes[0]) >= min_overlap:
                break
        else:
            box = _sample_crop_box(height, width, scale, ratio)
        boxes.append(box)
    return np.array(boxes, dtype=np.int64)


def _sample_crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw one crop, XYXY_ABS; where ten draws exceed the image, take its largest central part of legal ratio."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        # One call for four numbers: scalar draws from numpy take as long as some of the image operations.
        u_area, u_aspect, u_x, u_y = np.random.random(4).tolist()
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u_area)
        aspect = math.exp(low + (high - low) * u_aspect)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x0, y0 = int((width - w + 1) * u_x), int((height - h + 1) * u_y)
            return x0, y0, x0 + w, y0 + h
    w = max(1, min(width, round(height * ratio[1])))
    h = max(1, min(height, round(width / ratio[0])))
    x0, y0 = (width - w) // 2, (height - h) // 2
    return x0, y0, x0 + w, y0 + h


def _covered_share(box: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """Share of the area of `box` that lies in `other`."""
    w = min(box[2], other[2]) - max(box[0], other[0])
    h = min(box[3], other[3]) - max(box[1], other[1])
    return max(w, 0) * max(h, 0) / ((box[2] - box[0]) * (box[3] - box[1]))


class ResizedCropTransform(Transform):
    """Crop a box of whole pixels and resize it to a square: bicubic with antialiasing, as Pillow; maps by nearest."""

    def __init__(self, x0: int, y0: int, w: int, h: int, size: int, orig_h: int, orig_w: int) -> None:
        """
        Args:
            x0, y0, w, h: the crop, pixels of the image, inside it.
            size: S, side of the result.
            orig_h, orig_w: size of the image.
        """
        super().__init__()
        assert 0 <= x0 < x0 + w <= orig_w and 0 <= y0 < y0 + h <= orig_h, (x0, y0, w, h, orig_h, orig_w)
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Crop and resize (H, W, 3) uint8 to (S, S, 3) uint8."""
        assert img.dtype == np.uint8 and img.shape[:2] == (self.orig_h, self.orig_w), (img.dtype, img.shape)
        crop = img[self.y0 : self.y0 + self.h, self.x0 : self.x0 + self.w].copy()
        # The batch dimension first, then its order: strides that PyTorch takes for channels_last, its fast path.
        nchw = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)
        view = torch.nn.functional.interpolate(nchw, size=(self.size, self.size), mode="bicubic", antialias=True)
        return np.ascontiguousarray(view[0].permute(1, 2, 0).numpy())

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Sample region maps at the centres of the view's pixels.

        Args:
            segmentation: (H, W) or (H, W, R), any dtype. A map of another size is taken for a map of the whole image
                stored at lower resolution: the result is that of first enlarging it to (H, W) by nearest.

        Returns:
            (S, S) or (S, S, R) of the same dtype.
        """
        rows = self._nearest(self.y0, self.h, self.orig_h, segmentation.shape[0])
        columns = self._nearest(self.x0, self.w, self.orig_w, segmentation.shape[1])
        return segmentation.take(rows, axis=0).take(columns, axis=1)

    def _nearest(self, start: int, length: int, image_length: int, map_length: int) -> np.ndarray:
        """(S,) indices into one axis of a map; integers throughout, because a rounded centre may pick a neighbour."""
        pixels = start + (2 * np.arange(self.size) + 1) * length // (2 * self.size)
        return pixels if map_length == image_length else (2 * pixels + 1) * map_length // (2 * image_length)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Move (N, 2) points (x, y) from the image to the view."""
        return (coords - [self.x0, self.y0]) * [self.size / self.w, self.size / self.h]

    def inverse(self) -> TransformList:
        """Put the view back to its place, with zeros around it."""
        right, bottom = self.orig_w - self.x0 - self.w, self.orig_h - self.y0 - self.h
        return TransformList(
            [
                ScaleTransform(self.size, self.size, self.h, self.w),
                PadTransform(self.x0, self.y0, right, bottom, self.w, self.h),
            ]
        )


class FastHFlipTransform(HFlipTransform):
    """fvcore's horizontal flip, but the image comes back contiguous: the next operation need not copy it slowly."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Flip (H, W, 3) uint8."""
        return cv2.flip(img, 1)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Flip (H, W) or (H, W, R) of any dtype."""
        return np.ascontiguousarray(segmentation[:, ::-1])


# --- Colours: random augmentations -------------------------------------------------------------------------------


class ColorJitter(Augmentation):
    """Change brightness, contrast, saturation and hue in random order; distributed as torchvision's ColorJitter."""

    def __init__(self, brightness: float, contrast: float, saturation: float, hue: float, prob: float) -> None:
        """
        Args:
            brightness, contrast, saturation: b >= 0; the factor is uniform in [max(0, 1 - b), 1 + b].
            hue: h in [0, 0.5]; the shift is uniform in [-h, h].
            prob: probability of doing so.
        """
        super().__init__()
        for key, strength in (("BRIGHTNESS", brightness), ("CONTRAST", contrast), ("SATURATION", saturation)):
            _check_range(strength, 0, math.inf, f"INPUT.SSL.{key}")
        _check_range(hue, 0, 0.5, "INPUT.SSL.HUE")
        _check_range(prob, 0, 1, "INPUT.SSL.COLOR_JITTER_PROB")
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw factors and order."""
        if np.random.uniform() >= self.prob:
            return NoOpTransform()
        draws, ranks = np.random.random((2, 4)).tolist()
        factors = (
            ("brightness", max(0.0, 1.0 - self.brightness), 1.0 + self.brightness),
            ("contrast", max(0.0, 1.0 - self.contrast), 1.0 + self.contrast),
            ("saturation", max(0.0, 1.0 - self.saturation), 1.0 + self.saturation),
            ("hue", -self.hue, self.hue),
        )
        operations = [
            (rank, name, low + (high - low) * draw)
            for (name, low, high), draw, rank in zip(factors, draws, ranks, strict=True)
            if high > low
        ]
        return ColorJitterTransform([(name, value) for _, name, value in sorted(operations)])


class RandomGrayscale(Augmentation):
    """Remove the colours of some images."""

    def __init__(self, prob: float) -> None:
        """
        Args:
            prob: probability of doing so.
        """
        super().__init__()
        _check_range(prob, 0, 1, "INPUT.SSL.GRAYSCALE_PROB")
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw whether."""
        return GrayscaleTransform() if np.random.uniform() < self.prob else NoOpTransform()


class RandomGaussianBlur(Augmentation):
    """Blur some images."""

    def __init__(self, prob: float, sigma_min: float = 0.1, sigma_max: float = 2.0) -> None:
        """
        Args:
            prob: probability of doing so.
            sigma_min, sigma_max: range of the standard deviation, pixels (uniform).
        """
        super().__init__()
        _check_range(prob, 0, 1, "INPUT.SSL.BLUR_PROB")
        _check_range(sigma_min, 0, sigma_max, "INPUT.SSL.BLUR_SIGMA[0]")
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw whether, and how much."""
        if np.random.uniform() >= self.prob:
            return NoOpTransform()
        return GaussianBlurTransform(np.random.uniform(self.sigma_min, self.sigma_max))


class RandomSolarize(Augmentation):
    """Invert the bright values of some images."""

    def __init__(self, prob: float, threshold: int = 128) -> None:
        """
        Args:
            prob: probability of doing so.
            threshold: the lowest value to invert.
        """
        super().__init__()
        _check_range(prob, 0, 1, "INPUT.SSL.SOLARIZE_PROB")
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw whether."""
        return SolarizeTransform(self.threshold) if np.random.uniform() < self.prob else NoOpTransform()


def build_view_augmentations(
    *,
    num_views: int,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    jitter_prob: float,
    grayscale_prob: float,
    blur_probs: Sequence[float],
    blur_sigma: tuple[float, float],
    solarize_probs: Sequence[float],
) -> list[list[Augmentation]]:
    """Build what happens to the colours of each view after crop and flip.

    Args:
        num_views: V.
        brightness, contrast, saturation, hue, jitter_prob: see `ColorJitter`.
        grayscale_prob: probability of greyscale.
        blur_probs: V probabilities of blur.
        blur_sigma: range of its standard deviation, pixels.
        solarize_probs: V probabilities of solarisation.

    Returns:
        V lists, in the order of application.
    """
    for key, values in (("BLUR_PROB", blur_probs), ("SOLARIZE_PROB", solarize_probs)):
        if len(values) != num_views:
            raise ValueError(
                f"INPUT.SSL.{key} has {len(values)} values {list(values)}, but there are {num_views} views"
            )
    return [
        [
            ColorJitter(brightness, contrast, saturation, hue, jitter_prob),
            RandomGrayscale(grayscale_prob),
            RandomGaussianBlur(blur_prob, *blur_sigma),
            RandomSolarize(solarize_prob),
        ]
        for blur_prob, solarize_prob in zip(blur_probs, solarize_probs, strict=True)
    ]


def _check_range(value: float, low: float, high: float, key: str) -> None:
    if not low <= value <= high:
        raise ValueError(f"{key} is {value}; it must be from {low} to {high}")
