"""`evaluate.py concepts`: what the prototypes of a pretrained model stand for, and how much they are used."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...concept_drawing import draw_concepts, plot_prototype_use
from ...data.center_crops import CenterCrops
from ...data.region_keys import assign_region_keys, find_image_roots
from ...modeling import ObjectSSL
from ...visualization import save_png
from ..concepts import ConceptSearch, assign_images, find_concepts
from ..results import write_record
from .options import check_outputs, positive
from .prototype_options import add_prototype_arguments, describe_run, load_images, load_model, run_options

SUMMARY = "the segments most like each prototype, active and dead prototypes"


def run(args: argparse.Namespace) -> None:
    """Print, store and draw the concepts that the prototypes found in a data set."""
    start = time.perf_counter()
    check_outputs(args)
    dataset_dicts = load_images(args.dataset)
    assign_region_keys(dataset_dicts, find_image_roots([args.dataset]))
    dataset = CenterCrops(dataset_dicts[: args.limit], short_side=args.short_side, crop_size=args.crop_size)
    cfg, model = load_model(args)
    assert model.prototypes is not None
    selected = check_prototypes(args.prototypes, len(model.prototypes))
    search = find_concepts(
        model, dataset, k=args.top, object_centric=args.object_centric, progress=True, **run_options(args)
    )
    metrics = search.statistics()
    print(f"{len(model.prototypes)} prototypes, {len(dataset)} images")
    print(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    if args.output:
        counts = {"num_images": len(dataset), "num_prototypes": len(model.prototypes)}
        record = describe_run(args, cfg, **counts, wall_time_s=time.perf_counter() - start)
        details = {
            "object_centric": args.object_centric,
            "active_slots_histogram": search.active_histogram.tolist(),
            "images_per_prototype": search.num_active.tolist(),
            "concepts": list_concepts(search, dataset),
        }
        write_record(args.output, {"task": "visual concepts", "metrics": metrics, **record, **details})
        print(args.output)
    if args.statistics_picture:
        use = search.active_histogram.cpu().numpy(), search.num_active.cpu().numpy()
        save_png(args.statistics_picture, plot_prototype_use(*use))
        print(args.statistics_picture)
    if args.picture:
        chosen = by_use(search) if selected is None else selected
        pages = draw_pages(search, model, dataset, chosen, args)
        for number, page in enumerate(pages, start=1):
            path = page_path(args.picture, number)
            save_png(path, page)
            print(path)


def check_prototypes(selected: Sequence[int] | None, num_prototypes: int) -> Sequence[int] | None:
    """Return the prototypes that were asked for.

    Raises:
        ValueError: if the model does not have one of them.
    """
    for prototype in selected or ():
        if not 0 <= prototype < num_prototypes:
            raise ValueError(
                f"--prototypes names {prototype}, but the model has the prototypes 0 to {num_prototypes - 1}"
            )
    return selected


def by_use(search: ConceptSearch) -> list[int]:
    """The prototypes that have segments, the one with most of them first."""
    counts = search.num_segments.cpu().numpy()
    order = np.argsort(-counts, kind="stable")
    return order[counts[order] > 0].tolist()


def list_concepts(search: ConceptSearch, dataset: CenterCrops) -> list[dict[str, Any]]:
    """The top segments of each prototype that has any, as plain types; images by their "region_key"."""
    return [
        {
            "prototype": prototype,
            "num_segments": int(search.num_segments[prototype]),
            "top": [
                {"image": dataset.dataset_dicts[i]["region_key"], "cosine": round(cosine, 4)}
                for i, cosine in top_segments(search, prototype)
            ],
        }
        for prototype in by_use(search)
    ]


def top_segments(search: ConceptSearch, prototype: int) -> list[tuple[int, float]]:
    """Place in the data set, and cosine, of the best segments of a prototype."""
    images, cosines = search.top.images[prototype].tolist(), search.top.cosines[prototype].tolist()
    return [(i, c) for i, c in zip(images, cosines, strict=True) if i >= 0]


def draw_pages(
    search: ConceptSearch, model: ObjectSSL, dataset: CenterCrops, prototypes: Sequence[int], args: argparse.Namespace
) -> Iterator[np.ndarray]:
    """Sheets of `args.rows` prototypes each; those without a segment are left out."""
    drawn = [p for p in prototypes if search.num_segments[p] > 0]
    if len(drawn) < len(prototypes):
        print(f"not drawn, without a segment: {sorted(set(prototypes) - set(drawn))}")
    for first in range(0, len(drawn), args.rows):
        page = {p: top_segments(search, p) for p in drawn[first : first + args.rows]}
        images = sorted({i for segments in page.values() for i, _ in segments})
        segmented = assign_images(model, dataset, images, **run_options(args))
        rows = []
        for p, segments in page.items():
            masks = [None if args.object_centric else segmented[i][1] == p for i, _ in segments]
            captions = [f"{cosine:.2f}" for _, cosine in segments]
            captions[0] = f"{p}: {int(search.num_segments[p])} images, {captions[0]}"
            pictures = [segmented[i][0] for i, _ in segments]
            rows.append(list(zip(pictures, masks, captions, strict=True)))
        yield draw_concepts(rows, args.picture_side)


def page_path(picture: str, number: int) -> str:
    """NAME.png for the first page, NAME_2.png for the second, ..."""
    path = Path(picture)
    return picture if number == 1 else str(path.with_name(f"{path.stem}_{number}{path.suffix}"))


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `concepts`."""
    text = "catalog name, or images:PATH; no labels are read"
    command.add_argument("--dataset", required=True, metavar="NAME", help=text)
    text = "each image is one segment, for data sets of one object an image, as ImageNet"
    command.add_argument("--object-centric", action="store_true", help=text)
    text = "segments kept of each prototype (default: %(default)s)"
    command.add_argument("--top", type=positive, default=10, metavar="K", help=text)
    text = "draw the top segments; further pages are NAME_2.png, NAME_3.png, ..."
    command.add_argument("--picture", metavar="PNG", help=text)
    text = "draw these prototypes (default: all that have segments, by the number of their images)"
    command.add_argument("--prototypes", type=int, nargs="+", metavar="N", help=text)
    text = "prototypes on a page (default: %(default)s)"
    command.add_argument("--rows", type=positive, default=16, metavar="N", help=text)
    text = "side of an image in the picture, pixels (default: %(default)s)"
    command.add_argument("--picture-side", type=positive, default=112, metavar="PIXELS", help=text)
    text = "draw how many prototypes are active in an image, and in how many images each is"
    command.add_argument("--statistics-picture", metavar="PNG", help=text)
    add_prototype_arguments(command, short_side=256, crop_size=224)
