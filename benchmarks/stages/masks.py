"""Felzenszwalb and Huttenlocher's regions of an image, against scikit-image."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from skimage.segmentation import felzenszwalb

from d2_objssl.data.image_reading import read_rgb_image
from d2_objssl.proposals import felzenszwalb_regions

from .data import make_photographs
from .timing import Measurement, Row, repeat_in_turns

SUMMARY = "Felzenszwalb's regions of an image, and how far they agree with scikit-image's"
_SCALE = 1000  # and min_size: DetCon's setting for COCO


def run(args: argparse.Namespace) -> Measurement:
    """Time both, and compare their regions by the adjusted Rand index."""
    from sklearn.metrics import adjusted_rand_score  # optional

    num_images = min(args.num_images, 6) if args.quick else args.num_images
    with tempfile.TemporaryDirectory(prefix="d2_objssl-speed-") as own_folder:
        if args.images is None:
            make_photographs(Path(own_folder), num_images, args.seed)
        paths = sorted((args.images or Path(own_folder)).glob("*.jpg"))[:num_images]
        if not paths:
            raise ValueError(f"--images {args.images}: no *.jpg there")
        images = [read_rgb_image(str(path)) for path in paths]
    contestants: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "plain": lambda image: felzenszwalb(image, scale=_SCALE, sigma=0.8, min_size=_SCALE),
        "ours": lambda image: felzenszwalb_regions(image, _SCALE, _SCALE),
    }
    agreement = [adjusted_rand_score(*(f(image).ravel() for f in contestants.values())) for image in images]
    runs = repeat_in_turns(
        {k: partial(time_images, f, images) for k, f in contestants.items()}, args.repeats, args.seed
    )
    medians = {name: statistics.median(values) for name, values in runs.items()}
    print(f"adjusted Rand index over {len(images)} images: mean {np.mean(agreement):.5f}, least {min(agreement):.5f}")
    row = Row("Felzenszwalb regions", medians["plain"], medians["ours"], unit="ms CPU an image", goal=5.0)
    details = {"num_images": len(images), "rand_index": agreement, "ms_per_image": runs}
    return Measurement([row], details)


def time_images(segment: Callable[[np.ndarray], np.ndarray], images: list[np.ndarray]) -> float:
    """Mean CPU time, ms per image."""
    start = time.process_time()
    for image in images:
        segment(image)
    return 1e3 * (time.process_time() - start) / len(images)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this stage."""
    parser.add_argument("--images", type=Path, help="folder of *.jpg (default: generates its own)")
    parser.add_argument("--num-images", type=int, default=24, help="how many to use or generate (--quick: 6)")
