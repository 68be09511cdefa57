"""From backbone features to the feature map that regions are pooled from.

N images, C channels, h, w cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
