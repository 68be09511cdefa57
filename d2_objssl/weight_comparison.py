"""Networks of a conversion, built from what was read and from what was written, and the differences of their features.

A network here takes pixels (1, 3, H, W), normalised as its input contract says, and gives its four stages,
{"res2": (1, C, h, w), ..., "res5"}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, get_cfg
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_backbone
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from .checkpoint import ObjSSLCheckpointer
from .config import add_objssl_config
from .haiku_resnet import HaikuResNet
from .swin_sources import TimmSwin, TorchvisionSwin
from .weight_conversion import IMAGENET_STATISTICS, Conversion
from .weight_files import load_checkpoint
from .weight_names import NUM_BLOCKS, unwrap_state_dict
from .weight_names_swin import is_swin

_STAGES = ("res2", "res3", "res4", "res5")
_TOLERANCE = 1e-5  # of the largest feature
_WIDTHS = ("width_per_group", "res2_out_channels", "stem_out_channels")
_SWIN_NORMS = ("norm0", "norm1", "norm2")  # of res2 to res4, which other packages do not have


class Difference(NamedTuple):
    """How much one stage of two networks differs, on one picture."""

    stage: str
    shape: tuple[int, ...]  # (C, h, w)
    largest_difference: float
    largest_feature: float
    relative_l2: float

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs but the last digits."""
        return self.largest_difference <= _TOLERANCE * self.largest_feature


def compare_networks(conversion: Conversion, path: str, image: str | None = None) -> list[Difference]:
    """Run the network that was read and the one out of the file `path`, in float64.

    Deep networks amplify what float32 rounds away.

    Args:
        conversion: what was converted.
        path: what `write_conversion` wrote.
        image: a picture; None: noise, always the same.

    Raises:
        ValueError: if there is no such network to compare with.
    """
    source, target = build_source(conversion).double(), build_target(conversion, path).double()
    differences = []
    for pixels in read_inputs(image, conversion.contract):
        with torch.no_grad():
            expected, actual = source(pixels.double()), target(pixels.double())
        for stage in _STAGES:
            error = expected[stage] - actual[stage]
            relative = (error.norm() / expected[stage].norm()).item()
            largest = error.abs().max().item(), expected[stage].abs().max().item()
            differences.append(Difference(stage, tuple(actual[stage].shape[1:]), *largest, relative))
    return differences


def difference_table(differences: list[Difference]) -> str:
    """A line for each stage and picture, as text."""
    rows = [(*row, "yes" if row.is_equal else "NO") for row in differences]
    headers = ("stage", "shape", "largest difference", "largest feature", "relative L2", "equal")
    return tabulate(rows, headers=headers)


def build_source(conversion: Conversion) -> nn.Module:
    """The network that was read, loaded under its own names."""
    layout, prefix, contract = conversion.layout, conversion.network.prefix, conversion.contract
    state = unwrap_state_dict(conversion.checkpoint)
    if layout == "haiku":
        return HaikuResNet(state, prefix)
    own = {name[len(prefix) :]: torch.as_tensor(v) for name, v in state.items() if name.startswith(prefix)}
    if layout in ("torchvision", "sequential", "timm", "swin"):
        return build_package(layout, own, contract)
    trained = contract | {"padding": conversion.metadata["source"].get("padding")}
    if is_swin(conversion.backbone):
        model = _drop_swin_norms(build_detectron2(contract, conversion.backbone))
        model.load_state_dict({name: own.get(name, value) for name, value in model.state_dict().items()})
    elif layout == "detectron2" or not conversion.metadata["config"]:
        model = build_detectron2(trained, conversion.backbone)
        model.load_state_dict(dict(conversion.backbone))
    else:
        cfg = CfgNode.load_cfg(conversion.metadata["config"])
        cfg.MODEL.RESNETS.OUT_FEATURES = list(_STAGES)
        model = build_backbone(cfg)
        model.load_state_dict(own)
    return model.eval()


def build_target(conversion: Conversion, path: str) -> nn.Module:
    """The network that `MODEL.WEIGHTS`, or a user of another package, gets out of the file `path`."""
    if conversion.target != "detectron2":
        written = {name: torch.as_tensor(v) for name, v in unwrap_state_dict(load_checkpoint(path)).items()}
        return build_package(conversion.target, written, conversion.contract)
    model = build_detectron2(conversion.contract, conversion.backbone)
    has_swin = is_swin(conversion.backbone)
    checkpointer = ObjSSLCheckpointer(model, metadata=conversion.metadata)
    checkpointer.load(path, checkpointables=[], require="backbone" if has_swin else "all")
    return (_drop_swin_norms(model) if has_swin else model).eval()


def build_detectron2(contract: Mapping[str, Any], backbone: Mapping[str, Any]) -> nn.Module:
    """The network of the contract, Detectron2's own ResNet where it has it, with random weights."""
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    if is_swin(backbone):
        for name in ("embed_dim", "depths", "num_heads", "window_size"):
            cfg.MODEL.SWIN[name.upper()] = contract[name]
        cfg.MODEL.BACKBONE.NAME = "build_swin_backbone"
        return build_backbone(cfg)
    for name in ("depth", "stride_in_1x1", "padding", "num_groups", *_WIDTHS):
        cfg.MODEL.RESNETS[name.upper()] = contract.get(name, False)  # only the stride may be unknown
    is_wide_basic = contract["depth"] < 50 and contract["res2_out_channels"] != 64
    if is_wide_basic:  # basic blocks only become wider by the multiplier
        cfg.MODEL.RESNETS.WIDTH_MULTIPLIER = contract["res2_out_channels"] // 64
        for name in _WIDTHS:
            cfg.MODEL.RESNETS[name.upper()] = contract[name] // cfg.MODEL.RESNETS.WIDTH_MULTIPLIER
    cfg.MODEL.RESNETS.OUT_FEATURES = list(_STAGES)
    cfg.MODEL.RESNETS.NORM = "BN" if "stem.conv1.norm.running_mean" in backbone else "GN"
    if is_wide_basic or contract["padding"] == "same" or contract["depth"] == 200:
        cfg.MODEL.BACKBONE.NAME = "build_objssl_resnet_backbone"
    else:
        cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    return build_backbone(cfg)


def build_package(layout: str, state: Mapping[str, Tensor], contract: Mapping[str, Any]) -> nn.Module:
    """The network of torchvision, timm, mmdetection or Microsoft with the weights `state`."""
    if "depth" not in contract:
        return (TorchvisionSwin if layout == "torchvision" else TimmSwin)(state, contract).eval()
    model = build_torchvision(contract)
    net = nn.Sequential(*model.children()) if layout == "sequential" else model
    needed = {name for name in net.state_dict() if not name.startswith(("fc.", "9."))}
    net.load_state_dict({name: v for name, v in state.items() if name in needed}, strict=False)
    missing = [name for name in needed - state.keys() if not name.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(f"torchvision's ResNet-{contract['depth']} misses {', '.join(sorted(missing)[:8])}")
    return create_feature_extractor(model.eval(), {f"layer{i}": stage for i, stage in enumerate(_STAGES, start=1)})


def build_torchvision(contract: Mapping[str, Any]) -> ResNet:
    """torchvision's ResNet with random weights; with the strides in the 1x1 convolutions it is mmdetection's "caffe".

    Raises:
        ValueError: if it has no network of these widths.
    """
    depth = contract["depth"]
    if contract["stem_out_channels"] != 64 or contract["res2_out_channels"] != (256 if depth >= 50 else 64):
        raise ValueError(
            f"torchvision has no ResNet-{depth} of {contract['stem_out_channels']} channels in the stem and "
            f"{contract['res2_out_channels']} in res2, to compare with"
        )
    model = ResNet(
        Bottleneck if depth >= 50 else BasicBlock,
        list(NUM_BLOCKS[depth]),
        groups=contract["num_groups"],
        width_per_group=contract["width_per_group"],
    )
    if contract.get("stride_in_1x1"):
        for block in (module for module in model.modules() if isinstance(module, Bottleneck)):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return model


def read_inputs(path: str | None, contract: Mapping[str, Any]) -> list[Tensor]:
    """Inputs of both networks, (1, 3, H, W) float32, normalised as the contract says: the picture, or noise.

    Padding as TensorFlow's depends on whether a size is even: that calls for noise of two sizes. Swin Transformers of
    other packages are made for one size: at res5 one window.
    """
    side = 32 * contract["window_size"] if "window_size" in contract else 224
    if path is None:
        generator = torch.Generator().manual_seed(0)
        sizes = [(side, side), (191, 223)] if contract.get("padding") == "same" else [(side, side)]
        return [torch.randn(1, 3, *size, generator=generator) for size in sizes]
    image = torch.from_numpy(read_image(path, contract.get("format", "RGB")).astype("float32")).permute(2, 0, 1)
    mean, std = (torch.tensor(contract.get(k, v)).view(-1, 1, 1) for k, v in IMAGENET_STATISTICS.items())
    normalized = ((image - mean) / std)[None]
    return [F.interpolate(normalized, (side, side), mode="bilinear") if "window_size" in contract else normalized]


def _drop_swin_norms(model: nn.Module) -> nn.Module:
    """Let a Swin Transformer of Detectron2 give res2 to res4 as its stages leave them (in place)."""
    for name in _SWIN_NORMS:
        setattr(model, name, nn.Identity())
    return model
