"""From backbone features and region maps to one vector a region.

    N  images    C  channels    h, w  cells    S  side of a view, pixels    K  region ids    M  regions of a view

Region maps have the resolution of the view, features that of the backbone's grid: a cell is `stride` x `stride` pixels.
Ids of pixels are counted per cell and never one-hot encoded: 256 ids of 224 x 224 pixels are 51 MB an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..structures import MAX_OVERLAPPING, Regions, ViewBatch


def fuse_levels(features: Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
    """Bring feature maps to one grid and concatenate their channels.

    Args:
        features: maps (N, C_i, h_i, w_i), in the order in which they are concatenated.
        size: (h, w) of the result; default: that of the last map.

    Returns:
        (N, sum of C_i, h, w). Finer maps are average-pooled, coarser ones upsampled to the nearest cell.

    Source: CYBORGS section 4.1 (res3, res4, res5 on the grid of res5: 512 + 1024 + 2048 = 3584 channels).
    """
    if size is None:
        size = (features[-1].shape[-2], features[-1].shape[-1])
    fused = []
    for x in features:
        if x.shape[-1] > size[1]:
            x = F.adaptive_avg_pool2d(x, size)
        elif x.shape[-1] < size[1]:
            x = F.interpolate(x, size=size, mode="nearest")
        fused.append(x)
    return fused[0] if len(fused) == 1 else torch.cat(fused, dim=1)


def region_weights(region_maps: Tensor, stride: int, num_ids: int) -> Tensor:
    """Give every cell to the region that has most of its pixels, the lowest id among equals.

    Args:
        region_maps: (N, S, S) integer ids of the pixels; those outside [0, num_ids) belong to no region.
        stride: side of a cell, pixels. Where it does not divide S, the last cells are cut off by the border.
        num_ids: K.

    Returns:
        (N, K, h, w) float32, 1 where the cell is of that region; a cell without any region is 0 in all of them.

    Source: DetCon section 3.1 (binary maps, average-pooled) and its released code (each cell to its arg-max). There, a
    cell without any region belongs to id 0.
    """
    n = region_maps.shape[0]
    padding = [-side % stride for side in region_maps.shape[1:]]
    maps = F.pad(region_maps.long(), (0, padding[1], 0, padding[0]), value=num_ids)
    h, w = maps.shape[1] // stride, maps.shape[2] // stride
    # All that is no region is counted under one more id, and dropped.
    labels = torch.where((maps >= 0) & (maps < num_ids), maps, num_ids)
    labels = labels.view(n, h, stride, w, stride).transpose(2, 3).reshape(n, h * w, -1)
    counts = labels.new_zeros(n, h * w, num_ids + 1)
    counts = counts.scatter_add_(2, labels, labels.new_ones(()).expand_as(labels))[:, :, :num_ids]
    # arg-max promises no order among equals, so there must not be any.
    lowest_first = torch.arange(num_ids - 1, -1, -1, device=counts.device)
    winners = (counts * num_ids + lowest_first).argmax(dim=2, keepdim=True)
    present = (counts.gather(2, winners) > 0).float()
    weights = present.new_zeros(n, h * w, num_ids).scatter_(2, winners, present)
    return weights.transpose(1, 2).reshape(n, num_ids, h, w)


def overlapping_region_weights(bit_sets: Tensor, stride: int, num_ids: int = MAX_OVERLAPPING) -> Tensor:
    """Tell how much of every cell each of several overlapping regions covers.

    Args:
        bit_sets: (N, S, S) integers; bit r is 1 where region r covers the pixel.
        stride: side of a cell, pixels. Where it does not divide S, the last cells are cut off by the border.
        num_ids: K; higher bits are ignored.

    Returns:
        (N, K, h, w) float32 in [0, 1], covered share of the cell's area.

    Source: DetCon section 3.1, masks downsampled with average pooling.
    """
    masks = [(bit_sets >> r & 1).float() for r in range(num_ids)]
    return torch.stack([F.avg_pool2d(m[:, None], stride, ceil_mode=True)[:, 0] for m in masks], dim=1)


def masked_average_pool(features: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the cells of each region, in float32 (or float64) also under autocast.

    Args:
        features: (N, C, h, w).
        weights: (N, M, h, w), not negative, of any sum.

    Returns:
        (N, M, C), the zero vector where all weights of a region are 0.

    Source: DetCon section 3.1, the mask-pooled hidden vector.
    """
    assert features.shape[2:] == weights.shape[2:], f"grids {features.shape[2:]} and {weights.shape[2:]} differ"
    dtype = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        shares = weights.flatten(2).to(dtype)
        shares = shares / shares.sum(dim=2, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
        return shares @ features.to(dtype).permute(0, 2, 3, 1).flatten(1, 2)


def sample_regions(weights: Tensor, num_regions: int, replacement: bool = True) -> Regions:
    """Draw regions uniformly from those present in each view.

    A view without any region has one that is its whole grid, with the id K.

    Args:
        weights: (N, K, h, w) cell weights of every region id, 0 where it is absent.
        num_regions: M.
        replacement: True: draws are independent. False: every region comes once before any comes twice.

    Returns:
        Regions of M draws from each view; all of them are present.
    """
    n, k, h, w = weights.shape
    present = weights.flatten(2).any(dim=2)
    empty = ~present.any(dim=1)
    present = torch.cat([present, empty[:, None]], dim=1)
    if replacement:
        ids = _multinomial(present.float(), num_regions)
    else:
        order = (torch.rand(n, k + 1, device=weights.device) + present).argsort(dim=1, descending=True)
        turns = torch.arange(num_regions, device=weights.device) % present.sum(dim=1, keepdim=True)
        ids = order.gather(1, turns)
    whole = torch.ones(n, 1, h, w, dtype=weights.dtype, device=weights.device)
    drawn = torch.cat([weights, whole], dim=1)[torch.arange(n, device=weights.device)[:, None], ids]
    return Regions(ids=ids, weights=drawn / drawn.sum(dim=(2, 3), keepdim=True))


def sample_cells(regions: Regions) -> Regions:
    """Keep one random cell of each region, drawn in proportion to its weights.

    Source: DetCon section 4.4, local features sampled from within each mask.
    """
    flat = regions.weights.flatten(2)
    cells = _multinomial(flat.flatten(0, 1), 1).view(*flat.shape[:2], 1)
    weights = torch.zeros_like(flat).scatter_(2, cells, 1.0).view_as(regions.weights)
    return Regions(ids=regions.ids, weights=weights)


def _multinomial(weights: Tensor, num_samples: int) -> Tensor:
    """`torch.multinomial` with replacement, which for a single draw would check the weights on the CPU.

    Args:
        weights: (n, K), not negative, of a positive sum.

    Returns:
        (n, num_samples) indices, the same as of `torch.multinomial`.
    """
    if num_samples == 1:
        return (weights / torch.empty_like(weights).exponential_()).argmax(dim=1, keepdim=True)
    return torch.multinomial(weights, num_samples, replacement=True)


@dataclass(frozen=True)
class RegionSampler:
    """Draws the regions of views from their region maps, on the device of the maps; each view for itself.

    Attributes:
        num_regions: M.
        max_region_ids: K of label maps; bit sets have MAX_OVERLAPPING ids.
        stride: side of a cell of the features that are pooled, pixels.
        replacement: see `sample_regions`.
        single_cells: see `sample_cells`.
    """

    num_regions: int
    max_region_ids: int
    stride: int
    replacement: bool = True
    single_cells: bool = False

    @torch.no_grad()
    def __call__(self, views: list[ViewBatch]) -> list[Regions]:
        """Draw M regions from each image of each view.

        Raises:
            ValueError: if a view has no region map.
        """
        return [self._draw(view) for view in views]

    def _draw(self, view: ViewBatch) -> Regions:
        if view.region_maps is None:
            raise ValueError(
                "The views have no region maps: in training INPUT.REGIONS.SOURCE says where they come from; a method that "
                "contrasts given regions predicts none for a new image"
            )
        if view.overlapping:
            weights = overlapping_region_weights(view.region_maps, self.stride)
        else:
            weights = region_weights(view.region_maps, self.stride, self.max_region_ids)
        regions = sample_regions(weights, self.num_regions, self.replacement)
        return sample_cells(regions) if self.single_cells else regions
