"""A JPEG file to two of SlotCon's views, against Pillow and torchvision's transforms."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data.transforms import AugInput, Augmentation
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms

from d2_objssl.data.augmentation import (
    FastHFlipTransform,
    ResizedCropTransform,
    build_view_augmentations,
    sample_crop_boxes,
)
from d2_objssl.data.image_reading import read_rgb_image

from .throughput import Stage, measure_rates
from .timing import Measurement, Row, repeat_in_turns

SUMMARY = "a JPEG file to two views"

# SlotCon's views.
CROP_SIZE, CROP_SCALE, CROP_RATIO, FLIP_PROB = 224, (0.08, 1.0), (3 / 4, 4 / 3), 0.5
BRIGHTNESS, CONTRAST, SATURATION, HUE, JITTER_PROB, GRAYSCALE_PROB = 0.4, 0.4, 0.2, 0.1, 0.8, 0.2
BLUR_PROBS, BLUR_SIGMA, SOLARIZE_PROBS = (1.0, 0.1), (0.1, 2.0), (0.0, 0.2)
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PlainViews:
    """The plain way: Pillow images, torchvision's transforms, float tensors normalised on the CPU."""

    def __init__(self) -> None:
        self.crop = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    CROP_SIZE, CROP_SCALE, CROP_RATIO, interpolation=transforms.InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(FLIP_PROB),
            ]
        )
        jitter = transforms.ColorJitter(BRIGHTNESS, CONTRAST, SATURATION, HUE)
        self.color = transforms.Compose(
            [transforms.RandomApply([jitter], p=JITTER_PROB), transforms.RandomGrayscale(GRAYSCALE_PROB)]
        )
        self.to_tensor = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(mean=PIXEL_MEAN, std=PIXEL_STD)]
        )

    def stages(self) -> list[Stage]:
        """Each takes what the one before returned; the first one a path."""
        return [
            ("decode", lambda path: Image.open(path).convert("RGB")),
            ("crop, flip", lambda image: [self.crop(image) for _ in BLUR_PROBS]),
            ("jitter, grey", lambda views: [self.color(view) for view in views]),
            ("blur, solarise", self._blur),
            ("to tensor", lambda views: [self.to_tensor(view) for view in views]),
        ]

    def _blur(self, views: list[Image.Image]) -> list[Image.Image]:
        blurred = []
        for view, blur_prob, solarize_prob in zip(views, BLUR_PROBS, SOLARIZE_PROBS, strict=True):
            if np.random.uniform() < blur_prob:
                view = view.filter(ImageFilter.GaussianBlur(np.random.uniform(*BLUR_SIGMA)))
            blurred.append(ImageOps.solarize(view) if np.random.uniform() < solarize_prob else view)
        return blurred


class OwnViews:
    """d2_objssl: uint8 to the end; normalised on the device by the model."""

    def __init__(self) -> None:
        self.augmentations = build_view_augmentations(
            num_views=len(BLUR_PROBS),
            brightness=BRIGHTNESS,
            contrast=CONTRAST,
            saturation=SATURATION,
            hue=HUE,
            jitter_prob=JITTER_PROB,
            grayscale_prob=GRAYSCALE_PROB,
            blur_probs=BLUR_PROBS,
            blur_sigma=BLUR_SIGMA,
            solarize_probs=SOLARIZE_PROBS,
        )

    def stages(self) -> list[Stage]:
        """Each takes what the one before returned; the first one a path."""
        return [
            ("decode", read_rgb_image),
            ("crop, flip", self._crop),
            ("jitter, grey", lambda views: self._augment(views, slice(0, 2))),
            ("blur, solarise", lambda views: self._augment(views, slice(2, 4))),
            ("to tensor", lambda views: [torch.from_numpy(view) for view in views]),
        ]

    def _crop(self, image: np.ndarray) -> list[np.ndarray]:
        height, width = image.shape[:2]
        views = []
        for x0, y0, x1, y1 in sample_crop_boxes(
            height, width, num_views=len(BLUR_PROBS), scale=CROP_SCALE, ratio=CROP_RATIO
        ).tolist():
            view = ResizedCropTransform(x0, y0, x1 - x0, y1 - y0, CROP_SIZE, height, width).apply_image(image)
            if np.random.uniform() < FLIP_PROB:
                view = FastHFlipTransform(CROP_SIZE).apply_image(view)
            views.append(view)
        return views

    def _augment(self, views: list[np.ndarray], which: slice) -> list[np.ndarray]:
        return [_apply(augs[which], view) for view, augs in zip(views, self.augmentations, strict=True)]


def _apply(augmentations: list[Augmentation], image: np.ndarray) -> np.ndarray:
    aug_input = AugInput(image)
    for augmentation in augmentations:
        augmentation(aug_input)
    return aug_input.image


def time_stages(stages: list[Stage], paths: list[str]) -> dict[str, float]:
    """Mean CPU time of each stage and of all, ms per image."""
    spent = dict.fromkeys((name for name, _ in stages), 0.0)
    for path in paths:
        state: Any = path
        for name, stage in stages:
            start = time.process_time()
            state = stage(state)
            spent[name] += time.process_time() - start
    spent["total"] = sum(spent.values())
    return {name: 1e3 * seconds / len(paths) for name, seconds in spent.items()}


def make_photographs(folder: Path, count: int, seed: int) -> None:
    """Write `count` JPEGs of 640×480, with detail at all scales, edges and a photograph's 100 to 200 kB."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        image = np.full((480, 640, 3), rng.uniform(60, 200, 3), dtype=np.float32)
        for octave in range(8):
            noise = rng.normal(0, 1, (max(480 >> octave, 2), max(640 >> octave, 2), 3)).astype(np.float32)
            luma = noise.mean(axis=2, keepdims=True)
            noise = cv2.resize(1.5 * luma + 0.3 * noise, (640, 480), interpolation=cv2.INTER_CUBIC)
            image += 6 * 1.3**octave * noise
        for _ in range(12):
            center, axes = rng.integers((0, 0), (640, 480)).tolist(), rng.integers(10, 120, 2).tolist()
            shade = np.zeros((480, 640), dtype=np.float32)
            cv2.ellipse(shade, center, axes, float(rng.uniform(0, 180)), 0, 360, 1.0, -1, cv2.LINE_AA)
            image += shade[:, :, None] * rng.normal(0, 45, 3).astype(np.float32)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{index:04d}.jpg", quality=90)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, help="folder of *.jpg (default: generates its own)")
    parser.add_argument("--num-images", type=int, default=128, help="how many to use or generate (--quick: 32)")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="of loaders (default: 1 2)")


def run(args: argparse.Namespace) -> Measurement:
    """JPEG to two SlotCon views: time each stage of both contestants."""
    if args.quick:
        args.num_images = min(args.num_images, 32)
    with tempfile.TemporaryDirectory(prefix="d2_objssl-speed-") as own_folder:
        folder = args.images or Path(own_folder)
        if args.images is None:
            make_photographs(folder, args.num_images, args.seed)
        paths = sorted(str(path) for path in folder.glob("*.jpg"))[: args.num_images]
        if not paths:
            raise ValueError(f"--images {folder}: no *.jpg there")
        contestants: dict[str, PlainViews | OwnViews] = {"plain": PlainViews(), "ours": OwnViews()}
        for views in contestants.values():
            time_stages(views.stages(), paths[:8])  # warm up
        runs = repeat_in_turns(
            {name: partial(time_stages, views.stages(), paths) for name, views in contestants.items()},
            args.repeats,
            args.seed,
        )
        num_timed = 128 if args.quick else 256
        rates = measure_rates(folder, paths, contestants["plain"].stages(), args.workers, num_timed, args.seed)
    medians = {name: {k: statistics.median(run[k] for run in rs) for k in rs[0]} for name, rs in runs.items()}
    print_details(medians, rates)
    plain, ours = (m["total"] - m["to tensor"] for m in (medians["plain"], medians["ours"]))
    row = Row("JPEG to two views, without normalising", plain, ours, unit="ms CPU an image", goal=3.0)
    return Measurement([row], {"num_images": len(paths), "ms_per_image": medians, "images_per_second": rates})


def print_details(medians: dict[str, dict[str, float]], rates: dict[str, dict[str, float]]) -> None:
    print(f"\n{'JPEG to two views, ms CPU':28s} {'plain':>8s} {'ours':>8s} {'ratio':>7s}")
    for stage, plain in medians["plain"].items():
        ours = medians["ours"][stage]
        # Ours leaves the normalisation to the device; what is left of the stage is no work to compare.
        print(f"{stage:28s} {plain:8.3f} {ours:8.3f} {'' if stage == 'to tensor' else f'{plain / ours:6.2f}x':>7s}")
    plain, ours = (m["total"] - m["to tensor"] for m in (medians["plain"], medians["ours"]))
    print(f"{'total but to tensor':28s} {plain:8.3f} {ours:8.3f} {plain / ours:6.2f}x")
    for num_workers, rate in rates.items():
        numbers = ", ".join(f"{name} {per_second:.0f}" for name, per_second in rate.items())
        print(f"images/s, {num_workers} loader worker(s): {numbers}")
