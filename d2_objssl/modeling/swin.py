"""Swin Transformers: Detectron2's network, under the names and with the habits of the ResNets.

    H, W   an image, pixels
    M      MODEL.SWIN.WINDOW_SIZE: side of the windows in which cells attend to each other, cells

             EMBED_DIM   DEPTHS          NUM_HEADS          parameters (res5 is the only output)
    Swin-T    96         2, 2,  6, 2     3,  6, 12, 24       27.5M
    Swin-S    96         2, 2, 18, 2     3,  6, 12, 24       48.8M
    Swin-B   128         2, 2, 18, 2     4,  8, 16, 32       86.7M
    Swin-L   192         2, 2, 18, 2     6, 12, 24, 48      195.0M

Source: Liu et al., ICCV 2021. Parameters have Detectron2's names. Features are Detectron2's, but for these differences:

* They are called res2 to res5 (strides 4 to 32; Detectron2: p0 to p3), as MODEL.FPN.IN_FEATURES expects them.
* Where a whole map lies in one window (res5 of a 224-pixel view, with M 7), windows are not shifted. ImageNet's weights
  were trained that way; Detectron2 would split that window into four. Larger maps: no difference. (Where a map is one
  window high and several wide, Detectron2 and we shift in both directions, torchvision in one.)
* Stochastic depth is torchvision's, because Detectron2's is timm's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, SwinTransformer
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor
from torchvision.ops import StochasticDepth

STAGES = ("res2", "res3", "res4", "res5")
_PATCH_SIZE = 4


class SwinBackbone(SwinTransformer):
    """Detectron2's Swin Transformer with the outputs of a ResNet."""

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int = 7,
        drop_path_rate: float = 0.0,
        out_features: Sequence[str] = STAGES,
        freeze_at: int = 0,
    ) -> None:
        """
        Args:
            embed_dim: channels of res2; every further stage has twice as many.
            depths, num_heads: blocks, and heads of their attention, in res2, res3, res4 and res5.
            window_size: M.
            drop_path_rate: stochastic depth, the probability of leaving out the last block's branches for an image; it
                grows linearly from 0 at the first block.
            out_features: names out of `STAGES`. Each output has a normalisation of its own.
            freeze_at: how many modules keep their weights: 0 none, 1 the patch embedding, 2 also res2, ..., 5 all.

        Raises:
            ValueError: naming the key of MODEL.SWIN (or MODEL.BACKBONE.FREEZE_AT) that is wrong.
        """
        _check_arguments(embed_dim, depths, num_heads, window_size, drop_path_rate, out_features, freeze_at)
        indices = [i for i, name in enumerate(STAGES) if name in out_features]
        super().__init__(
            embed_dim=embed_dim,
            depths=tuple(depths),
            num_heads=tuple(num_heads),
            window_size=window_size,
            drop_path_rate=0.0,  # see below
            out_indices=tuple(indices),
        )
        self._out_features = [STAGES[i] for i in indices]
        self._out_feature_channels = {STAGES[i]: embed_dim * 2**i for i in indices}
        self._out_feature_strides = {STAGES[i]: _PATCH_SIZE * 2**i for i in indices}
        self._set_stochastic_depth(drop_path_rate, num_frozen=freeze_at - 1)
        norms = [getattr(self, f"norm{i}") for i in indices if i + 2 <= freeze_at]
        for module in (*[self.patch_embed, *self.layers][:freeze_at], *norms):
            module.requires_grad_(False)

    @property
    def size_divisibility(self) -> int:
        """Sides of images are padded to a multiple of this, so that the maps of all strides lie on each other."""
        return _PATCH_SIZE * 2 ** (len(STAGES) - 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: (N, 3, H, W) float, normalised, of any size.

        Returns:
            Name -> (N, C, ceil(H / stride), ceil(W / stride)).
        """
        self._set_shifts(x.shape[-2], x.shape[-1])
        return {STAGES[int(name[1:])]: feature for name, feature in super().forward(x).items()}

    def _set_stochastic_depth(self, rate: float, *, num_frozen: int) -> None:
        """Let blocks be left out, more often towards the end; never those of frozen stages, which are only read."""
        rates = torch.linspace(0, rate, sum(len(layer.blocks) for layer in self.layers)).tolist()
        for stage, layer in enumerate(self.layers):
            for block in layer.blocks:
                p = rates.pop(0)
                if p > 0 and stage >= num_frozen:
                    block.drop_path = StochasticDepth(p, "row")

    def _set_shifts(self, height: int, width: int) -> None:
        """Let every second block shift its windows by half of their side, where there are several windows.

        Args:
            height, width: of the images, pixels.
        """
        height, width = math.ceil(height / _PATCH_SIZE), math.ceil(width / _PATCH_SIZE)
        for layer in self.layers:
            shift = layer.shift_size if max(height, width) > layer.window_size else 0
            for block in list(layer.blocks)[1::2]:
                block.shift_size = shift
            height, width = math.ceil(height / 2), math.ceil(width / 2)


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SwinBackbone:
    """Build the network of MODEL.SWIN and MODEL.BACKBONE.FREEZE_AT, for images of three channels."""
    swin = cfg.MODEL.SWIN
    return SwinBackbone(
        embed_dim=swin.EMBED_DIM,
        depths=swin.DEPTHS,
        num_heads=swin.NUM_HEADS,
        window_size=swin.WINDOW_SIZE,
        drop_path_rate=swin.DROP_PATH_RATE,
        out_features=swin.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


@BACKBONE_REGISTRY.register()
def build_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A feature pyramid, as Detectron2's `build_resnet_fpn_backbone`, on `build_swin_backbone`."""
    return FPN(
        bottom_up=build_swin_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _check_arguments(
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    window_size: int,
    drop_path_rate: float,
    out_features: Sequence[str],
    freeze_at: int,
) -> None:
    for key, values in (("DEPTHS", depths), ("NUM_HEADS", num_heads)):
        if len(values) != len(STAGES) or min(values) < 1:
            raise ValueError(f"MODEL.SWIN.{key} is {tuple(values)}; it must be four positive numbers")
    indivisible = [i for i, heads in enumerate(num_heads) if embed_dim * 2**i % heads]
    if embed_dim < 1 or indivisible:
        raise ValueError(f"MODEL.SWIN.EMBED_DIM is {embed_dim}; NUM_HEADS {tuple(num_heads)} must divide the channels")
    if window_size < 2:
        raise ValueError(f"MODEL.SWIN.WINDOW_SIZE is {window_size}; it must be at least 2")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"MODEL.SWIN.DROP_PATH_RATE is {drop_path_rate}; it must be in [0, 1)")
    if not out_features or not set(out_features) <= set(STAGES):
        raise ValueError(f"MODEL.SWIN.OUT_FEATURES is {list(out_features)}; it must be out of {list(STAGES)}")
    if not 0 <= freeze_at <= len(STAGES) + 1:
        raise ValueError(f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}; it must be 0 to {len(STAGES) + 1}")
