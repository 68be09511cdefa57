"""The only coordinate arithmetic of the package: where views lie in their image, and in each other.

Frames: *image* = pixels of the original image; *view* = [0, 1] of a view after its horizontal flip. Coordinates are
continuous (a W-pixel-wide image spans 0..W) and boxes are XYXY, as in fvcore. N views; C, h, w: feature map.
"""

from __future__ import annotations

import numpy as np
import torch
from detectron2.layers import ROIAlign
from fvcore.transforms.transform import TransformList
from torch import Tensor

from .structures import ViewBatch


def image_to_view(transforms: TransformList, view_size: tuple[int, int]) -> tuple[np.ndarray, bool]:
    """Find which part of the image a view shows.

    Args:
        transforms: the transforms that made the view of the image.
        view_size: (height, width) of the view, pixels.

    Returns:
        crop_box: (4,) float32 XYXY_ABS in original-image pixels.
        hflip: whether the view is mirrored left to right.

    Raises:
        ValueError: if the view is rotated, sheared, flipped upside down or warped: ROIAlign cannot undo that.
    """
    probes = np.array([[0, 0], [1, 0], [0, 1], [1, 1], [2, 3]], dtype=np.float64)
    moved = np.asarray(transforms.apply_coords(probes.copy()), dtype=np.float64)
    origin, scale = moved[0], np.array([moved[1, 0] - moved[0, 0], moved[2, 1] - moved[0, 1]])
    if np.abs(moved - (origin + probes * scale)).max() > 1e-6 or scale[1] <= 0 or scale[0] == 0:
        raise ValueError(
            f"Views may be cropped, resized and flipped left to right only, not moved by {transforms}: "
            "region alignment could not undo it."
        )
    height, width = view_size
    x = np.sort((np.array([0.0, width]) - origin[0]) / scale[0])
    y = (np.array([0.0, height]) - origin[1]) / scale[1]
    box = np.array([x[0], y[0], x[1], y[1]])
    nearest = np.round(box)
    # Crops have integer corners; remove the last bits that the probing added, so that equal corners compare equal.
    return np.where(np.abs(box - nearest) < 1e-6, nearest, box).astype(np.float32), bool(scale[0] < 0)


def overlap_rois(query: ViewBatch, key: ViewBatch) -> tuple[Tensor, Tensor]:
    """Locate, in `query`, the image area that both views see.

    Returns:
        rois: (N, 4) float32 XYXY in [0, 1] of the query view, after its flip.
        valid: (N,) bool, True where the crops overlap; elsewhere `rois` is inverted or flat: do not pool it.

    Source: SlotCon supplement A.1. Divides by the crop size first and leaves the multiplication by the grid size to
    `align_features`, so that a contained crop gives exactly 0 and 1: ROIAlign samples a box of 7.0000005 cells
    differently from one of 7 (tests/test_geometry.py::test_contained_crop_is_identity).
    """
    own, other = query.crop_boxes, key.crop_boxes
    left_top = torch.maximum(own[:, :2], other[:, :2])
    right_bottom = torch.minimum(own[:, 2:], other[:, 2:])
    size = own[:, 2:] - own[:, :2]
    rois = torch.cat([(left_top - own[:, :2]) / size, (right_bottom - own[:, :2]) / size], dim=1)
    mirrored = torch.stack([1 - rois[:, 2], rois[:, 1], 1 - rois[:, 0], rois[:, 3]], dim=1)
    rois = torch.where(query.hflip[:, None], mirrored, rois)
    return rois, (right_bottom > left_top).all(dim=1)


def align_features(x: Tensor, rois: Tensor, hflip: Tensor) -> Tensor:
    """Resample the area `rois` of a view to the full grid and undo the view's flip ("inverse augmentation").

    Args:
        x: (N, C, h, w) float feature map or scores of a view.
        rois: (N, 4) XYXY in [0, 1] of the view after its flip; see `overlap_rois`.
        hflip: (N,) bool, whether the view was flipped.

    Returns:
        (N, C, h, w): equal cells of two aligned views show the same place. All zeros where a box is inverted or flat.

    Source: SlotCon supplement A.1; ROIAlign with aligned=True and adaptive sampling (one bilinear sample a bin here,
    since no box exceeds the map).
    """
    n, _, h, w = x.shape
    index = torch.arange(n, device=x.device, dtype=x.dtype)[:, None]
    # Inverted boxes become flat: ROIAlign cannot allocate the samples of a box that is inverted along one axis only.
    rois = torch.cat([rois[:, :2], torch.maximum(rois[:, :2], rois[:, 2:])], dim=1)
    # Overlaps lie in [0, 1]; what does not is no overlap, and must not make ROIAlign sample a huge box.
    rois = rois.to(x.dtype).clamp(0, 1)
    left, top, right, bottom = rois.split(1, dim=1)
    boxes = torch.cat([index, left * w, top * h, right * w, bottom * h], dim=1)
    aligned = ROIAlign((h, w), spatial_scale=1.0, sampling_ratio=0, aligned=True)(x, boxes)
    return torch.where(hflip[:, None, None, None], aligned.flip(-1), aligned)
