"""Projection and prediction heads.

A head works on the last dimension, so one class serves vectors (P, C) and channels-last feature maps (N, h, w, C): a
1x1 convolution is the same matrix product, without the detour through the convolution code.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import NaiveSyncBatchNorm, get_norm
from detectron2.utils import comm
from torch import Tensor, nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


def _row_norm(name: str, dim: int, affine: bool = True) -> nn.Module:
    """Batch norm over the rows of a (n, dim) matrix; `name` as in Detectron2's `get_norm`, "" for none."""
    if name == "":
        return nn.Identity()
    if name == "BN":
        return nn.BatchNorm1d(dim, affine=affine)
    if name in ("SyncBN", "nnSyncBN"):
        return nn.SyncBatchNorm(dim, affine=affine)
    if name in ("naiveSyncBN", "naiveSyncBN_N"):
        # Row counts differ between processes, so statistics must be weighted by them.
        norm = get_norm("naiveSyncBN_N", dim)
        if not affine:
            norm.weight.requires_grad_(False)
            norm.bias.requires_grad_(False)
        return norm
    raise ValueError(f'NORM of a projection head is "{name}"; known: "", "BN", "SyncBN", "naiveSyncBN"')


def _normalize_rows(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply `norm` to (n, dim) rows; with fewer than two rows and no other process, by the running statistics."""
    if isinstance(norm, nn.Identity):
        return norm(x)
    assert isinstance(norm, (nn.BatchNorm1d, nn.SyncBatchNorm, NaiveSyncBatchNorm))
    alone = isinstance(norm, nn.BatchNorm1d) or comm.get_world_size() == 1
    if alone and norm.training and x.shape[0] < 2:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    if isinstance(norm, NaiveSyncBatchNorm):
        return norm(x[:, :, None, None]).flatten(1)
    if len(x) == 0:
        # PyTorch's SyncBatchNorm sends zeros of this data type, and float32 statistics where there are rows.
        x = x.float()
    return norm(x)


class MLP(nn.Module):
    """`num_fc` linear layers with normalisation and activation between them."""

    def __init__(
        self,
        in_dim: int,
        *,
        num_fc: int,
        fc_dim: int,
        out_dim: int,
        norm: str = "BN",
        activation: str = "gelu",
        last_norm: bool = False,
        last_bias: bool = True,
    ) -> None:
        """
        Args:
            in_dim, fc_dim, out_dim: dimensions of the input, the hidden layers and the output.
            num_fc: number of linear layers, at least 1.
            norm: "", "BN", "SyncBN" or "naiveSyncBN".
            activation: "gelu" or "relu".
            last_norm: end with a normalisation without scale and shift (MoCo-v3's projector).
            last_bias: whether the last linear layer has a bias (DetCon's has none).

        Raises:
            ValueError: for an unknown norm or activation, or num_fc < 1.
        """
        super().__init__()
        if num_fc < 1:
            raise ValueError(f"NUM_FC of a projection head is {num_fc}; it must be at least 1")
        if activation not in _ACTIVATIONS:
            raise ValueError(f'ACTIVATION of a projection head is "{activation}"; known: {sorted(_ACTIVATIONS)}')
        dims = [in_dim] + [fc_dim] * (num_fc - 1) + [out_dim]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (d_in, d_out) in enumerate(pairwise(dims), start=1):
            layers[f"fc{i}"] = nn.Linear(d_in, d_out, bias=last_bias or i < num_fc)
            if i < num_fc:
                layers[f"norm{i}"] = _row_norm(norm, d_out)
                layers[f"act{i}"] = _ACTIVATIONS[activation]()
        if last_norm:
            layers[f"norm{num_fc}"] = _row_norm(norm, out_dim, affine=False)
        self.layers = nn.Sequential(layers)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @staticmethod
    def from_config(cfg: CfgNode, in_dim: int) -> MLP:
        """Build the head of a MODEL.SSL.PROJECTOR or MODEL.SSL.PREDICTOR node."""
        return MLP(
            in_dim,
            num_fc=cfg.NUM_FC,
            fc_dim=cfg.FC_DIM,
            out_dim=cfg.OUT_DIM,
            norm=cfg.NORM,
            activation=cfg.ACTIVATION,
            last_norm=cfg.LAST_NORM,
            last_bias=cfg.LAST_BIAS,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_dim) to (..., out_dim)."""
        rows = x.reshape(-1, x.shape[-1])
        for name, layer in self.layers.named_children():
            rows = _normalize_rows(layer, rows) if name.startswith("norm") else layer(rows)
        return rows.reshape(*x.shape[:-1], rows.shape[-1])
