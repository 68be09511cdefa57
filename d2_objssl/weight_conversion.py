"""Conversion of a file of weights: what it holds, whether the target package computes the same, and what is written.

load_checkpoint -> names and project (weight_names.py, weight_projects.py) -> `Conversion` -> `write_conversion`
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from torch import Tensor

from .checkpoint import FORMAT_VERSION, training_of
from .config import add_objssl_config
from .load_guard import LAYOUT_CONTRACTS, PADDING_ERROR, input_contract
from .weight_files import load_checkpoint, write_checkpoint
from .weight_names import (
    EXPORT_LAYOUTS,
    detect_layout,
    find_network,
    from_detectron2,
    infer_resnet,
    left_out_names,
    to_detectron2,
)
from .weight_names_swin import infer_swin, is_swin
from .weight_projects import Network

TARGETS = ("detectron2", *EXPORT_LAYOUTS)
IMAGENET_STATISTICS = {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.395, 57.12, 57.375]}


@dataclass(frozen=True)
class Conversion:
    """A network that was read, on its way to another layout.

    Attributes:
        path: the file it is from.
        checkpoint: its content.
        layout: one of LAYOUTS, of the names in it.
        network: the one that was taken.
        backbone: bare Detectron2 name -> tensor.
        target: one of TARGETS.
        metadata: as `checkpoint.checkpoint_metadata`, with "source": file, layout, prefix, project, padding.
    """

    path: str
    checkpoint: Mapping[str, Any]
    layout: str
    network: Network
    backbone: Mapping[str, Tensor]
    target: str
    metadata: dict[str, Any]

    @property
    def contract(self) -> dict[str, Any]:
        """The input contract of the target."""
        return self.metadata["input_contract"]


def read_conversion(
    path: str,
    *,
    target: str = "detectron2",
    layout: str = "auto",
    branch: str | None = None,
    padding: str | None = None,
    config_file: str | None = None,
) -> Conversion:
    """Read a file and see what it becomes.

    Args:
        path: see `load_checkpoint`.
        target: one of TARGETS.
        layout: one of LAYOUTS, or "auto": told by the keys.
        branch: see `to_detectron2`.
        padding: "symmetric" or "same", of the network that will load the result; None: as the file's.
        config_file: gives the input contract, where the file does not have it.

    Raises:
        ValueError: if the file cannot be read or is not understood, or the target computes something else.
    """
    checkpoint = load_checkpoint(path)
    try:
        if layout == "auto":
            layout = detect_layout(checkpoint)
        network = find_network(checkpoint, layout, branch=branch)
        # Clones: the tensors may still lie in the file, and in another memory format.
        backbone = {
            name: torch.as_tensor(value).detach().clone(memory_format=torch.contiguous_format)
            for name, value in to_detectron2(checkpoint, layout, branch=branch).items()
        }
        architecture = infer_swin(backbone) if is_swin(backbone) else infer_resnet(backbone)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    known = LAYOUT_CONTRACTS["timm" if is_swin(backbone) else layout] if layout in LAYOUT_CONTRACTS else {}
    stored = checkpoint.get("d2_objssl") or {}
    contract = dict(stored.get("input_contract") or (known and known | IMAGENET_STATISTICS))
    if config_file:
        contract = input_contract(load_config(config_file)) | (known if layout == "haiku" else {})
    source = {"file": os.path.basename(path), "layout": layout, "prefix": network.prefix, "project": network.project}
    if not is_swin(backbone):
        source["padding"] = known.get("padding") or contract.get("padding", "symmetric")
        architecture |= {"padding": padding or source["padding"]}
    metadata = {
        "format_version": FORMAT_VERSION,
        "method": stored.get("method"),
        "export_branch": network.branch,
        "input_contract": contract | architecture,
        "config": stored.get("config", ""),
        "training": training_of(checkpoint),
        "source": source,
    }
    conversion = Conversion(path, checkpoint, layout, network, backbone, target, metadata)
    if is_swin(backbone):
        if padding:
            raise ValueError(f"{path} holds a Swin Transformer; --padding is for ResNets")
        if target == "mmdetection":
            raise ValueError(
                f"{path} holds a Swin Transformer; mmdetection reads Microsoft's files (convert_weights=True)"
            )
    elif target != "detectron2":
        _check_export(conversion)
    return conversion


def write_conversion(conversion: Conversion, path: str) -> int:
    """Write the backbone with the target's names, as arrays (.pkl; bfloat16 becomes float32) or tensors (.pth).

    Returns:
        How many there are.

    Raises:
        OSError: see `write_checkpoint`.
        ValueError: see there; and for a .pkl file to be read by mmdetection.
    """
    target, backbone = conversion.target, conversion.backbone
    model: dict[str, Any] = dict(backbone) if target == "detectron2" else from_detectron2(backbone, target)
    if path.endswith(".pkl"):
        if target == "mmdetection":
            raise ValueError(f"{path}: mmdetection reads files of torch.save; the name must end in .pth")
        model = {name: (v.float() if v.dtype == torch.bfloat16 else v).numpy() for name, v in model.items()}
    entry = "state_dict" if target == "mmdetection" else "model"
    content: dict[str, Any] = {entry: model, "__author__": "d2_objssl", "d2_objssl": conversion.metadata}
    if target == "detectron2":
        content["matching_heuristics"] = True  # lets Detectron2's own checkpointer find the place in the model
    write_checkpoint(content, path)
    return len(model)


def describe(conversion: Conversion, path: str) -> str:
    """What was taken, what was left out, and how the file `path` is to be loaded, as text."""
    layout, network, contract = conversion.layout, conversion.network, conversion.contract
    origin = ", ".join(part for part in (network.project, network.branch, f"{layout} names") if part)
    place = f' behind "{network.prefix}"' if network.prefix else ""
    lines = [
        f"{conversion.path}: {origin}{place}",
        f"{path}: {_network_name(contract)} with {conversion.target} names",
    ]
    known, unknown = left_out_names(conversion.checkpoint, layout, branch=network.branch)
    for title, counts in (("left out", known), ("warning: left out, and unknown", unknown)):
        if counts:
            lines.append(f"{title}: " + ", ".join(f"{name} ({n})" for name, n in list(counts.items())[:12]))
    trained, chosen = conversion.metadata["source"].get("padding"), contract.get("padding")
    if chosen != trained:
        lines.append(f"warning: trained with {trained} padding; with {chosen} its features are off by {PADDING_ERROR}")
    if chosen == "same":
        lines.append("load it with MODEL.BACKBONE.NAME build_objssl_resnet_fpn_backbone MODEL.RESNETS.PADDING same")
    if conversion.target == "mmdetection":
        lines.append(mmdetection_config(contract, path))
    return "\n".join(lines)


def mmdetection_config(contract: Mapping[str, Any], path: str) -> str:
    """What an mmdetection config must say for the file `path` to mean the same, as its Python text.

    mmdetection reads pictures as BGR; mean and deviation are in the order after its own conversion.
    """
    kind = "ResNet" if contract["num_groups"] == 1 else "ResNeXt"
    groups = "" if kind == "ResNet" else f"groups={contract['num_groups']}, base_width={contract['width_per_group']}, "
    style = "caffe" if contract.get("stride_in_1x1") else "pytorch"
    statistics = f"mean={contract['pixel_mean']}, std={contract['pixel_std']}"
    to_rgb = contract["format"] == "RGB"
    return (
        f"backbone=dict(type={kind!r}, depth={contract['depth']}, {groups}style={style!r},\n"
        f"              init_cfg=dict(type='Pretrained', checkpoint={path!r}))\n"
        f"data_preprocessor=dict({statistics}, bgr_to_rgb={to_rgb})  # mmdetection 3\n"
        f"img_norm_cfg=dict({statistics}, to_rgb={to_rgb})  # mmdetection 2"
    )


def load_config(path: str) -> CfgNode:
    """Read a config file that may use the keys of this package."""
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.merge_from_file(path)
    return cfg


def _network_name(contract: Mapping[str, Any]) -> str:
    if "depth" in contract:
        return f"ResNet-{contract['depth']}"
    blocks = "-".join(map(str, contract["depths"]))
    return f"Swin Transformer of {contract['embed_dim']} channels and {blocks} blocks"


def _check_export(conversion: Conversion) -> None:
    """Refuse what the ResNets of torchvision, timm and mmdetection compute in another way."""
    path, target, contract = conversion.path, conversion.target, conversion.contract
    if contract["depth"] >= 50 and "stride_in_1x1" not in contract:
        raise ValueError(
            f"{path} does not tell where it strides; say it with --config-file (MODEL.RESNETS.STRIDE_IN_1X1)"
        )
    if contract["depth"] >= 50 and contract["stride_in_1x1"] and target != "mmdetection":
        raise ValueError(f"{path} strides in its 1x1 convolutions, {target}'s ResNet in the 3x3: not the same")
    if contract["padding"] == "same":
        raise ValueError(
            f"{path} pads as TensorFlow does, {target}'s ResNet symmetrically; --padding symmetric converts it "
            f"all the same, its features are then off by {PADDING_ERROR}"
        )
    if target == "mmdetection":
        _check_mmdetection(conversion)


def _check_mmdetection(conversion: Conversion) -> None:
    """Refuse what mmdetection has no network for, and what its config could not be told."""
    path, contract = conversion.path, conversion.contract
    if missing := [key for key in ("format", "pixel_mean", "pixel_std") if key not in contract]:
        raise ValueError(
            f"{path} does not tell its {', '.join(missing)}, which mmdetection's config needs: --config-file"
        )
    if "stem.conv1.norm.running_mean" not in conversion.backbone:
        raise ValueError(f"{path} has no batch normalisation; mmdetection gives other norms other names")
    widths = contract["stem_out_channels"], contract["res2_out_channels"]
    is_usual = contract["num_groups"] > 1 or contract["depth"] < 50 or contract["width_per_group"] == 64
    if contract["depth"] == 200 or widths != (64, 64 if contract["depth"] < 50 else 256) or not is_usual:
        raise ValueError(f"{path}: mmdetection has no ResNet-{contract['depth']} of these widths")
