#!/usr/bin/env python3
"""Convert a checkpoint to a backbone for Detectron2, torchvision, timm or mmdetection, and compare the networks.

    python tools/convert_checkpoint.py output/model_final.pth slotcon_r50.pkl --verify
    python tools/convert_checkpoint.py moco_v2_800ep_pretrain.pth.tar moco_v2_r50.pkl --verify
    python tools/convert_checkpoint.py dino_resnet50_pretrain_full_checkpoint.pth dino_r50.pkl --branch student
    python tools/convert_checkpoint.py output/model_final.pth slotcon_r50_tv.pth --to torchvision
    python tools/convert_checkpoint.py output/model_final.pth slotcon_r50_mmdet.pth --to mmdetection
    python tools/convert_checkpoint.py resnet50_detcon_b_imagenet_1k.npy detcon_b_r50.pkl --verify
    python tools/convert_checkpoint.py swin_tiny_patch4_window7_224_22k.pth swin_t.pkl --verify

INPUT may be a checkpoint of pretraining or fine-tuning with this package, a Detectron2 model, a ResNet of torchvision,
timm, mmdetection, SlotCon, CYBORGS, SemCL, MoCo v1 to v3, DenseCL, PixPro, BYOL, SwAV, DINO and others, one of DetCon
or BYOL in JAX (haiku; .npy, .npz or .pkl), or a Swin Transformer of Microsoft, torchvision or timm, in any format that
can be read safely. It is recognised by its keys. Without --branch the network is taken that the project itself
evaluates: the teacher of SlotCon and DINO, the student (online, query, base network) of the others. Files with
torchvision's names count as trained on RGB with the strides in the 3x3; of mmdetection's "caffe" backbones that is not
true: give a --config-file.

OUTPUT ends in .pkl (NumPy arrays, for MODEL.WEIGHTS of any Detectron2) or .pth (tensors, for torch.load). It also holds
the input contract: format and statistics of the pixels, and what else of the config the weights depend on. For
mmdetection it is a {"state_dict": ...} with the names of its ResNet; what its config must say is printed.

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

from d2_objssl.swin_sources import import_timm_swin
from d2_objssl.weight_comparison import compare_networks, difference_table
from d2_objssl.weight_conversion import TARGETS, describe, read_conversion, write_conversion
from d2_objssl.weight_files import file_sha256
from d2_objssl.weight_names import LAYOUTS
from d2_objssl.weight_names_swin import is_swin


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 1 if --verify found that the networks differ; 2 for a file or an argument that cannot be used.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="INPUT", help="file to read, or detectron2:// or https:// address")
    parser.add_argument("output", metavar="OUTPUT", help="file to write: .pkl or .pth")
    parser.add_argument("--branch", choices=("student", "teacher"), help="network to take (default: the project's)")
    parser.add_argument("--layout", choices=("auto", *LAYOUTS), default="auto", help="names in INPUT")
    parser.add_argument("--to", choices=TARGETS, default="detectron2")
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
    if os.path.exists(args.input) and os.path.exists(args.output) and os.path.samefile(args.input, args.output):
        raise ValueError(f"OUTPUT {args.output} is the file INPUT, which would be lost: choose another name")
    conversion = read_conversion(
        args.input,
        target=args.to,
        layout=args.layout,
        branch=args.branch,
        padding=args.padding,
        config_file=args.config_file,
    )
    if args.verify and is_swin(conversion.backbone) and {"timm", "swin"} & {conversion.layout, args.to}:
        import_timm_swin()  # raises now, not when the file is written
    num_tensors = write_conversion(conversion, args.output)
    print(f"{describe(conversion, args.output)}\n{num_tensors} tensors, sha256 {file_sha256(args.output)}")
    if not args.verify:
        return 0
    differences = compare_networks(conversion, args.output, args.image)
    print(difference_table(differences))
    return 0 if all(difference.is_equal for difference in differences) else 1


if __name__ == "__main__":
    sys.exit(main())
