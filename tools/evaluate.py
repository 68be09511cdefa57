#!/usr/bin/env python
"""Measure what pretraining works with or has made, without fine-tuning.

Examples:
    # which regions cover the objects of COCO best?
    python tools/evaluate.py regions --dataset coco_2017_val --limit 500 --num-workers 8 \\
        --source grid:5 felzenszwalb:1000:1000 selective_search file:region_maps/coco_val \\
        --output regions.json --picture regions.png
    # do the prototypes of configs/pretrain/slotcon_R_50_800ep_coco_27_prototypes.yaml segment COCO-Stuff? (centre crop 320)
    python tools/evaluate.py segmentation --dataset coco_2017_val_stuff_27 \\
        --weights output/slotcon_27_prototypes/model_final.pth \\
        --image-list Coco164kFull_Stuff_Coarse_7.txt --output segmentation.json --picture segmentation.png
    # what do the prototypes stand for?
    python tools/evaluate.py concepts --dataset coco_2017_val_images --weights output/slotcon/model_final.pth \\
        --picture concepts.png --statistics-picture prototypes.png --output concepts.json
    # which classes are in an image? VOC07 classification by linear SVMs on frozen features
    python tools/evaluate.py svm --weights slotcon_R_50.pkl --num-workers 8 --output svm.json
"""

from __future__ import annotations

import argparse
import sys

from d2_objssl.evaluation.commands import COMMANDS


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    summary, examples = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog=examples, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        about = f"Measure: {module.SUMMARY}."
        command = commands.add_parser(
            name, help=module.SUMMARY, description=about, epilog=examples, formatter_class=raw
        )
        module.add_arguments(command)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run one measurement."""
    args = build_parser().parse_args(argv)
    try:
        COMMANDS[args.command].run(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
