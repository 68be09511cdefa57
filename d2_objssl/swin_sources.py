"""Swin Transformers of torchvision and timm, loaded under their own names: what conversions are compared with.

Both give res2 to res4 as the stages leave them, and res5 after the last normalisation. `arch` is what
`weight_names_swin.infer_swin` returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer

_STAGES = ("res2", "res3", "res4", "res5")


class TorchvisionSwin(nn.Module):
    """torchvision's network: (N, 3, H, W) float -> {"res2": (N, C, h, w), ..., "res5"}."""

    def __init__(self, state: Mapping[str, Tensor], arch: Mapping[str, Any]) -> None:
        """
        Args:
            state: torchvision's name -> weight, without a prefix.
            arch: of the network.

        Raises:
            ValueError: if weights are missing.
        """
        super().__init__()
        self.net = SwinTransformer(
            patch_size=[4, 4],
            embed_dim=arch["embed_dim"],
            depths=arch["depths"],
            num_heads=arch["num_heads"],
            window_size=[arch["window_size"]] * 2,
            num_classes=1,
        )
        _load(self.net, state, "torchvision")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of the four stages."""
        features, x = {}, images
        # The patch embedding, then stages and the layers between them in turn.
        for i, module in enumerate(self.net.features):
            x = module(x)
            if i % 2 == 1:
                features[_STAGES[i // 2]] = x
        return _channels_first(features | {"res5": self.net.norm(x)})


class TimmSwin(nn.Module):
    """timm's network, for images of H = 32 x window size: (N, 3, H, H) float -> {"res2": (N, C, h, w), ..., "res5"}."""

    def __init__(self, state: Mapping[str, Tensor], arch: Mapping[str, Any]) -> None:
        """
        Args:
            state: timm's or Microsoft's name -> weight, without a prefix. timm itself renames the latter.
            arch: of the network.

        Raises:
            ValueError: if timm is not installed, or weights are missing.
        """
        super().__init__()
        timm_swin = import_timm_swin()
        self.net = timm_swin.SwinTransformer(
            img_size=32 * arch["window_size"],
            window_size=arch["window_size"],
            embed_dim=arch["embed_dim"],
            depths=tuple(arch["depths"]),
            num_heads=tuple(arch["num_heads"]),
            num_classes=0,
        )
        renamed = {name.replace("layers_", "layers."): value for name, value in state.items()}
        if "layers.0.downsample.reduction.weight" in renamed:  # Microsoft's
            renamed = timm_swin.checkpoint_filter_fn(renamed, self.net)
        _load(self.net, renamed, "timm")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of the four stages."""
        features, x = {}, self.net.patch_embed(images)
        for stage, layer in zip(_STAGES, self.net.layers, strict=True):
            x = features[stage] = layer(x)
        return _channels_first(features | {"res5": self.net.norm(x)})


def import_timm_swin() -> ModuleType:
    """timm's module with Swin Transformers.

    Raises:
        ValueError: if timm is not installed.
    """
    try:
        from timm.models import swin_transformer
    except ImportError as error:
        raise ValueError(
            "comparing with the Swin Transformer of timm or Microsoft needs the package timm (pip install timm)"
        ) from error
    return swin_transformer


def _load(net: nn.Module, state: Mapping[str, Tensor], package: str) -> None:
    """Load what the network has of `state`; its classifier and index tables need not be there."""
    own = net.state_dict()
    needed = [name for name in own if not name.startswith("head.") and not name.endswith("relative_position_index")]
    if missing := [name for name in needed if name not in state]:
        raise ValueError(f"{package}'s Swin Transformer misses {', '.join(missing[:8])}")
    net.load_state_dict(own | {name: state[name] for name in needed})


def _channels_first(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.permute(0, 3, 1, 2) for name, x in features.items()}
