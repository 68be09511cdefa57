"""What travels between the parts of the package, and its shape legend.

N  images of a process          G  images of all processes
V  views of an image            S  side of a view, pixels
C  channels of a feature map    h, w  its height and width, cells
K  prototypes, or region ids    M  regions sampled from an image
D  dimension of an embedding    P  pairs of matching regions
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

NO_REGION = -1  # label of the pixels that belong to no region
MAX_OVERLAPPING = 16  # regions of a bit set, which thus fits into a 16-bit PNG


@dataclass
class ViewBatch:
    """One view of each of N images.

    Attributes:
        images: (N, 3, S, S) uint8 RGB, 0-255, until `ObjectSSL.preprocess_views` normalises it to float32.
        crop_boxes: (N, 4) float32, XYXY_ABS, continuous coordinates of the original image.
        hflip: (N,) bool, True where the crop was mirrored left to right after cropping.
        region_maps: (N, S, S) integer region ids of the view's pixels, moved by the image's own transforms, NO_REGION
            where there is none; with `overlapping` bit sets instead: bit r is 1 where region r covers the pixel. Or None.
        overlapping: whether `region_maps` holds bit sets of at most MAX_OVERLAPPING regions.
        colors: (N, 11) float32, what is still to be done to the colours (`data.device_augmentation`), on the CPU; or None.
    """

    images: Tensor
    crop_boxes: Tensor
    hflip: Tensor
    region_maps: Tensor | None = None
    overlapping: bool = False
    colors: Tensor | None = None

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitem__(self, rows: slice) -> ViewBatch:
        """The view of some of the images."""
        return self._map_tensors(lambda x: x[rows])

    def _map_tensors(self, function) -> ViewBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in values.items() if isinstance(v, Tensor)})

    def to(self, device: torch.device | str, non_blocking: bool = True) -> ViewBatch:
        """Copy to `device`."""
        return self._map_tensors(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ViewBatch:
        """Copy to page-locked memory; called by the data loader."""
        return self._map_tensors(lambda x: x.pin_memory())


@dataclass
class Regions:
    """M regions of each of N views.

    Attributes:
        ids: (N, M) int64 region ids.
        weights: (N, M, h, w) float32; each sums to 1 over the cells, or to 0 where the region is absent.
    """

    ids: Tensor
    weights: Tensor


@dataclass
class RegionEmbeddings:
    """What one branch makes of one view.

    Attributes:
        z: (N, M, D) embeddings of the regions (SlotCon: slots, M = K), not normalised.
        ids: (N, M) int64 region ids; equal ids of an image correspond between its views.
        valid: (N, M) bool, True where the region is present in the view.
        scores: (N, K, h, w) similarity of every cell to every region, in [-1, 1]; or None.
        features: (N, D, h, w) feature map (SlotCon: projected; CYBORGS: fused levels, C channels); or None.
        image: (N, D) embedding of the whole view; or None.
    """

    z: Tensor
    ids: Tensor
    valid: Tensor
    scores: Tensor | None = None
    features: Tensor | None = None
    image: Tensor | None = None
