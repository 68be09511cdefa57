"""ResNets as haiku computes them in evaluation mode, on haiku's own names and axes: what conversions are compared with.

Written from haiku's definitions and sharing nothing with modeling/backbone.py: a convolution gathers its windows by
index and is one matrix product. Slow, and only for a few pictures.

N images; h, w cells; C channels; k kernel size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class HaikuResNet(nn.Module):
    """ResNet v1 of `weight_names_haiku.flatten_haiku`: (N, 3, H, W) float -> {"res2": (N, C, h, w), ..., "res5"}."""

    def __init__(self, state: Mapping[str, Any], prefix: str) -> None:
        """
        Args:
            state: name -> tensor or array.
            prefix: of the parameters, such as "params/"; the statistics are behind "state/".
        """
        super().__init__()
        self.weights = {name: torch.as_tensor(value) for name, value in state.items()}
        self.prefixes = (prefix, prefix.replace("params", "state"))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of the four groups of blocks, under Detectron2's names for them."""
        x = self._conv_norm(images.permute(0, 2, 3, 1), "initial_conv", "initial_batchnorm", 2).relu()
        x = _windows(x, 3, 2, outside=-math.inf).amax(dim=(3, 4))
        features = {}
        for group in range(4):
            block = 0
            while f"{self.prefixes[0]}block_group_{group}/block_{block}/conv_0/w" in self.weights:
                stride = 2 if group > 0 and block == 0 else 1
                x = self._block(x, f"block_group_{group}/block_{block}/", stride)
                block += 1
            features[f"res{group + 2}"] = x.permute(0, 3, 1, 2)
        return features

    def _block(self, x: Tensor, name: str, stride: int) -> Tensor:
        """A bottleneck block, which strides in its second convolution of three; a basic block, in its first of two."""
        is_bottleneck = f"{self.prefixes[0]}{name}conv_2/w" in self.weights
        strides = (1, stride, 1) if is_bottleneck else (stride, 1)
        residual = x
        for i, s in enumerate(strides):
            residual = self._conv_norm(residual, f"{name}conv_{i}", f"{name}batchnorm_{i}", s)
            if i + 1 < len(strides):
                residual = residual.relu()
        if f"{self.prefixes[0]}{name}shortcut_conv/w" in self.weights:
            x = self._conv_norm(x, f"{name}shortcut_conv", f"{name}shortcut_batchnorm", stride)
        return (residual + x).relu()

    def _conv_norm(self, x: Tensor, conv: str, norm: str, stride: int) -> Tensor:
        params, state = self.prefixes
        weight = self.weights[f"{params}{conv}/w"].to(x.dtype)  # (k, k, C in, C out)
        x = _windows(x, weight.shape[0], stride, outside=0.0).flatten(3) @ weight.flatten(0, 2)
        mean, variance = (self.weights[f"{state}{norm}/{key}_ema/average"].to(x.dtype) for key in ("mean", "var"))
        scale, offset = (self.weights[f"{params}{norm}/{key}"].to(x.dtype) for key in ("scale", "offset"))
        return (x - mean) * torch.rsqrt(variance + 1e-5) * scale + offset


def _windows(x: Tensor, size: int, stride: int, outside: float) -> Tensor:
    """The windows under a kernel: (N, h, w, C) -> (N, ceil(h / stride), ceil(w / stride), size, size, C)."""
    rows, columns = (window_positions(n, size, stride).to(x.device) for n in x.shape[1:3])
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]
    is_inside = (rows >= 0) & (rows < x.shape[1]) & (columns >= 0) & (columns < x.shape[2])
    taken = x[:, rows.clamp(0, x.shape[1] - 1), columns.clamp(0, x.shape[2] - 1)]
    return taken.masked_fill(~is_inside[..., None], outside)


def window_positions(num_cells: int, size: int, stride: int) -> Tensor:
    """Input cells under each position of a kernel, (ceil(num_cells / stride), size); -1 is left of the first cell.

    The windows reach beyond the input as little as possible, and on the left by half of that, rounded down.
    """
    starts = torch.arange(0, num_cells, stride)
    excess = max(int(starts[-1]) + size - num_cells, 0)
    return starts[:, None] + torch.arange(size) - excess // 2
