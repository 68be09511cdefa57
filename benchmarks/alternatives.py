#!/usr/bin/env python
"""What was tried to be faster on a CPU and did not pay, measured against what is used instead.

    python benchmarks/alternatives.py
    python benchmarks/alternatives.py --only views lars --repeats 9 --output benchmarks/results/alternatives.json

Each row compares an alternative ("plain") with what this project does ("ours"): a ratio above 1 says that the alternative is
slower. `compile` needs a C++ compiler, `segmentation` opencv-contrib-python.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import torch
from sklearn.metrics import adjusted_rand_score
from stages.data import (
    BLUR_SIGMA,
    BRIGHTNESS,
    CONTRAST,
    CROP_RATIO,
    CROP_SCALE,
    CROP_SIZE,
    GRAYSCALE_PROB,
    HUE,
    JITTER_PROB,
    SATURATION,
    OwnViews,
    make_photographs,
    time_stages,
)
from stages.models import build_slotcon
from stages.step import OwnStep, make_batch
from stages.throughput import Stage
from stages.timing import Row, format_rows, repeat_in_turns, use_one_thread
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

from d2_objssl.data.image_reading import read_rgb_image
from d2_objssl.engine import LARS
from d2_objssl.evaluation.results import write_record
from d2_objssl.proposals import felzenszwalb_regions


class TorchvisionV2Views:
    """Views by torchvision's transforms.v2, uint8 to the end, with its own JPEG decoder."""

    def __init__(self) -> None:
        crop = v2.RandomResizedCrop(CROP_SIZE, CROP_SCALE, CROP_RATIO, v2.InterpolationMode.BICUBIC, antialias=True)
        jitter = v2.ColorJitter(BRIGHTNESS, CONTRAST, SATURATION, HUE)
        colors = [v2.RandomApply([jitter], JITTER_PROB), v2.RandomGrayscale(GRAYSCALE_PROB)]
        blur = v2.GaussianBlur(23, BLUR_SIGMA)
        first = [crop, v2.RandomHorizontalFlip(), *colors, blur]
        solarize = v2.RandomSolarize(128, 0.2)
        second = [crop, v2.RandomHorizontalFlip(), *colors, v2.RandomApply([blur], 0.1), solarize]
        self.views = v2.Compose(first), v2.Compose(second)

    def stages(self) -> list[Stage]:
        """Each takes what the one before returned; the first one a path."""
        return [
            ("decode", lambda path: decode_image(read_file(path), ImageReadMode.RGB)),
            ("views", lambda image: [view(image) for view in self.views]),
        ]


def compare_views(args: argparse.Namespace) -> Row:
    """transforms.v2 on tensors, which would keep the whole pipeline in one library."""
    with tempfile.TemporaryDirectory() as folder:
        make_photographs(Path(folder), 32, args.seed)
        paths = sorted(map(str, Path(folder).glob("*.jpg")))
        contestants = {"plain": TorchvisionV2Views(), "ours": OwnViews()}
        for views in contestants.values():
            time_stages(views.stages(), paths[:4])
        runs = repeat_in_turns(
            {name: partial(_total_ms, views.stages(), paths) for name, views in contestants.items()},
            args.repeats,
            args.seed,
        )
    return _row("two views by torchvision.transforms.v2", runs, unit="ms CPU an image")


def _total_ms(stages: list[Stage], paths: list[str]) -> float:
    return time_stages(stages, paths)["total"]


def compare_lars(args: argparse.Namespace) -> Row:
    """LARS by foreach operations, as on GPUs: on a CPU they go through memory once for each operation."""
    params = [p for p in build_slotcon().parameters() if p.requires_grad]
    for p in params:
        p.grad = torch.randn_like(p)
    fused, foreach = LARS(params, lr=0.1, weight_decay=1e-5), ForeachLARS(params, lr=0.1, weight_decay=1e-5)
    for optimizer in (fused, foreach):
        optimizer.step()
    contestants = {"plain": partial(_cpu_ms, foreach.step), "ours": partial(_cpu_ms, fused.step)}
    return _row("LARS by foreach operations", repeat_in_turns(contestants, args.repeats, args.seed), unit="ms CPU")


class ForeachLARS(LARS):
    """Takes the path of GPU tensors on CPUs."""

    def _is_aligned(self, param: Tensor) -> bool:
        return False


def _cpu_ms(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return 1e3 * (time.process_time() - start)


def compare_compile(args: argparse.Namespace) -> Row:
    """torch.compile of both backbones, default mode; compiling itself is not in the figure."""
    compiled = OwnStep(args.seed, dtype=torch.bfloat16)
    assert compiled.model.teacher is not None
    for branch in (compiled.model.student, compiled.model.teacher):
        branch.backbone.compile()
    return _compare_steps("compiled backbones", compiled, args)


def compare_memory_format(args: argparse.Namespace) -> Row:
    """The same network in PyTorch's default memory layout, against its own."""
    contiguous = OwnStep(args.seed, dtype=torch.bfloat16)
    contiguous.model.memory_format = torch.contiguous_format
    contiguous.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return _compare_steps("contiguous tensors", contiguous, args)


def _compare_steps(what: str, changed: OwnStep, args: argparse.Namespace) -> Row:
    """Training steps of SlotCon that were changed, against the trainer's."""
    batch, own = make_batch(4, args.seed), OwnStep(args.seed, dtype=torch.bfloat16)
    contestants = {"plain": partial(_step_s, changed, batch), "ours": partial(_step_s, own, batch)}
    for step in contestants.values():
        step()
    runs = repeat_in_turns(contestants, min(args.repeats, 3), args.seed)
    return _row(f"SlotCon R50 step, bfloat16, batch 4, {what}", runs, unit="s")


def compare_segmentation(args: argparse.Namespace) -> Row:
    """OpenCV's graph segmentation, of the same paper as Felzenszwalb's in scikit-image."""
    try:
        segment = cv2.ximgproc.segmentation.createGraphSegmentation(sigma=0.8, k=1000, min_size=1000).processImage
    except AttributeError as error:
        raise ImportError("OpenCV's graph segmentation is in opencv-contrib-python only") from error
    with tempfile.TemporaryDirectory() as folder:
        make_photographs(Path(folder), 6, args.seed)
        images = [read_rgb_image(str(path)) for path in sorted(Path(folder).glob("*.jpg"))]
    ours = partial(felzenszwalb_regions, scale=1000, min_size=1000)
    scores = [adjusted_rand_score(ours(image).ravel(), segment(image).ravel()) for image in images]
    contestants = {
        "plain": lambda: _cpu_ms(lambda: [segment(image) for image in images]) / len(images),
        "ours": lambda: _cpu_ms(lambda: [ours(image) for image in images]) / len(images),
    }
    return _row(
        f"regions by OpenCV's graph segmentation, adjusted Rand index {statistics.mean(scores):.2f}",
        repeat_in_turns(contestants, args.repeats, args.seed),
        "ms CPU an image",
    )


def _step_s(step: OwnStep, batch: Any) -> float:
    start = time.perf_counter()
    step(batch)
    return time.perf_counter() - start


def _row(name: str, runs: dict[str, list[float]], unit: str) -> Row:
    return Row(name, statistics.median(runs["plain"]), statistics.median(runs["ours"]), unit)


COMPARISONS: dict[str, Callable[[argparse.Namespace], Row]] = {
    "views": compare_views,
    "lars": compare_lars,
    "segmentation": compare_segmentation,
    "memory_format": compare_memory_format,
    "compile": compare_compile,
}


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--repeats", type=int, default=5, help="runs of each contestant (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    use_one_thread()
    rows = []
    for name in args.only:
        try:
            rows.append(COMPARISONS[name](args))
        except ImportError as error:
            print(f"{name} is left out: {error}")
    print(format_rows(rows))
    if args.output:
        table = [{**asdict(row), "ratio": row.ratio} for row in rows]
        write_record(args.output, {"task": "alternatives", "seed": args.seed, "table": table})
        print(f"Written: {args.output}")


if __name__ == "__main__":
    main()
