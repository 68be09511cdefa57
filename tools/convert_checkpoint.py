#!/usr/bin/env python3
"""Convert a checkpoint to a backbone for Detectron2, torchvision or timm, and compare the networks.

    python tools/convert_checkpoint.py output/model_final.pth slotcon_r50.pkl --verify
    python tools/convert_checkpoint.py moco_v2_800ep_pretrain.pth.tar moco_v2_r50.pkl --verify
    python tools/convert_checkpoint.py output/model_final.pth slotcon_r50_tv.pth --to torchvision
    python tools/convert_checkpoint.py resnet50_detcon_b_imagenet_1k.npy detcon_b_r50.pkl --verify
    python tools/convert_checkpoint.py swin_tiny_patch4_window7_224_22k.pth swin_t.pkl --verify

INPUT may be a checkpoint of pretraining or fine-tuning with this package, a Detectron2 model, a ResNet of torchvision,
timm, MoCo, the official SlotCon and others, one of DetCon in JAX (haiku; .npy or .npz), or a Swin Transformer of
Microsoft, torchvision or timm, in any format that can be read safely. Without --branch the network is taken that the
method is known for: the teacher of SlotCon, the student (online network) of CYBORGS, DetCon and SemCL.

OUTPUT ends in .pkl (NumPy arrays, for MODEL.WEIGHTS of any Detectron2) or .pth (tensors, for torch.load). It also holds
the input contract: format and statistics of the pixels, and what else of the config the weights depend on.

Swin Transformers: the last normalisation of a classification network becomes that of res5. Those of res2 to res4 do not
exist there; in a detector they start with weight 1 and bias 0, and converting to torchvision or timm drops them.

haiku pads as TensorFlow does. Two ways lead from there:
exact: as it is. The config then needs
    MODEL.BACKBONE.NAME build_objssl_resnet_fpn_backbone MODEL.RESNETS.PADDING same
plain: with --padding symmetric, for the usual backbone. The weights are the same, the features are not (--verify shows
    by how much, and returns 1): fine-tuning has to make up for it.
DetCon's files take pixels in [0, 1], less ImageNet's mean and divided by its standard deviation. The ones trained on
COCO leave out mean and deviation: --config-file with PIXEL_MEAN [0.0, 0.0, 0.0], PIXEL_STD [255.0, 255.0, 255.0].
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, get_cfg
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_backbone
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from d2_objssl.checkpoint import (
    FORMAT_VERSION,
    LAYOUT_CONTRACTS,
    LAYOUTS,
    PADDING_ERROR,
    ObjSSLCheckpointer,
    backbone_prefix,
    detect_layout,
    file_sha256,
    from_detectron2,
    infer_resnet,
    input_contract,
    load_checkpoint,
    to_detectron2,
    unwrap_state_dict,
    write_checkpoint,
)
from d2_objssl.config import add_objssl_config
from d2_objssl.haiku_resnet import HaikuResNet
from d2_objssl.swin_sources import TimmSwin, TorchvisionSwin, import_timm_swin
from d2_objssl.weight_names import NUM_BLOCKS
from d2_objssl.weight_names_swin import infer_swin, is_swin

STAGES = ("res2", "res3", "res4", "res5")
TOLERANCE = 1e-5  # of the largest feature
WIDTHS = ("width_per_group", "res2_out_channels", "stem_out_channels")
SWIN_NORMS = ("norm0", "norm1", "norm2")  # of res2 to res4, which other packages do not have
IMAGENET_STATISTICS = {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.395, 57.12, 57.375]}


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 1 if --verify found that the networks differ; 2 for a file or an argument that cannot be used.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="INPUT", help="file to read, or detectron2:// or https:// address")
    parser.add_argument("output", metavar="OUTPUT", help="file to write: .pkl or .pth")
    parser.add_argument("--branch", choices=("student", "teacher"), help="network to take (default: the method's)")
    parser.add_argument("--layout", choices=("auto", *LAYOUTS), default="auto", help="names in INPUT")
    parser.add_argument("--to", choices=("detectron2", "torchvision", "timm"), default="detectron2")
    parser.add_argument(
        "--padding", choices=("symmetric", "same"), help="of the backbone that will load OUTPUT (default: as INPUT's)"
    )
    parser.add_argument("--config-file", help="config with the input contract, where INPUT does not have it")
    parser.add_argument("--verify", action="store_true", help="run both networks, compare res2 to res5")
    parser.add_argument("--image", help="picture for --verify (default: noise, always the same)")
    args = parser.parse_args(argv)
    try:
        return convert(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def convert(args: argparse.Namespace) -> int:
    """Convert as `args` say, and return the exit status."""
    checkpoint = load_checkpoint(args.input)
    layout = detect_layout(checkpoint) if args.layout == "auto" else args.layout
    prefix = backbone_prefix(checkpoint, layout, branch=args.branch)
    # Clones: the tensors of INPUT may still lie in the file, and in another memory format.
    backbone = {
        name: torch.as_tensor(value).detach().clone(memory_format=torch.contiguous_format)
        for name, value in to_detectron2(checkpoint, layout, branch=args.branch).items()
    }
    metadata = make_metadata(args, checkpoint.get("d2_objssl") or {}, layout, prefix, backbone)
    contract = metadata["input_contract"]
    if is_swin(backbone):
        check_swin(args, layout)
    elif args.to != "detectron2":
        check_torchvision(args, contract)
    num_tensors = write_output(args.output, backbone, args.to, metadata)
    print(
        f"{args.output}: {describe(contract)} with {args.to} names, {num_tensors} tensors, "
        f'from {args.input} ({layout} names behind "{prefix}")\nsha256 {file_sha256(args.output)}'
    )
    trained, chosen = metadata["source"].get("padding"), contract.get("padding")
    if chosen != trained:
        print(f"warning: trained with {trained} padding; with {chosen} its features are off by {PADDING_ERROR}")
    if chosen == "same":
        print("load it with MODEL.BACKBONE.NAME build_objssl_resnet_fpn_backbone MODEL.RESNETS.PADDING same")
    if not args.verify:
        return 0
    source = build_source(checkpoint, layout, prefix, backbone, metadata)
    target = build_target(args.output, args.to, metadata, backbone)
    return compare(source, target, read_inputs(args.image, contract))


def check_swin(args: argparse.Namespace, layout: str) -> None:
    """Refuse what Swin Transformers do not have, and find out now whether they can be compared."""
    if args.padding:
        raise ValueError(f"{args.input} holds a Swin Transformer; --padding is for ResNets")
    if args.verify and {"timm", "swin"} & {layout, args.to}:
        import_timm_swin()


def describe(contract: Mapping[str, Any]) -> str:
    """The name of a network, such as "ResNet-50"."""
    if "depth" in contract:
        return f"ResNet-{contract['depth']}"
    blocks = "-".join(map(str, contract["depths"]))
    return f"Swin Transformer of {contract['embed_dim']} channels and {blocks} blocks"


def check_torchvision(args: argparse.Namespace, contract: Mapping[str, Any]) -> None:
    """Refuse what torchvision's and timm's ResNets compute in another way."""
    if contract["depth"] >= 50 and contract.get("stride_in_1x1"):
        raise ValueError(f"{args.input} strides in its 1x1 convolutions, {args.to}'s ResNet in the 3x3: not the same")
    if contract["padding"] == "same":
        raise ValueError(
            f"{args.input} pads as TensorFlow does, {args.to}'s ResNet symmetrically; --padding symmetric converts it "
            f"all the same, its features are then off by {PADDING_ERROR}"
        )


def make_metadata(
    args: argparse.Namespace, stored: Mapping[str, Any], layout: str, prefix: str, backbone: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Metadata of OUTPUT: what INPUT `stored`, completed by the shapes, the layout and --config-file."""
    known = LAYOUT_CONTRACTS["timm" if is_swin(backbone) else layout] if layout in LAYOUT_CONTRACTS else {}
    contract: dict[str, Any] = dict(stored.get("input_contract") or {})
    if known and not contract:
        contract = known | IMAGENET_STATISTICS
    if args.config_file:
        contract = input_contract(load_config(args.config_file)) | (known if layout == "haiku" else {})
    source = {"file": os.path.basename(args.input), "layout": layout, "prefix": prefix}
    if is_swin(backbone):
        contract |= infer_swin(backbone)
    else:
        source["padding"] = known.get("padding") or contract.get("padding", "symmetric")
        contract |= infer_resnet(backbone) | {"padding": args.padding or source["padding"]}
    branch = prefix.split(".")[0]
    return {
        "format_version": FORMAT_VERSION,
        "method": stored.get("method"),
        "export_branch": branch if branch in ("student", "teacher") else args.branch,
        "input_contract": contract,
        "config": stored.get("config", ""),
        "source": source,
    }


def load_config(path: str) -> CfgNode:
    """Read a config file that may use the keys of this package."""
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.merge_from_file(path)
    return cfg


def write_output(path: str, backbone: Mapping[str, Tensor], layout: str, metadata: Mapping[str, Any]) -> int:
    """Write the backbone with the names of `layout`, as arrays (.pkl; bfloat16 becomes float32) or tensors (.pth).

    Returns:
        How many there are.
    """
    model: dict[str, Any] = dict(backbone) if layout == "detectron2" else from_detectron2(backbone, layout)
    if path.endswith(".pkl"):
        model = {name: (v.float() if v.dtype == torch.bfloat16 else v).numpy() for name, v in model.items()}
    content: dict[str, Any] = {"model": model, "__author__": "d2_objssl", "d2_objssl": dict(metadata)}
    if layout == "detectron2":
        content["matching_heuristics"] = True  # lets Detectron2's own checkpointer find the place in the model
    write_checkpoint(content, path)
    return len(model)


def build_source(
    checkpoint: Mapping[str, Any], layout: str, prefix: str, backbone: Mapping[str, Any], metadata: Mapping[str, Any]
) -> nn.Module:
    """The network of INPUT, loaded under INPUT's own names: a picture (1, 3, H, W) -> features by stage."""
    state = unwrap_state_dict(checkpoint)
    if layout == "haiku":
        return HaikuResNet(state, prefix)
    own = {name[len(prefix) :]: torch.as_tensor(v) for name, v in state.items() if name.startswith(prefix)}
    if layout in ("torchvision", "timm", "swin"):
        return build_package(layout, own, metadata["input_contract"])
    if is_swin(backbone):
        model = drop_swin_norms(build_detectron2(metadata["input_contract"], backbone))
        model.load_state_dict({name: own.get(name, value) for name, value in model.state_dict().items()})
        return model.eval()
    if layout == "detectron2" or not metadata["config"]:
        trained = {"padding": metadata["source"]["padding"]}
        model = build_detectron2(metadata["input_contract"] | trained, backbone)
        model.load_state_dict(dict(backbone))
        return model.eval()
    cfg = CfgNode.load_cfg(metadata["config"])
    cfg.MODEL.RESNETS.OUT_FEATURES = list(STAGES)
    model = build_backbone(cfg)
    model.load_state_dict(own)
    return model.eval()


def build_target(path: str, layout: str, metadata: Mapping[str, Any], backbone: Mapping[str, Any]) -> nn.Module:
    """The network that `MODEL.WEIGHTS`, or a user of torchvision, gets out of OUTPUT."""
    if layout != "detectron2":
        written = {name: torch.as_tensor(v) for name, v in unwrap_state_dict(load_checkpoint(path)).items()}
        return build_package(layout, written, metadata["input_contract"])
    model = build_detectron2(metadata["input_contract"], backbone)
    require = "backbone" if is_swin(backbone) else "all"
    ObjSSLCheckpointer(model, metadata=metadata).load(path, checkpointables=[], require=require)
    return (drop_swin_norms(model) if is_swin(backbone) else model).eval()


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
    for name in ("depth", "stride_in_1x1", "padding", "num_groups", *WIDTHS):
        cfg.MODEL.RESNETS[name.upper()] = contract.get(name, False)  # only the stride may be unknown
    is_wide_basic = contract["depth"] < 50 and contract["res2_out_channels"] != 64
    if is_wide_basic:  # basic blocks only become wider by the multiplier
        cfg.MODEL.RESNETS.WIDTH_MULTIPLIER = contract["res2_out_channels"] // 64
        for name in WIDTHS:
            cfg.MODEL.RESNETS[name.upper()] = contract[name] // cfg.MODEL.RESNETS.WIDTH_MULTIPLIER
    cfg.MODEL.RESNETS.OUT_FEATURES = list(STAGES)
    cfg.MODEL.RESNETS.NORM = "BN" if "stem.conv1.norm.running_mean" in backbone else "GN"
    if is_wide_basic or contract["padding"] == "same" or contract["depth"] == 200:
        cfg.MODEL.BACKBONE.NAME = "build_objssl_resnet_backbone"
    else:
        cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    return build_backbone(cfg)


def drop_swin_norms(model: nn.Module) -> nn.Module:
    """Let a Swin Transformer of Detectron2 give res2 to res4 as its stages leave them (in place)."""
    for name in SWIN_NORMS:
        setattr(model, name, nn.Identity())
    return model


def build_package(layout: str, state: Mapping[str, Tensor], contract: Mapping[str, Any]) -> nn.Module:
    """The network of torchvision, timm or Microsoft with the weights `state`."""
    if "depth" in contract:
        return build_torchvision(state, contract)
    return (TorchvisionSwin if layout == "torchvision" else TimmSwin)(state, contract).eval()


def build_torchvision(state: Mapping[str, Tensor], contract: Mapping[str, Any]) -> nn.Module:
    """torchvision's ResNet with the backbone's part of `state`."""
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
    needed = {name for name in model.state_dict() if not name.startswith("fc.")}
    model.load_state_dict({name: v for name, v in state.items() if name in needed}, strict=False)
    missing = [name for name in needed - state.keys() if not name.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(f"torchvision's ResNet-{depth} misses {', '.join(sorted(missing)[:8])}")
    return create_feature_extractor(model.eval(), {f"layer{i}": stage for i, stage in enumerate(STAGES, start=1)})


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


@torch.no_grad()
def compare(source: nn.Module, target: nn.Module, images: list[Tensor]) -> int:
    """Print how much the features of two networks differ; 1 if by more than TOLERANCE anywhere.

    In float64: deep networks amplify what float32 rounds away.
    """
    source, target = source.double(), target.double()
    rows = []
    for image in images:
        expected, actual = source(image.double()), target(image.double())
        for stage in STAGES:
            difference = expected[stage] - actual[stage]
            error, largest = difference.abs().max().item(), expected[stage].abs().max().item()
            relative = (difference.norm() / expected[stage].norm()).item()
            is_equal = error <= TOLERANCE * largest
            rows.append((stage, tuple(actual[stage].shape[1:]), error, largest, relative, "yes" if is_equal else "NO"))
    print(tabulate(rows, headers=("stage", "shape", "largest difference", "largest feature", "relative L2", "equal")))
    return 0 if all(row[-1] == "yes" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
