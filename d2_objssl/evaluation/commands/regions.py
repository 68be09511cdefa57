"""`evaluate.py regions`: how well sources of regions cover labelled objects."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from ...data import register_image_folders
from ...data.ground_truth import paint_objects, shape_of
from ...data.image_reading import read_rgb_image
from ...data.region_keys import assign_region_keys, find_image_roots
from ...data.region_maps import (
    FelzenszwalbRegions,
    FileRegions,
    GlobalRegions,
    GridRegions,
    InstanceRegions,
    RegionSource,
    SelectiveSearchRegions,
    SemSegRegions,
)
from ...proposals import resize_regions
from ...structures import MAX_OVERLAPPING
from ...visualization import contact_sheet, overlay_region_map, region_colors, resize_longer_side, save_png
from ..region_quality import best_overlaps, count_regions, evaluate_sources, instance_masks
from ..results import write_record
from .options import check_outputs, positive

SUMMARY = "average best overlap of region sources with labelled objects"

# name of a source -> (what --source takes, how the source is made of the settings)
_SOURCES: dict[str, tuple[str, Callable[..., RegionSource]]] = {
    "grid": ("grid:SIZE", lambda size: GridRegions(int(size))),
    "global": ("global", lambda: GlobalRegions()),
    "felzenszwalb": (
        "felzenszwalb:SCALE:MIN_SIZE",
        lambda scale, min_size: FelzenszwalbRegions([(float(scale), int(min_size))]),
    ),
    "selective_search": (
        "selective_search[:NUM]",
        lambda num_proposals=MAX_OVERLAPPING: SelectiveSearchRegions(int(num_proposals)),
    ),
    "instances": ("instances", lambda: InstanceRegions()),
    "sem_seg": ("sem_seg", lambda: SemSegRegions()),
    "file": ("file:ROOT", lambda root: FileRegions(root)),
}
_SOURCE_FORMS = ", ".join(form for form, _ in _SOURCES.values())


def run(args: argparse.Namespace) -> None:
    """Print, and store, the overlap of regions with the labelled objects of a data set."""
    start = time.perf_counter()
    check_outputs(args)
    sources = {spec: parse_source(spec) for spec in args.source}
    dataset_dicts = load_labelled_images(args.dataset, args.limit)
    for source in sources.values():
        source.check(dataset_dicts)
    results = evaluate_sources(dataset_dicts, sources, num_workers=args.num_workers, progress=True)
    print(format_results(results))
    if args.output:
        write_record(args.output, make_record(args, results, wall_time_s=time.perf_counter() - start))
        print(args.output)
    if args.picture:
        save_png(args.picture, draw_sources(dataset_dicts, sources, args.num_pictures, args.picture_side))
        print(args.picture)


def parse_source(spec: str) -> RegionSource:
    """Make the source that a word of the command line, "name" or "name:settings", describes.

    Raises:
        ValueError: if there is no such source, or its settings do not fit.
    """
    name, _, text = spec.partition(":")
    if name not in _SOURCES:
        raise ValueError(f'--source "{spec}" is unknown; it must be one of {_SOURCE_FORMS}')
    settings = [] if not text else [text] if name == "file" else text.split(":")
    form, build = _SOURCES[name]
    try:
        return build(*settings)
    except TypeError as error:
        raise ValueError(f'--source "{spec}" is not of the form {form}') from error
    except ValueError as error:
        raise ValueError(f'--source "{spec}", of the form {form}: {error}') from error


def load_labelled_images(dataset_name: str, limit: int | None) -> list[dict[str, Any]]:
    """Dataset dicts of the first `limit` images of a data set (None: all), with region keys and the ignored label.

    Raises:
        ValueError: if the data set is unknown or has no instance annotations.
    """
    register_image_folders([dataset_name])
    if dataset_name not in DatasetCatalog:
        raise ValueError(f'--dataset "{dataset_name}" is not in the DatasetCatalog')
    dataset_dicts = [dict(d) for d in DatasetCatalog.get(dataset_name)]
    assign_region_keys(dataset_dicts, find_image_roots([dataset_name]))
    dataset_dicts = dataset_dicts[:limit]
    metadata = MetadataCatalog.get(dataset_name)
    for d in dataset_dicts:
        d.setdefault("ignore_label", metadata.get("ignore_label", None))
    if not any(not a.get("iscrowd", 0) for d in dataset_dicts for a in d.get("annotations", ())):
        images = "" if limit is None else f" in its first {limit} images"
        raise ValueError(f'--dataset "{dataset_name}" has no instance annotations{images} to compare regions with')
    return dataset_dicts


def format_results(results: dict[str, dict[str, float]]) -> str:
    """The table of `evaluate_sources`' results, one line a source."""
    columns = {
        "ABO": ("abo", ".3f"),
        "ABO per image": ("abo_per_image", ".3f"),
        "recall@0.5": ("recall_at_50", ".3f"),
        "regions per image": ("regions_per_image", ".1f"),
        "seconds per image": ("seconds_per_image", ".3f"),
    }
    rows = [[spec, *(r[key] for key, _ in columns.values())] for spec, r in results.items()]
    formats = ("", *(form for _, form in columns.values()))
    first = next(iter(results.values()))
    counts = f"{first['num_instances']} instances in {first['num_images']} images"
    return f"{tabulate(rows, ['source', *columns], floatfmt=formats)}\n{counts}"


def make_record(
    args: argparse.Namespace, results: Mapping[str, Mapping[str, float]], *, wall_time_s: float
) -> dict[str, Any]:
    """The record of a run; see `results.py`.

    Args:
        args, results: the options, and what `evaluate_sources` returned, which the record has as "results".
        wall_time_s: seconds.
    """
    percentages = {"ABO": "abo", "ABO per image": "abo_per_image", "recall@0.5": "recall_at_50"}
    metrics = {
        f"{spec}/{name}": round(100 * r[key], 3) for spec, r in results.items() for name, key in percentages.items()
    }
    return {
        "task": "regions",
        "dataset": args.dataset,
        "limit": args.limit,
        "num_images": next(iter(results.values()))["num_images"],
        "metrics": metrics,
        "results": results,
        **dict.fromkeys(("weights", "config", "seed", "precision")),  # there is no network
        "wall_time_s": round(wall_time_s, 1),
    }


def draw_sources(
    dataset_dicts: Sequence[dict[str, Any]], sources: Mapping[str, RegionSource], num_images: int, side: int
) -> np.ndarray:
    """Contact sheet of labelled images, evenly spaced in the data set: ground truth, then the regions of each source."""
    labelled = [d for d in dataset_dicts if d.get("annotations")]
    chosen = np.linspace(0, len(labelled) - 1, min(num_images, len(labelled))).round().astype(int)
    tiles, captions = [], []
    for d in (labelled[i] for i in chosen):
        image = read_rgb_image(d["file_name"])
        tile = resize_longer_side(image, side)
        gt_masks = instance_masks(d)
        objects = [a for a in d["annotations"] if not a.get("iscrowd", 0) and shape_of(a)]
        painted = paint_objects(objects, image.shape[0], image.shape[1], d["file_name"])
        tiles.append(overlay_region_map(tile, painted - 1))
        captions.append(f"ground truth: {len(gt_masks)}")
        for spec, source in sources.items():
            region_map, overlapping = source(image, d), source.overlapping
            tiles.append(outline_regions(tile, region_map) if overlapping else overlay_region_map(tile, region_map))
            overlaps = best_overlaps(region_map, gt_masks, overlapping=overlapping)
            abo = f", ABO {overlaps.mean():.2f}" if len(overlaps) else ""
            captions.append(f"{spec}: {count_regions(region_map, overlapping=overlapping)}{abo}")
    return contact_sheet(tiles, 1 + len(sources), captions)


def outline_regions(image: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Draw the outlines of regions that may overlap, the best one last.

    Args:
        image: (H, W, 3) uint8 RGB.
        bits: bit set of the same area, of any size.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    drawn = image.copy()
    resized = resize_regions(bits, *image.shape[:2])
    for r in reversed(range(MAX_OVERLAPPING)):
        mask = (resized >> r & 1).astype(np.uint8)
        outlines, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, outlines, -1, region_colors(MAX_OVERLAPPING)[r].tolist(), 2)
    return drawn


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `regions`."""
    command.add_argument("--dataset", required=True, metavar="NAME", help="catalog name, with instance annotations")
    text = f"where the regions come from: {_SOURCE_FORMS}"
    command.add_argument("--source", required=True, nargs="+", metavar="SPEC", help=text)
    text = "take the first N images (default: all)"
    command.add_argument("--limit", type=positive, metavar="N", help=text)
    command.add_argument("--num-workers", type=int, default=0, metavar="N", help="processes (default: this one)")
    command.add_argument("--output", metavar="JSON", help="store the numbers, with the command and the versions")
    command.add_argument("--picture", metavar="PNG", help="draw some images with their regions")
    text = "images in the picture (default: %(default)s)"
    command.add_argument("--num-pictures", type=positive, default=4, metavar="N", help=text)
    text = "longer side of an image in the picture, pixels (default: %(default)s)"
    command.add_argument("--picture-side", type=positive, default=224, metavar="N", help=text)
