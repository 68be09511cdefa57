"""Deterministic changes of an image's colours: jitter, greyscale, blur, solarisation. `augmentation.py` draws them.

Images are contiguous (H, W, 3) uint8 RGB arrays, in and out; no operation changes its input.

What the published pipelines do with Pillow is done here with OpenCV, faster and equal up to rounding. Mean absolute
difference from torchvision on Pillow images over photographs, in grey levels (tests/data/test_augmentation.py states
the bounds): brightness, contrast, saturation, greyscale and solarise 0.03 or less; hue 0.2; blur 0.3 (0.45 at a sigma
of exactly 1, where Pillow itself brightens the image by 0.4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from fvcore.transforms.transform import NoOpTransform, Transform

# Pillow's blends drop the fraction, OpenCV's round to nearest; a little less than a half keeps whole numbers whole.
_TRUNCATE = -0.499


class PhotometricTransform(Transform):
    """Base of the transforms that change pixel values only."""

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return (N, 2) points as they are."""
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Return a region map as it is."""
        return segmentation

    def inverse(self) -> Transform:
        """Nothing to undo: fvcore defines inverses of geometry only."""
        return NoOpTransform()


class ColorJitterTransform(PhotometricTransform):
    """Change brightness, contrast, saturation and hue, one after the other, as torchvision does on Pillow images."""

    def __init__(self, operations: Sequence[tuple[str, float]]) -> None:
        """
        Args:
            operations: ("brightness" | "contrast" | "saturation", factor, 1 changes nothing) or ("hue", shift in
                [-0.5, 0.5] turns of the colour circle), in the order of their application.
        """
        super().__init__()
        self.operations = tuple(operations)

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Change the colours of (H, W, 3) uint8 RGB."""
        for name, value in self.operations:
            img = _COLOR_OPERATIONS[name](img, value)
        return img


def _adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.addWeighted(image, factor, image, 0.0, _TRUNCATE)


def _adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return cv2.addWeighted(image, factor, image, 0.0, (1.0 - factor) * mean + _TRUNCATE)


def _adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.addWeighted(image, factor, _to_grayscale(image), 1.0 - factor, _TRUNCATE)


def _adjust_hue(image: np.ndarray, shift: float) -> np.ndarray:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    height, width = hsv.shape[:2]
    # Hue wraps around as uint8 does. Adding to whole rows is much faster than to one channel. One step less, because
    # OpenCV makes hue round(256 h), Pillow floor(255 h), and both read it as a 255th: this halves the difference.
    rows = hsv.reshape(height, 3 * width)
    rows += np.tile(np.array([(int(shift * 255) - 1) % 256, 0, 0], dtype=np.uint8), width)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _to_grayscale(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


_COLOR_OPERATIONS = {
    "brightness": _adjust_brightness,
    "contrast": _adjust_contrast,
    "saturation": _adjust_saturation,
    "hue": _adjust_hue,
}


class GrayscaleTransform(PhotometricTransform):
    """Remove the colours."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Return the luma (ITU-R 601) of (H, W, 3) uint8 RGB, three times."""
        return _to_grayscale(img)


class GaussianBlurTransform(PhotometricTransform):
    """Blur as Pillow's `GaussianBlur(sigma)`: with three box filters of fractional width, the border repeated.

    Their common reach is the kernel's truncation: 3 pixels up to a sigma of 1.41, 6 up to 2.83. OpenCV holds the
    weights in steps of 1/256, so that a sigma below 0.08 changes nothing.

    Source: Gwosdek et al., Theoretical Foundations of Gaussian Convolution by Extended Box Filtering, 2011.
    """

    def __init__(self, sigma: float) -> None:
        """
        Args:
            sigma: standard deviation, pixels.
        """
        super().__init__()
        self.sigma = sigma

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Blur (H, W, 3) uint8."""
        kernel = extended_box(self.sigma)
        for _ in range(3):
            img = cv2.sepFilter2D(img, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
        return img


def extended_box(sigma: float) -> np.ndarray:
    """(2r+3,) float32 symmetric weights that sum to 1: the box filter whose variance is a third of `sigma` squared."""
    variance = sigma * sigma / 3
    r = int((math.sqrt(12 * variance + 1) - 1) / 2)
    end = (2 * r + 1) * (r * (r + 1) - 3 * variance) / (6 * (variance - (r + 1) ** 2))
    width = 2 * r + 1 + 2 * end
    # Round to OpenCV's steps here, sums rather than terms: all weights must sum to 1, or the image changes brightness.
    sums = [0] + [round(256 * (end + i) / width) for i in range(r + 1)]
    half = [sums[i + 1] - sums[i] for i in range(r + 1)]
    return np.array([*half, 256 - 2 * sums[-1], *half[::-1]], dtype=np.float32) / 256


class SolarizeTransform(PhotometricTransform):
    """Invert the values from a threshold upwards."""

    def __init__(self, threshold: int = 128) -> None:
        """
        Args:
            threshold: the lowest value to invert, 0 to 256.
        """
        super().__init__()
        self.threshold = threshold

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Solarise (H, W, 3) uint8."""
        levels = np.arange(256, dtype=np.uint8)
        return cv2.LUT(img, np.where(levels < self.threshold, levels, 255 - levels))
