"""What the subcommands that read prototypes have in common: their options, the model, the images."""

from __future__ import annotations

import argparse
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ...data import register_image_folders
from ...modeling import ObjectSSL
from ..prototype_model import PRECISIONS, load_prototype_model, pretraining_cfg
from ..results import config_identity, weights_identity
from .options import positive


def add_prototype_arguments(command: argparse.ArgumentParser, *, short_side: int, crop_size: int) -> None:
    """Add the options; `short_side` and `crop_size` are the paper's, pixels."""
    command.add_argument("--weights", default="", metavar="FILE", help="checkpoint of pretraining")
    text = "YAML config (default: the one in the checkpoint); without --weights: of a random initialisation"
    command.add_argument("--config-file", default="", metavar="FILE", help=text)
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of a random initialisation (default: 0)")
    text = "shorter side to which images are resized, pixels (default: %(default)s, the paper's)"
    command.add_argument("--short-side", type=positive, default=short_side, metavar="PIXELS", help=text)
    text = "side of the centre crop, pixels (default: %(default)s, the paper's)"
    command.add_argument("--crop-size", type=positive, default=crop_size, metavar="PIXELS", help=text)
    text = "take the first N images (default: all)"
    command.add_argument("--limit", type=positive, metavar="N", help=text)
    text = "images at a time (default: %(default)s)"
    command.add_argument("--batch-size", type=positive, default=16, metavar="N", help=text)
    text = "processes that read images (default: this one)"
    command.add_argument("--num-workers", type=int, default=0, metavar="N", help=text)
    command.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the network")
    command.add_argument("--output", metavar="JSON", help="store the numbers, with the command and the versions")
    command.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to override")


def load_images(dataset_name: str) -> list[dict[str, Any]]:
    """Dataset dicts of a data set of the catalog, or of images:PATH.

    Raises:
        ValueError: if the data set is unknown or empty.
    """
    register_image_folders([dataset_name])
    if dataset_name not in DatasetCatalog:
        raise ValueError(f'--dataset "{dataset_name}" is not in the DatasetCatalog')
    dataset_dicts = DatasetCatalog.get(dataset_name)
    if not dataset_dicts:
        raise ValueError(f'--dataset "{dataset_name}" has no image')
    return dataset_dicts


def load_model(args: argparse.Namespace) -> tuple[CfgNode, ObjectSSL]:
    """The config and the model that the options name."""
    cfg = pretraining_cfg(args.weights, args.config_file, args.opts)
    return cfg, load_prototype_model(cfg, seed=args.seed)


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `prototype_model.embed_dataset`."""
    return {"batch_size": args.batch_size, "num_workers": args.num_workers, "precision": args.precision}


def describe_run(
    args: argparse.Namespace, cfg: CfgNode, *, num_images: int, num_prototypes: int, wall_time_s: float
) -> dict[str, Any]:
    """The fields of a record (see evaluation/results.py) that say what was run."""
    return {
        "dataset": args.dataset,
        "num_images": num_images,
        "short_side": args.short_side,
        "crop_size": args.crop_size,
        "num_prototypes": num_prototypes,
        "weights": weights_identity(args.weights),
        "config": config_identity(cfg, args.config_file),
        "overrides": list(args.opts),
        "seed": None if args.weights else args.seed,
        "precision": args.precision,
        "wall_time_s": round(wall_time_s, 1),
    }
