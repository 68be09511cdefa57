"""Pictures of depth maps. Images are (H, W, 3) uint8 RGB arrays."""

from __future__ import annotations

import matplotlib
import numpy as np

_COLORMAP = "Spectral"


def draw_depth(depth: np.ndarray, max_depth: float) -> np.ndarray:
    """Colour a depth map: near is red, far is blue, black is where there is no measurement.

    Args:
        depth: (H, W) float, metres; 0: no measurement.
        max_depth: the depth that is shown as the farthest, metres.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    colors = matplotlib.colormaps[_COLORMAP](np.clip(depth / max_depth, 0, 1))[..., :3]
    return np.where(depth[..., None] > 0, np.round(255 * colors), 0).astype(np.uint8)
