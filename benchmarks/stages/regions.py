"""A JPEG file and its region map to two views with maps, against Pillow and torchvision's functional transforms."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional

from d2_objssl.data import ObjSSLDatasetMapper
from d2_objssl.data.region_maps import RegionSource

from .data import BLUR_PROBS, CROP_RATIO, CROP_SCALE, CROP_SIZE, FLIP_PROB, OwnViews, PlainViews, make_photographs
from .timing import Measurement, Row, repeat_in_turns

SUMMARY = "a JPEG file and its region map to two views with maps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this stage."""
    parser.add_argument("--images", type=Path, help="folder of *.jpg (default: generates its own)")
    parser.add_argument("--num-images", type=int, default=64, help="how many to use or generate (--quick: 16)")


def run(args: argparse.Namespace) -> Measurement:
    """Time both; maps are read from PNG files of the image's size."""
    num_images = min(args.num_images, 16) if args.quick else args.num_images
    with tempfile.TemporaryDirectory(prefix="d2_objssl-speed-") as own_folder:
        folder = args.images or Path(own_folder)
        if args.images is None:
            make_photographs(folder, num_images, args.seed)
        pairs = make_maps(sorted(folder.glob("*.jpg"))[:num_images], Path(own_folder))
        if not pairs:
            raise ValueError(f"--images {folder}: no *.jpg there")
        contestants = {"plain": PlainViewsWithMaps(), "ours": OwnViewsWithMaps()}
        runs = repeat_in_turns(
            {k: partial(time_pairs, f, pairs) for k, f in contestants.items()}, args.repeats, args.seed
        )
    medians = {name: statistics.median(values) for name, values in runs.items()}
    row = Row("JPEG and region map to two views", medians["plain"], medians["ours"], unit="ms CPU an image", goal=1.6)
    return Measurement([row], {"num_images": len(pairs), "ms_per_image": runs})


def make_maps(paths: list[Path], folder: Path) -> list[tuple[str, str]]:
    """Write a map of blocks for each image; returns (image, map) paths."""
    pairs = []
    for i, path in enumerate(paths):
        with Image.open(path) as image:
            width, height = image.size
        rows, columns = np.arange(height) * 7 // height, np.arange(width) * 9 // width
        map_path = folder / f"map_{i:04d}.png"
        Image.fromarray((rows[:, None] * 9 + columns).astype(np.uint8)).save(map_path)
        pairs.append((str(path), str(map_path)))
    return pairs


class PlainViewsWithMaps(PlainViews):
    """The plain way: one crop and flip for image and map, by torchvision's functional transforms on Pillow images."""

    def __call__(self, image_path: str, map_path: str) -> list[Any]:
        """Two (image, map) pairs."""
        image, region_map = Image.open(image_path).convert("RGB"), Image.open(map_path)
        views = []
        for _ in BLUR_PROBS:
            box = transforms.RandomResizedCrop.get_params(image, list(CROP_SCALE), list(CROP_RATIO))
            size = [CROP_SIZE, CROP_SIZE]
            crop = functional.resized_crop(image, *box, size, InterpolationMode.BICUBIC)
            moved = functional.resized_crop(region_map, *box, size, InterpolationMode.NEAREST)
            if np.random.uniform() < FLIP_PROB:
                crop, moved = functional.hflip(crop), functional.hflip(moved)
            views.append((self.color(crop), torch.from_numpy(np.array(moved, dtype=np.int64))))
        images = self._blur([image for image, _ in views])
        return [(self.to_tensor(image), moved) for image, (_, moved) in zip(images, views, strict=True)]


class _PngRegions(RegionSource):
    """Reads the map that the dataset dict names."""

    def __call__(self, image: np.ndarray, dataset_dict: dict[str, Any]) -> np.ndarray:
        with Image.open(dataset_dict["map"]) as f:
            return np.asarray(f, dtype=np.int32)


class OwnViewsWithMaps:
    """d2_objssl's mapper."""

    def __init__(self) -> None:
        self.mapper = ObjSSLDatasetMapper(
            is_train=True,
            augmentations=[],
            image_format="RGB",
            num_views=len(BLUR_PROBS),
            crop_size=CROP_SIZE,
            crop_scale=CROP_SCALE,
            crop_ratio=CROP_RATIO,
            view_augmentations=OwnViews().augmentations,
            region_source=_PngRegions(),
        )

    def __call__(self, image_path: str, map_path: str) -> Any:
        """The mapper's dict."""
        return self.mapper({"file_name": image_path, "map": map_path})


def time_pairs(views: Callable[[str, str], Any], pairs: list[tuple[str, str]]) -> float:
    """Mean CPU time, ms per image."""
    start = time.process_time()
    for image_path, map_path in pairs:
        views(image_path, map_path)
    return 1e3 * (time.process_time() - start) / len(pairs)
