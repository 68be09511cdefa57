#!/usr/bin/env python
"""Draw what a config and its weights see, as one PNG.

Examples:
    # what the mapper feeds to pretraining: views, the area they share, and whether it aligns
    python tools/visualize.py views --config-file configs/pretrain/slotcon_R_50_800ep_coco.yaml
    # the regions that a pretrained model finds in your own photos
    python tools/visualize.py regions --config-file configs/pretrain/slotcon_R_50_800ep_coco.yaml \\
        --weights output/slotcon/model_final.pth --output regions.png DATASETS.TRAIN "('images:/data/my_photos',)"
    # ground truth beside what a fine-tuned model detects
    python tools/visualize.py detections --config-file configs/finetune/COCO/mask_rcnn_R_50_FPN_2fc_1x.yaml \\
        --weights output/mask_rcnn/model_final.pth --num-images 8
    # where two pretrained backbones look (Score-CAM, needs torchcam), side by side
    python tools/visualize.py attention --config-file configs/pretrain/semcl_R_50_30k_voc2012.yaml \\
        --weights moco_v3_R_50.pkl output/semcl/model_final.pth --images *.jpg --output attention.png
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_backbone, build_model
from torch import nn

from d2_objssl.attention import attention_map, overlay_attention
from d2_objssl.checkpoint import ObjSSLCheckpointer, checkpoint_metadata
from d2_objssl.data import ObjSSLDatasetMapper, build_test_loader, build_train_loader
from d2_objssl.data.depth_mapper import read_depth_map
from d2_objssl.data.ground_truth import read_label_map
from d2_objssl.depth_drawing import draw_depth
from d2_objssl.detection_drawing import draw_detections, draw_ground_truth
from d2_objssl.engine import resolve_norms, setup_cfg
from d2_objssl.visualization import (
    contact_sheet,
    draw_pairs,
    draw_regions,
    draw_views,
    overlay_region_map,
    region_caption,
    resize_longer_side,
    save_png,
)

_SIDE = 384  # longer side of an image in the sheets of `regions` and `attention`, pixels
_MAX_DETECTION_SIDE = 800  # in the sheet of `detections`
_NO_WEIGHTS = "no weights were given: name a checkpoint with --weights FILE"


def draw_training_views(cfg: CfgNode, args: argparse.Namespace) -> np.ndarray:
    """Contact sheet of the first views that training on DATASETS.TRAIN draws: with their regions or pairs, if there are."""
    if cfg.INPUT.SSL.NUM_VIEWS == 0:
        raise ValueError(f"INPUT.SSL.NUM_VIEWS is 0 in {args.config_file}: only pretraining has views to show")
    batch = next(iter(build_train_loader(cfg)))
    maps = [v.region_maps for v in batch.views if v.region_maps is not None and not v.overlapping]
    if cfg.INPUT.PAIRS.SOURCE != "none":
        sheet = draw_pairs(batch.views, args.num_images)
    elif maps:
        sheet = draw_regions(batch.views, maps, args.num_images)
    else:
        sheet = draw_views(batch.views, args.num_images)
    return sheet.permute(1, 2, 0).numpy()


def draw_predicted_regions(cfg: CfgNode, args: argparse.Namespace) -> np.ndarray:
    """Contact sheet of whole images of DATASETS.TRAIN, each beside its regions."""
    if cfg.MODEL.META_ARCHITECTURE != "ObjectSSL":
        raise ValueError(
            f'MODEL.META_ARCHITECTURE is "{cfg.MODEL.META_ARCHITECTURE}" in {args.config_file}: only the models of '
            "pretraining, ObjectSSL, predict regions"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST = args.min_size or _training_scale(cfg)
    cfg.freeze()
    model = load_model(cfg)
    images, captions = [], []
    for mapped in first_images(cfg, _first_name(cfg.DATASETS.TRAIN, "DATASETS.TRAIN"), args.num_images):
        with torch.no_grad():
            region_map = model([mapped])[0]["region_map"].cpu().numpy()
        image = resize_longer_side(read_image(mapped["file_name"], "RGB"), _SIDE)
        images += [image, overlay_region_map(image, region_map)]
        captions += [os.path.basename(mapped["file_name"]), region_caption(region_map)]
    return contact_sheet(images, 4, captions)


def draw_predicted_detections(cfg: CfgNode, args: argparse.Namespace) -> np.ndarray:
    """Contact sheet of images of DATASETS.TEST: ground truth on the left, predictions on the right."""
    if cfg.MODEL.META_ARCHITECTURE == "ObjectSSL":
        raise ValueError(f'MODEL.META_ARCHITECTURE is "ObjectSSL" in {args.config_file}: it detects nothing')
    name = _first_name(cfg.DATASETS.TEST, "DATASETS.TEST")
    model = load_model(cfg)
    metadata = MetadataCatalog.get(name)
    ground_truth = {d["file_name"]: d for d in DatasetCatalog.get(name)}
    images, captions = [], []
    for mapped in first_images(cfg, name, args.num_images):
        with torch.no_grad():
            prediction = model([mapped])[0]
        pair, caption = draw_prediction(prediction, ground_truth[mapped["file_name"]], metadata, args.score_threshold)
        images += pair
        captions += [f"{os.path.basename(mapped['file_name'])}: ground truth", caption]
    images = [x if max(x.shape) <= _MAX_DETECTION_SIDE else resize_longer_side(x, _MAX_DETECTION_SIDE) for x in images]
    return contact_sheet(images, 2, captions)


def draw_prediction(
    prediction: dict[str, Any], record: dict[str, Any], metadata: Any, score_threshold: float
) -> tuple[list[np.ndarray], str]:
    """Draw the ground truth of an image and what a model predicts, instances, classes of pixels or depth; and a caption."""
    image = read_image(record["file_name"], "RGB")
    if "instances" in prediction:
        detected = draw_detections(image, prediction["instances"], metadata, score_threshold)
        return [draw_ground_truth(record, metadata), detected], f"predictions from {score_threshold:.0%}"
    if "sem_seg" in prediction:
        labels = read_label_map(record["sem_seg_file_name"])
        labels[labels == metadata.ignore_label] = -1  # stays uncoloured
        predicted = prediction["sem_seg"].argmax(dim=0).cpu().numpy()
        return [overlay_region_map(image, labels), overlay_region_map(image, predicted)], "predicted classes"
    if "depth" in prediction:
        depth = prediction["depth"].cpu().numpy()
        farthest = float(depth.max())
        pictures = [np.vstack([image, draw_depth(x, farthest)]) for x in (read_depth_map(record), depth)]
        return pictures, f"predicted depth, red near, blue {farthest:.1f} m"
    raise ValueError(f"The model predicts {sorted(prediction)}: neither instances, nor classes of pixels, nor depth")


def draw_attention_maps(cfg: CfgNode, args: argparse.Namespace) -> np.ndarray:
    """Contact sheet of the images in --images, a row each: the image, then its Score-CAM map of every backbone."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST = args.min_size
    cfg.freeze()
    mapper = ObjSSLDatasetMapper(cfg, is_train=False)
    inputs = [mapper({"file_name": file})["image"] for file in args.images]
    images = [resize_longer_side(read_image(file, "RGB"), _SIDE) for file in args.images]
    columns, captions = [images], [[os.path.basename(file) for file in args.images]]
    mean, std = (torch.tensor(x, device=cfg.MODEL.DEVICE) for x in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    for path in args.weights or [cfg.MODEL.WEIGHTS]:
        backbone = load_backbone(cfg, path)
        feature = list(backbone.output_shape())[-1]
        normalized = ((x.to(mean) - mean[:, None, None]) / std[:, None, None] for x in inputs)
        maps = [attention_map(backbone, x, feature=feature, progress=True).cpu().numpy() for x in normalized]
        columns.append([overlay_attention(image, heat) for image, heat in zip(images, maps, strict=True)])
        # Checkpoints of several runs may all be called model_final.pth.
        captions.append([f"{'/'.join(path.split('/')[-2:])}, {feature}"] * len(images))
    sheet, texts = ([x for row in zip(*lists, strict=True) for x in row] for lists in (columns, captions))
    return contact_sheet(sheet, len(columns), texts)


def load_backbone(cfg: CfgNode, path: str) -> nn.Module:
    """Build the bottom-up network of `cfg`, without an FPN, and fill all of it from a file."""
    if not path:
        raise ValueError(_NO_WEIGHTS)
    backbone = build_backbone(resolve_norms(cfg))
    backbone = getattr(backbone, "bottom_up", backbone)
    ObjSSLCheckpointer(backbone, metadata=checkpoint_metadata(cfg)).load(path)
    return backbone.to(cfg.MODEL.DEVICE).eval()


def load_model(cfg: CfgNode) -> nn.Module:
    """Build the model of `cfg` and fill all of it from MODEL.WEIGHTS."""
    if not cfg.MODEL.WEIGHTS:
        raise ValueError(_NO_WEIGHTS)
    model = build_model(resolve_norms(cfg))
    ObjSSLCheckpointer(model, metadata=checkpoint_metadata(cfg)).load(cfg.MODEL.WEIGHTS, require="all")
    return model.eval()


def first_images(cfg: CfgNode, dataset_name: str, num_images: int) -> Iterator[dict[str, Any]]:
    """The first images of a data set, whole, as the mapper gives them to a model in evaluation."""
    batches = build_test_loader(cfg, dataset_name)
    return itertools.islice(itertools.chain.from_iterable(batches), num_images)


def _training_scale(cfg: CfgNode) -> int:
    """Shorter side at which things in a whole image are about as large as in the views that the model learned from."""
    ssl = cfg.INPUT.SSL
    return round(ssl.CROP_SIZE / (sum(ssl.CROP_SCALE) / 2) ** 0.5)


def _first_name(names: Sequence[str], key: str) -> str:
    if not names:
        raise ValueError(f"{key} is empty; name a data set, as KEY VALUE at the end of the command")
    return names[0]


_COMMANDS = {
    "views": (draw_training_views, "the views that pretraining is fed with, and the areas that they share"),
    "regions": (draw_predicted_regions, "the regions that a pretrained model finds in whole images of DATASETS.TRAIN"),
    "detections": (draw_predicted_detections, "ground truth and a fine-tuned model's predictions on DATASETS.TEST"),
    "attention": (draw_attention_maps, "the parts of images by which pretrained backbones recognise them"),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    summary, examples = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog=examples, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in _COMMANDS.items():
        about = f"Draw {text}."
        command = commands.add_parser(name, help=text, description=about, epilog=examples, formatter_class=raw)
        command.add_argument("--config-file", required=True, metavar="FILE", help="YAML config")
        command.add_argument("--output", metavar="PNG", help=f"the picture (default: OUTPUT_DIR/{name}.png)")
        if name == "attention":
            _add_attention_arguments(command)
        else:
            text = "images in the sheet (default: 4)"
            command.add_argument("--num-images", type=int, default=4, metavar="N", help=text)
        if name in ("regions", "detections"):
            command.add_argument("--weights", metavar="FILE", help="checkpoint (default: the config's MODEL.WEIGHTS)")
        if name == "regions":
            text = "shorter side of the images for the network (default: as large as views show things on average)"
            command.add_argument("--min-size", type=int, metavar="PIXELS", help=text)
        if name == "detections":
            text = "leave out detections below it (default: 0.5)"
            command.add_argument("--score-threshold", type=float, default=0.5, metavar="S", help=text)
        command.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to override")
    return parser


def _add_attention_arguments(command: argparse.ArgumentParser) -> None:
    text = "one or more checkpoints, a column each (default: the config's MODEL.WEIGHTS)"
    command.add_argument("--weights", nargs="+", metavar="FILE", help=text)
    command.add_argument("--images", nargs="+", required=True, metavar="FILE", help="images, a row each")
    text = "shorter side of the images for the network; costs grow with its square (default: 224)"
    command.add_argument("--min-size", type=int, default=224, metavar="PIXELS", help=text)


def main(argv: list[str] | None = None) -> None:
    """Draw one picture."""
    parser = build_parser()
    args = parser.parse_args(argv)
    opts = [*args.opts, "DATALOADER.NUM_WORKERS", "0"]
    if args.command != "attention":
        if args.num_images < 1:
            parser.error(f"--num-images is {args.num_images}; it must be positive")
        opts += ["SOLVER.IMS_PER_BATCH", str(args.num_images)]
        if getattr(args, "weights", None):
            opts += ["MODEL.WEIGHTS", args.weights]
    try:
        cfg = setup_cfg(args.config_file, opts)
        path = args.output or os.path.join(cfg.OUTPUT_DIR, f"{args.command}.png")
        save_png(path, _COMMANDS[args.command][0](cfg, args))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(path)


if __name__ == "__main__":
    main()
