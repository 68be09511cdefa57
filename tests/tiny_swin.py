"""Swin Transformers that are small enough for tests, in the hands of this package, torchvision, timm and Microsoft."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionTransformer

from d2_objssl import add_objssl_config

WINDOW = 2
ARCH: dict[str, Any] = {"embed_dim": 8, "depths": [1, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": WINDOW}
SWIN_OPTS: list[Any] = [x for key, value in ARCH.items() for x in (f"MODEL.SWIN.{key.upper()}", value)]


def swin_cfg(*opts: Any, name: str = "build_swin_backbone") -> CfgNode:
    """A config with a tiny Swin Transformer; `opts`: KEY VALUE pairs."""
    cfg = get_cfg()
    add_objssl_config(cfg)
    contract: list[Any] = ["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.NAME", name, "MODEL.BACKBONE.FREEZE_AT", 0]
    contract += ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53]]
    contract += ["MODEL.PIXEL_STD", [58.395, 57.12, 57.375], "MODEL.FPN.OUT_CHANNELS", 8]
    contract += ["MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]]
    cfg.merge_from_list([*contract, *SWIN_OPTS, *opts])
    return cfg


def randomize(model: nn.Module) -> nn.Module:
    """Give every parameter a value of its own, such that features neither vanish nor grow and positions matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(0, 1.0 if "table" in name else 0.2, generator=generator)
            if value.ndim == 1 and name.endswith("weight"):
                value.add_(1)
    return model.eval()


def source_state(layout: str) -> dict[str, Tensor]:
    """A state dict as a package writes it: "torchvision", "timm", "timm features" or "swin" (Microsoft's)."""
    if layout == "torchvision":
        arch = {key: value for key, value in ARCH.items() if key != "window_size"}
        net = TorchvisionTransformer(patch_size=[4, 4], window_size=[WINDOW] * 2, num_classes=3, **arch)
        return randomize(net).state_dict()
    timm_swin = pytest.importorskip("timm.models.swin_transformer")
    state = randomize(timm_swin.SwinTransformer(img_size=32 * WINDOW, num_classes=3, **ARCH)).state_dict()
    if layout == "timm features":  # timm.create_model(..., features_only=True)
        return {k.replace("layers.", "layers_"): v for k, v in state.items() if not k.startswith(("norm.", "head."))}
    return microsofts(state) if layout == "swin" else state


def microsofts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's state dict as Microsoft's code writes it: other places of layers, other classifier, more buffers."""
    earlier = {re.sub(r"(?<=layers\.)\d(?=\.downsample)", lambda m: str(int(m[0]) - 1), k): v for k, v in state.items()}
    renamed = {name.replace("head.fc.", "head."): value for name, value in earlier.items()}
    cells = WINDOW**2
    for name in [name for name in renamed if name.endswith("attn.qkv.weight")]:
        block = name.removesuffix("attn.qkv.weight")
        renamed[f"{block}attn.relative_position_index"] = torch.zeros(cells, cells, dtype=torch.int64)
        if block.endswith("1."):
            renamed[f"{block}attn_mask"] = torch.zeros(4, cells, cells)
    return renamed
