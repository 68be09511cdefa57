"""`evaluate.py segmentation`: semantic segmentation by the prototypes of a pretrained model, without training."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import Metadata, MetadataCatalog
from tabulate import tabulate

from ...concept_drawing import draw_segmentations
from ...data.center_crops import IGNORED_CLASS, CenterCrops
from ...data.coco_stuff_27 import keep_listed_images
from ...data.known_sizes import expected_size
from ...visualization import save_png
from ..results import write_record
from ..unsupervised_segmentation import (
    UNMATCHED,
    Segmentation,
    match_majority,
    match_one_to_one,
    segment_dataset,
    segmentation_metrics,
)
from .options import check_outputs, positive
from .prototype_options import add_prototype_arguments, describe_run, load_images, load_model, run_options

SUMMARY = "semantic segmentation by the prototypes of pretraining, without labels"

_TASK = "unsupervised segmentation"

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> None:
    """Print, and store, mIoU and pixel accuracy of the prototypes on a data set with label maps."""
    start = time.perf_counter()
    check_outputs(args)
    dataset_dicts = select_images(args.dataset, args.image_list, args.limit)
    metadata = MetadataCatalog.get(args.dataset)
    names = list(metadata.stuff_classes)
    dataset = CenterCrops(
        dataset_dicts, short_side=args.short_side, crop_size=args.crop_size, class_of_label=class_of_label(metadata)
    )
    cfg, model = load_model(args)
    num_samples = args.num_pictures if args.picture else 0
    found = segment_dataset(model, dataset, len(names), num_samples=num_samples, progress=True, **run_options(args))
    matched = match_one_to_one(found.histogram)
    metrics, iou = segmentation_metrics(found.histogram, matched)
    majority, _ = segmentation_metrics(found.histogram, match_majority(found.histogram))
    metrics |= {f"majority/{name}": value for name, value in majority.items()}
    print(tabulate([(name, iou[c]) for c, name in enumerate(names)], ["class", "IoU"], floatfmt=".2f"))
    print(f"{len(found.histogram)} prototypes, {len(names)} classes, {len(dataset)} images")
    print(", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))
    if args.output:
        counts = {"num_images": len(dataset), "num_prototypes": len(found.histogram)}
        record = describe_run(args, cfg, **counts, wall_time_s=time.perf_counter() - start) | chosen_images(args)
        iou_of_class = {name: None if np.isnan(value) else float(value) for name, value in zip(names, iou, strict=True)}
        details = {"iou_per_class": iou_of_class, "class_of_prototype": matched.tolist()}
        write_record(args.output, {"task": _TASK, "metrics": metrics, **record, **details})
        print(args.output)
    if args.picture:
        save_png(args.picture, draw_samples(found, matched, names, args.picture_side))
        print(args.picture)


def select_images(dataset_name: str, list_file: str | None, limit: int | None) -> list[dict[str, Any]]:
    """Dataset dicts of the images that a file lists (None: all), the first `limit` of them (None: all).

    Warns where the list does not have as many images as that of the published numbers.

    Raises:
        ValueError: if the data set is unknown or has no label maps.
    """
    dataset_dicts = load_images(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    if not metadata.get("stuff_classes") or "sem_seg_file_name" not in dataset_dicts[0]:
        raise ValueError(f'--dataset "{dataset_name}" has no semantic label maps; is it "{dataset_name}_sem_seg"?')
    if list_file is not None:
        dataset_dicts = keep_listed_images(dataset_dicts, list_file)
    expected = metadata.get("num_curated_images")
    if expected is not None and expected != len(dataset_dicts):
        logger.warning(
            "%s: %d images, but published numbers are of %d: give their list with --image-list",
            dataset_name,
            len(dataset_dicts),
            expected,
        )
    return dataset_dicts[:limit]


def is_record_of(args: argparse.Namespace, record: Mapping[str, Any]) -> bool:
    """Whether a record is of these options, on the images that published numbers are of; of any weights.

    The model is as its checkpoint says: no record with another config, or with overrides, is.
    """
    same = {"task": _TASK, "dataset": args.dataset, "short_side": args.short_side, "crop_size": args.crop_size}
    same |= {"overrides": list(args.opts), **chosen_images(args)}
    if any(field not in record or record[field] != value for field, value in same.items()) or record["config"]["file"]:
        return False
    metadata = MetadataCatalog.get(args.dataset)
    return (metadata.get("num_curated_images") or expected_size(metadata)) in (None, record["num_images"])


def chosen_images(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of a record that say which of the data set's images were taken."""
    return {"image_list": args.image_list and Path(args.image_list).name, "limit": args.limit}


def class_of_label(metadata: Metadata) -> dict[int, int]:
    """Class of each value of a data set's label maps; `fine_to_coarse` in its metadata merges them."""
    fine_to_coarse = metadata.get("fine_to_coarse")
    num_classes = len(metadata.stuff_classes)
    if num_classes > IGNORED_CLASS:
        raise ValueError(f"{metadata.name} has {num_classes} classes; at most {IGNORED_CLASS} can be matched")
    table = dict(enumerate(range(num_classes))) if fine_to_coarse is None else dict(fine_to_coarse)
    ignored = metadata.get("ignore_label")
    return table if ignored is None else table | {ignored: IGNORED_CLASS}


def draw_samples(
    found: Segmentation, class_of_prototype: np.ndarray, class_names: Sequence[str], side: int
) -> np.ndarray:
    """Contact sheet of the samples: image, ground truth, and the classes of the pixels' prototypes."""
    truth = [np.where(c == IGNORED_CLASS, UNMATCHED, c.astype(np.int64)) for c in found.classes]
    predictions = [class_of_prototype[p] for p in found.predictions]
    return draw_segmentations(found.images, truth, predictions, class_names, side)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `segmentation`."""
    command.add_argument("--dataset", required=True, metavar="NAME", help="catalog name, with semantic label maps")
    text = "take the images named there, one a line without suffix, e.g. Coco164kFull_Stuff_Coarse_7.txt"
    command.add_argument("--image-list", metavar="FILE", help=text)
    command.add_argument("--picture", metavar="PNG", help="draw some images with ground truth and prediction")
    text = "images in the picture (default: %(default)s)"
    command.add_argument("--num-pictures", type=positive, default=6, metavar="N", help=text)
    text = "side of an image in the picture, pixels (default: %(default)s)"
    command.add_argument("--picture-side", type=positive, default=224, metavar="PIXELS", help=text)
    add_prototype_arguments(command, short_side=320, crop_size=320)
