"""Colours of the views on the model's device: the loader's workers draw what is to be done, the device does it.

    N  images    S  side of a view, pixels    L  length of a blur kernel, pixels

For machines whose GPUs outrun their processor cores. Crops, flips and region maps stay in the workers, which also draw all
random numbers, in the order in which they always do: whether the device works changes pixels by rounding only
(tests/data/test_device_augmentation.py states by how much), not the distribution.

`color_transforms.py` is the reference. Other than there, the three boxes of a blur are one kernel, without rounding between
them, and a hue is exactly Pillow's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.transforms.transform import NoOpTransform, Transform
from torch import Tensor

from ..structures import ViewBatch
from .color_transforms import (
    ColorJitterTransform,
    GaussianBlurTransform,
    GrayscaleTransform,
    SolarizeTransform,
    extended_box,
)

_OPERATIONS = ("brightness", "contrast", "saturation", "hue")  # their codes are 1, 2, 3, 4; 0 is none
_GRAYSCALE, _SIGMA, _THRESHOLD = 8, 9, 10  # after four pairs (code, value)
NUM_COLOR_VALUES = 11
_NO_SOLARIZATION = 256.0
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601


def encode_colors(transforms: Sequence[Transform]) -> Tensor:
    """Write down what is to be done to the colours of one view.

    Args:
        transforms: those of `augmentation.build_view_augmentations`, drawn, in their order.

    Returns:
        (11,) float32: four times (code of an operation of the jitter, value), whether grey, sigma of the blur (0: none),
        threshold of the solarisation (256: none).
    """
    values = [0.0] * NUM_COLOR_VALUES
    values[_THRESHOLD] = _NO_SOLARIZATION
    for transform in transforms:
        if isinstance(transform, ColorJitterTransform):
            for i, (name, value) in enumerate(transform.operations):
                values[2 * i : 2 * i + 2] = [1.0 + _OPERATIONS.index(name), value]
        elif isinstance(transform, GrayscaleTransform):
            values[_GRAYSCALE] = 1.0
        elif isinstance(transform, GaussianBlurTransform):
            values[_SIGMA] = transform.sigma
        elif isinstance(transform, SolarizeTransform):
            values[_THRESHOLD] = transform.threshold
        else:
            assert isinstance(transform, NoOpTransform), transform
    return torch.tensor(values, dtype=torch.float32)


def finish_colors(view: ViewBatch, device: torch.device) -> ViewBatch:
    """Move a view to `device` and do there what its `colors` say; without them, move it only.

    Args:
        view: its `colors` are on the CPU, so that nothing waits for the device.
        device: of the model.

    Returns:
        The view with uint8 images and without `colors`.
    """
    if view.colors is None:
        return view.to(device)
    colors = view.colors
    moved = replace(view, colors=None).to(device)
    with torch.autocast(device.type, enabled=False):  # which would blur in half precision
        return replace(moved, images=apply_colors(moved.images, colors))


def apply_colors(images: Tensor, colors: Tensor) -> Tensor:
    """Change the colours of images, each in its own way.

    Args:
        images: (N, 3, S, S) uint8 RGB, on any device.
        colors: (N, 11) float32 of `encode_colors`, on the CPU.

    Returns:
        (N, 3, S, S) uint8, with the memory format of `images`.
    """
    pixels = images.float()
    for i in range(len(_OPERATIONS)):
        codes, values = colors[:, 2 * i], colors[:, 2 * i + 1]
        for code, name in enumerate(_OPERATIONS, start=1):
            rows = (codes == code).nonzero().flatten()
            _change(pixels, rows, _ADJUST[name], values[rows])
    _change(pixels, (colors[:, _GRAYSCALE] > 0).nonzero().flatten(), _to_grayscale)
    rows = (colors[:, _SIGMA] > 0).nonzero().flatten()
    _change(pixels, rows, _blur, colors[rows, _SIGMA])
    rows = (colors[:, _THRESHOLD] < _NO_SOLARIZATION).nonzero().flatten()
    _change(pixels, rows, _solarize, colors[rows, _THRESHOLD])
    return pixels.to(torch.uint8)


def _change(pixels: Tensor, rows: Tensor, function, values: Tensor | None = None) -> None:
    """Replace some images of (N, 3, S, S) in place by what `function(images, values)` makes of them.

    Args:
        pixels: on any device.
        rows, values: on the CPU.
    """
    if len(rows) == 0:
        return
    rows = rows.to(pixels.device, non_blocking=True)
    chosen = pixels.index_select(0, rows)
    pixels.index_copy_(0, rows, function(chosen) if values is None else function(chosen, values))


def _blend(images: Tensor, other: Tensor | float, factors: Tensor) -> Tensor:
    """factor * image + (1 - factor) * other, without the fraction, as Pillow."""
    factors = factors.to(images.device, non_blocking=True).view(-1, 1, 1, 1)
    return (factors * images + (1 - factors) * other).clamp_(0, 255).floor_()


def _adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    return _blend(images, 0.0, factors)


def _adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    means = (_to_grayscale(images)[:, :1].mean(dim=(2, 3), keepdim=True) + 0.5).floor()
    return _blend(images, means, factors)


def _adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    return _blend(images, _to_grayscale(images), factors)


def _adjust_hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Turn the colour circle by `shifts` turns; hue and saturation have Pillow's 256 steps."""
    steps = (shifts * 255).trunc().to(images.device, non_blocking=True).view(-1, 1, 1)
    value, _ = images.max(dim=1)
    chroma = value - images.min(dim=1).values
    red, green, blue = images.unbind(1)
    divisor = chroma.clamp(min=1)
    sextant = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = ((sextant / 6 % 1 * 255).floor() + steps) % 256 * (6 / 255)
    chroma = value * (255 * chroma / value.clamp(min=1)).floor() / 255
    # The distance on the circle from each channel's own hue tells how much of the colour it lacks.
    distances = [(offset + hue) % 6 for offset in (5, 3, 1)]
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in distances], dim=1).round_()


def _to_grayscale(images: Tensor) -> Tensor:
    red, green, blue = (weight * channel for weight, channel in zip(_LUMA, images.split(1, dim=1), strict=True))
    return (red + green + blue).round_().expand(-1, 3, -1, -1)


def _blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Blur each image by its own sigma, pixels; the border is repeated."""
    num_images, num_channels, height, width = images.shape
    kernels = _blur_kernels(sigmas.tolist()).to(images.device, non_blocking=True)
    reach = kernels.shape[1] // 2
    kernels = kernels.repeat_interleave(num_channels, dim=0)
    planes = images.reshape(1, num_images * num_channels, height, width)
    planes = F.conv2d(
        F.pad(planes, (0, 0, reach, reach), mode="replicate"), kernels[:, None, :, None], groups=planes.shape[1]
    )
    planes = F.conv2d(
        F.pad(planes, (reach, reach, 0, 0), mode="replicate"), kernels[:, None, None, :], groups=planes.shape[1]
    )
    return planes.view(images.shape).round_().clamp_(0, 255)


def _blur_kernels(sigmas: Sequence[float]) -> Tensor:
    """(n, L) float32: three extended boxes convolved, filled up with zeros to the longest kernel."""
    kernels = []
    for sigma in sigmas:
        box = extended_box(sigma)
        kernels.append(np.convolve(np.convolve(box, box), box))
    length = max(len(kernel) for kernel in kernels)
    padded = np.zeros((len(kernels), length), dtype=np.float32)
    for row, kernel in zip(padded, kernels, strict=True):
        start = (length - len(kernel)) // 2
        row[start : start + len(kernel)] = kernel
    return torch.from_numpy(padded)


def _solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    thresholds = thresholds.to(images.device, non_blocking=True).view(-1, 1, 1, 1)
    return torch.where(images < thresholds, images, 255 - images)


_ADJUST = {
    "brightness": _adjust_brightness,
    "contrast": _adjust_contrast,
    "saturation": _adjust_saturation,
    "hue": _adjust_hue,
}
