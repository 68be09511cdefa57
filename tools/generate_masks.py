#!/usr/bin/env python3
"""Make the region maps of a data set and write them to a folder, for INPUT.REGIONS.SOURCE "file".

    python tools/generate_masks.py --dataset coco_2017_train_images --source felzenszwalb --setting 1000 1000 \\
        --output datasets/regions/coco_fh1000 --num-workers 8 --preview fh1000.png
    python tools/generate_masks.py --dataset images:photos --source mcg --proposals MCG-COCO-train2014-proposals \\
        --output datasets/regions/photos_mcg
    python tools/generate_masks.py --output datasets/regions/coco_fh1000 --preview fh1000.png

Whatever interrupts it, the same command goes on where it stopped. Images that cannot be read get no map; training
replaces them. Sources:

    grid, global       n x n rectangles (--grid-size); the whole image
    felzenszwalb       segments; with several --setting, as DetCon has on COCO, one is drawn for each image by its name
    selective_search   the best boxes, overlapping (--num-proposals)
    instances, sem_seg ground truth of the data set
    mcg                folder of .mat files of MCG's proposals (--proposals), the best by score, overlapping
    coco_rle           JSON files of results in COCO's format (--proposals), the best by score, overlapping
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import setup_logger
from PIL import Image

from d2_objssl.data import register_image_folders
from d2_objssl.data.bad_images import printable
from d2_objssl.data.image_reading import read_rgb_image
from d2_objssl.data.proposal_import import CocoRleProposals, McgProposals
from d2_objssl.data.region_files import MapSettings, RegionIndex, map_path
from d2_objssl.data.region_generation import GenerationReport, generate_maps
from d2_objssl.data.region_keys import assign_region_keys, find_image_roots
from d2_objssl.data.region_maps import (
    FelzenszwalbRegions,
    GlobalRegions,
    GridRegions,
    InstanceRegions,
    RegionSource,
    SelectiveSearchRegions,
    SemSegRegions,
)
from d2_objssl.structures import MAX_OVERLAPPING, NO_REGION
from d2_objssl.visualization import contact_sheet, overlay_region_map, region_caption, save_png

# source -> its options, and their defaults; None: it must be given
_OPTIONS: dict[str, dict[str, Any]] = {
    "grid": {"grid_size": 5, "max_regions": 256},
    "global": {"max_regions": 256},
    "felzenszwalb": {"setting": [[1000.0, 1000.0]], "max_regions": 256},
    "selective_search": {"num_proposals": MAX_OVERLAPPING},
    "instances": {"max_regions": 256},
    "sem_seg": {"max_regions": 256},
    "mcg": {"proposals": None, "num_proposals": MAX_OVERLAPPING},
    "coco_rle": {"proposals": None, "num_proposals": MAX_OVERLAPPING},
}
_NUM_PREVIEWED = 12
_PREVIEW_SIDE = 320  # longer side of a previewed image, pixels


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, details = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", nargs="+", metavar="NAME", help="names in the catalog, or images:PATH")
    parser.add_argument("--source", choices=list(_OPTIONS), help="what makes the maps")
    parser.add_argument("--output", required=True, metavar="ROOT", help="the folder, later INPUT.REGIONS.ROOT")
    text = "felzenszwalb: scale and least size of a segment in pixels (default: 1000 1000); may be repeated"
    parser.add_argument("--setting", nargs=2, type=float, action="append", metavar=("SCALE", "MIN_SIZE"), help=text)
    parser.add_argument("--grid-size", type=int, metavar="N", help="grid: N x N regions (default: 5)")
    parser.add_argument("--proposals", nargs="+", metavar="PATH", help="mcg: a folder; coco_rle: JSON files")
    text = f"overlapping sources: how many proposals of an image, at most and by default {MAX_OVERLAPPING}"
    parser.add_argument("--num-proposals", type=int, metavar="N", help=text)
    text = "others: of an image with more regions, the N largest are kept (default: 256)"
    parser.add_argument("--max-regions", type=int, metavar="N", help=text)
    parser.add_argument("--num-workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--limit", type=int, metavar="N", help="do the first N images only")
    text = f"draw {_NUM_PREVIEWED} images with their regions; with --output alone, those of a complete folder"
    parser.add_argument("--preview", metavar="PNG", help=text)
    return parser


def get_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """The options of --source, defaults filled in; ends the program for those of other sources."""
    given = {name for options in _OPTIONS.values() for name in options if getattr(args, name) is not None}
    own = _OPTIONS[args.source]
    if foreign := sorted(given - own.keys()):
        parser.error(f"--{foreign[0].replace('_', '-')} is no option of --source {args.source}")
    options = {name: getattr(args, name) if name in given else default for name, default in own.items()}
    if None in options.values():
        parser.error(f"--source {args.source} needs --proposals")
    if args.source == "mcg" and len(args.proposals) > 1:
        parser.error(f"--source mcg takes one folder of --proposals, not {len(args.proposals)}")
    if options.get("max_regions", 1) < 1:
        parser.error(f"--max-regions is {options['max_regions']}; it must be positive")
    return options


def build_source(name: str, options: dict[str, Any]) -> RegionSource:
    """The source `name`."""
    builders = {
        "grid": lambda: GridRegions(options["grid_size"]),
        "global": GlobalRegions,
        "felzenszwalb": lambda: FelzenszwalbRegions([(scale, int(size)) for scale, size in options["setting"]]),
        "selective_search": lambda: SelectiveSearchRegions(options["num_proposals"]),
        "instances": InstanceRegions,
        "sem_seg": lambda: SemSegRegions(options["max_regions"]),
        "mcg": lambda: McgProposals(options["proposals"][0], options["num_proposals"]),
        "coco_rle": lambda: CocoRleProposals(options["proposals"], options["num_proposals"]),
    }
    return builders[name]()


def load_dicts(names: Sequence[str], source: RegionSource | None = None) -> list[dict[str, Any]]:
    """Dataset dicts, with "region_key" and what `source` needs."""
    register_image_folders(names)
    dicts: list[dict[str, Any]] = []
    for name in names:
        if name not in DatasetCatalog:
            raise ValueError(f'"{name}" (--dataset) is no data set of the catalog; a folder of images is "images:PATH"')
        loaded = DatasetCatalog.get(name)
        dicts += source.prepare(loaded, MetadataCatalog.get(name)) if source is not None else loaded
    assign_region_keys(dicts, find_image_roots(names))
    if source is not None:
        source.check(dicts)
    return dicts


def format_command(args: argparse.Namespace, options: dict[str, Any]) -> str:
    """The command that makes all maps."""
    words = ["python", "tools/generate_masks.py", "--dataset", *args.dataset, "--source", args.source]
    for name, value in options.items():
        if getattr(args, name) is not None:
            for values in value if name == "setting" else [value]:
                flag = f"--{name.replace('_', '-')}"
                words += [flag, *(f"{v:g}" if isinstance(v, float) else str(v) for v in np.atleast_1d(values).tolist())]
    return shlex.join([*words, "--output", args.output, "--num-workers", str(args.num_workers)])


def generate(args: argparse.Namespace, options: dict[str, Any]) -> None:
    """Make the maps and report."""
    source = build_source(args.source, options)
    dicts = load_dicts(args.dataset, source)
    settings = MapSettings(
        source=args.source,
        options=options,
        overlapping=source.overlapping,
        resolution="image",
        dataset_names=args.dataset,
        command=format_command(args, options),
    )
    max_regions = options.get("max_regions", MAX_OVERLAPPING)
    report = generate_maps(
        args.output,
        dicts[: args.limit],
        source,
        settings,
        max_regions=max_regions,
        num_workers=args.num_workers,
        progress=True,
    )
    print_report(args.output, report, max_regions)
    if report.num_maps == 0:
        raise ValueError(f"none of the {len(report.unreadable)} images of {' '.join(args.dataset)} could be read")


def print_report(root: str, report: GenerationReport, max_regions: int) -> None:
    """Print what was done, and the images without a map."""
    if report.num_new:
        print(
            f"{report.num_new} images in {report.seconds:.1f} s, {report.seconds_per_image:.3f} s each in its process"
        )
    if report.num_limited:
        print(f"{report.num_limited} of them had more than {max_regions} regions; the largest ones were kept")
    print(
        f"{root}: {report.num_maps} maps of {report.bytes_per_map:.0f} bytes and {report.ids_per_map:.1f} regions on "
        f"average, {report.max_ids} regions at most"
    )
    if report.unreadable:
        names = map(printable, report.unreadable)
        print(f"{len(report.unreadable)} images could not be read and have no map:", *names, sep="\n  ")


def draw_preview(root: str) -> np.ndarray:
    """Contact sheet of images spread over a complete folder, each beside its regions: (H, W, 3) uint8 RGB.

    Of regions that overlap, the smaller one is on top.
    """
    index = RegionIndex.load(root)
    dicts = [d for d in load_dicts(index.settings.dataset_names) if map_path(root, d["region_key"]).exists()]
    if not dicts:
        raise ValueError(f"{root} has no map to draw")
    images, captions = [], []
    for i in np.linspace(0, len(dicts) - 1, min(_NUM_PREVIEWED, len(dicts))).round().astype(int):
        image = read_rgb_image(dicts[i]["file_name"])
        region_map = index.read(dicts[i]["region_key"], *image.shape[:2])
        caption = region_caption(region_map)
        if index.overlapping:
            caption = f"{int(np.bitwise_or.reduce(region_map, axis=None)).bit_count()} overlapping regions"
            region_map = smallest_of_overlapping(region_map)
        small = Image.fromarray(image)
        small.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
        images += [np.asarray(small), overlay_region_map(np.asarray(small), region_map)]
        captions += [dicts[i]["region_key"], caption]
    return contact_sheet(images, 4, captions)


def smallest_of_overlapping(bits: np.ndarray) -> np.ndarray:
    """(H, W) bit sets -> (H, W) ids of the smallest region of each pixel, and NO_REGION."""
    masks = (bits >> np.arange(MAX_OVERLAPPING)[:, None, None]) & 1 == 1
    ids = np.full(bits.shape, NO_REGION)
    for r in np.argsort(-masks.sum(axis=(1, 2)), kind="stable"):
        ids[masks[r]] = r
    return ids


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.source is None and (args.dataset or not args.preview):
        parser.error("give --dataset and --source, or --preview to see a complete folder")
    if args.source is not None and not args.dataset:
        parser.error("--dataset is missing")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit is {args.limit}; it must be positive")
    setup_logger(name="d2_objssl")
    try:
        if args.source is not None:
            generate(args, get_options(parser, args))
        if args.preview:
            save_png(args.preview, draw_preview(args.output))
            print(f"preview in {args.preview}")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")


if __name__ == "__main__":
    main()
