"""Scalars for the log that several methods share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def feature_std(rows: Tensor) -> Tensor:
    """Tell how widely embeddings are spread: (n, D), of any length -> scalar.

    About 1 where their directions are spread evenly over the sphere, 0 where all collapse to one.
    """
    return F.normalize(rows, dim=1).std(dim=0).mean() * rows.shape[1] ** 0.5
