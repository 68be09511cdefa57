"""Felzenszwalb and Huttenlocher's segmentation, compiled by numba: what scikit-image computes, several times faster.

    H, W  height and width of the image, pixels    E  edges between neighbours, about 4 H W

The steps are those of `skimage.segmentation.felzenszwalb`, which is the reference: smooth, weigh the edges of the
8-connected pixel grid by the Euclidean distance of colours, merge along edges in the order of their weights, merge what is
too small. What differs: single instead of double precision, and the order of edges of equal weight. Both change a few
regions' borders in some images: tests/test_fast_felzenszwalb.py states how few.

Source: P. Felzenszwalb, D. Huttenlocher, "Efficient Graph-Based Image Segmentation", IJCV 2004.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numba import njit

_SMOOTHING_RADIUS = 4.0  # standard deviations, as scipy.ndimage.gaussian_filter
_RADIX_BITS = 11  # the 32 bits of a weight are sorted in three passes


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile at the first call, once for all processes: beside this file or in the user's cache, if one can be written."""

    def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(function, cache=True, **options)
        except RuntimeError:  # neither can be
            return njit(function, **options)

    return compile_function


def felzenszwalb(image: np.ndarray, scale: float, sigma: float, min_size: int) -> np.ndarray:
    """Segment an image.

    Args:
        image: (H, W, 3) uint8.
        scale: the larger it is, the larger are the regions; of weights in 0-255.
        sigma: standard deviation of the smoothing, pixels.
        min_size: regions of fewer pixels are merged into a neighbour.

    Returns:
        (H, W) int32 ids without gaps, in the order of the regions' first pixels.
    """
    height, width = image.shape[:2]
    side = 2 * int(_SMOOTHING_RADIUS * sigma + 0.5) + 1
    smooth = cv2.GaussianBlur(image.astype(np.float32) / 255, (side, side), sigma, borderType=cv2.BORDER_REFLECT)
    weights, edges = _sort(*_weigh(smooth))
    parents = _merge(weights.view(np.float32), edges, width, np.float32(scale / 255), min_size, height * width)
    return _number(parents).reshape(height, width)


@_compiled(fastmath=True)
def _weigh(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weigh the edges of every pixel to its neighbours: right, below, below right, above right.

    Returns:
        weights: (E,) uint32, the bits of float32 values that are not negative: they sort alike.
        edges: (E,) int32, 4 times the position of the pixel in the flattened image plus the neighbour's number.
    """
    height, width, _ = image.shape
    count = height * (width - 1) + (height - 1) * width + 2 * (height - 1) * (width - 1)
    weights = np.empty(count, np.float32)
    edges = np.empty(count, np.int32)
    e = 0
    for neighbour, (dy, dx) in enumerate(((0, 1), (1, 0), (1, 1), (-1, 1))):
        for y in range(max(0, -dy), height - max(0, dy)):
            for x in range(width - dx):
                r = image[y, x, 0] - image[y + dy, x + dx, 0]
                g = image[y, x, 1] - image[y + dy, x + dx, 1]
                b = image[y, x, 2] - image[y + dy, x + dx, 2]
                weights[e] = math.sqrt(r * r + g * g + b * b)
                edges[e] = 4 * (y * width + x) + neighbour
                e += 1
    return weights.view(np.uint32), edges


@_compiled()
def _sort(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort (E,) uint32 keys and, with them, (E,) int32 values; stable, by radix; the arguments are overwritten."""
    keys_to, values_to = np.empty_like(keys), np.empty_like(values)
    mask = np.uint32((1 << _RADIX_BITS) - 1)
    for shift in range(0, 32, _RADIX_BITS):
        positions = np.zeros((1 << _RADIX_BITS) + 1, np.int64)
        for key in keys:
            positions[((key >> np.uint32(shift)) & mask) + np.uint32(1)] += 1
        for digit in range(1 << _RADIX_BITS):
            positions[digit + 1] += positions[digit]
        for i in range(keys.size):
            digit = (keys[i] >> np.uint32(shift)) & mask
            position = positions[digit]
            positions[digit] = position + 1
            keys_to[position], values_to[position] = keys[i], values[i]
        keys, keys_to = keys_to, keys
        values, values_to = values_to, values
    return keys, values


@_compiled(inline="always")
def _find(parents: np.ndarray, pixel: np.int32) -> np.int32:
    """Root of a pixel's tree; halves the path to it."""
    parent = parents[pixel]
    while parent != pixel:
        grandparent = parents[parent]
        parents[pixel] = grandparent
        pixel = grandparent
        parent = parents[pixel]
    return pixel


@_compiled()
def _merge(
    weights: np.ndarray, edges: np.ndarray, width: int, scale: np.float32, min_size: int, num_pixels: int
) -> np.ndarray:
    """Merge along edges from the lightest on, then merge what has fewer than `min_size` pixels; `edges` is overwritten.

    Returns:
        (H W,) int32, the parent of each pixel; a root, the first pixel of its region, is its own.
    """
    parents = np.arange(num_pixels).astype(np.int32)
    sizes = np.ones(num_pixels, np.int32)
    # Largest weight inside a region plus the threshold, scale / size: a lighter edge merges it.
    limits = np.full(num_pixels, scale, np.float32)
    steps = np.array((1, width, width + 1, 1 - width), np.int32)
    num_between = 0  # edges between regions, kept for the second pass at the front of `edges`
    for i in range(edges.size):
        edge = edges[i]
        start = edge >> 2
        a, b = _find(parents, start), _find(parents, np.int32(start + steps[edge & 3]))
        if a == b:
            continue
        if weights[i] < min(limits[a], limits[b]):
            root, other = min(a, b), max(a, b)
            parents[other] = root
            sizes[root] += sizes[other]
            limits[root] = weights[i] + scale / np.float32(sizes[root])
        else:
            edges[num_between] = edge
            num_between += 1
    for edge in edges[:num_between]:
        start = edge >> 2
        a, b = _find(parents, start), _find(parents, np.int32(start + steps[edge & 3]))
        if a != b and min(sizes[a], sizes[b]) < min_size:
            root, other = min(a, b), max(a, b)
            parents[other] = root
            sizes[root] += sizes[other]
    return parents


@_compiled()
def _number(parents: np.ndarray) -> np.ndarray:
    """Ids 0, 1, ... of the pixels' regions, (H W,) int32."""
    ids = np.empty_like(parents)
    count = 0
    for pixel in range(parents.size):
        root = _find(parents, np.int32(pixel))
        if root == pixel:  # the first pixel of its region
            ids[pixel] = count
            count += 1
        else:
            ids[pixel] = ids[root]
    return ids
