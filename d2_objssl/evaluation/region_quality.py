"""How well regions cover objects: average best overlap (ABO) with ground-truth instances.

    R  ground-truth instances of an image    K  its regions
    H, W  height and width of the image, pixels

The best overlap of an instance is the IoU of its mask with the region that fits it best; ABO is the mean over all
instances of all images. Several instances may share their best region.

Source: DetCon, figure 7 ("averaging over all ground truth instances and images"), where it predicts how well pretraining
on the regions transfers. Crowd annotations are left out, as groups are no instances; the paper does not say.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from ..data.ground_truth import check_same_size, object_mask, shape_of
from ..data.image_reading import read_rgb_image
from ..data.region_maps import RegionSource
from ..parallel import map_in_processes
from ..proposals import resize_regions
from ..structures import MAX_OVERLAPPING

_FOUND_IOU = 0.5  # an instance counts as found from this best overlap on
_IMAGES_PER_TASK = 4


def instance_masks(dataset_dict: dict[str, Any]) -> np.ndarray:
    """Masks of the labelled objects of an image, without crowds and without objects that cover no pixel.

    Args:
        dataset_dict: in Detectron2's format, with "height" and "width"; without "annotations" there is no object. A
            segmentation is polygons, a run-length encoding or a mask. An object without segmentation is its box, one
            with neither is left out.

    Returns:
        (R, H, W) bool.

    Raises:
        ValueError: if a mask has another size than the image.
    """
    height, width = dataset_dict["height"], dataset_dict["width"]
    shapes = [shape_of(a) for a in dataset_dict.get("annotations", ()) if not a.get("iscrowd", 0)]
    masks = [object_mask(shape, height, width, dataset_dict["file_name"]) for shape in shapes if shape]
    kept = [mask for mask in masks if mask.any()]
    return np.stack(kept) if kept else np.zeros((0, height, width), dtype=bool)


def best_overlaps(region_map: np.ndarray, gt_masks: np.ndarray, *, overlapping: bool = False) -> np.ndarray:
    """IoU of each instance with the region that fits it best.

    Args:
        region_map: (H, W) integer ids, negative where there is no region; with `overlapping` a bit set. A map of another
            size is one of the whole image, and is resized to the nearest cell.
        gt_masks: (R, H, W) bool.
        overlapping: whether `region_map` is a bit set.

    Returns:
        (R,) float64 in [0, 1]; 0 where there is no region.
    """
    resized = resize_regions(region_map, *gt_masks.shape[1:])
    values, inverse, pixels = np.unique(resized, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(resized.shape)
    counts = [np.bincount(inverse[mask], minlength=len(values)) for mask in gt_masks]
    # One row an instance, one column a value of the map; then one column a region.
    intersections = _sum_by_region(np.reshape(counts, (len(gt_masks), len(values))), values, overlapping)
    region_pixels = _sum_by_region(pixels[None], values, overlapping)
    unions = region_pixels + gt_masks.sum(axis=(1, 2))[:, None] - intersections
    return (intersections / np.maximum(unions, 1)).max(axis=1, initial=0.0)


def count_regions(region_map: np.ndarray, *, overlapping: bool = False) -> int:
    """Number of regions of a map as in `best_overlaps` that cover a pixel."""
    values = np.unique(region_map)
    return int((_sum_by_region(np.ones((1, len(values)), np.int64), values, overlapping) > 0).sum())


def _sum_by_region(counts: np.ndarray, values: np.ndarray, overlapping: bool) -> np.ndarray:
    """Counts of pixels by value of the map, (n, number of values), to counts by region, (n, K)."""
    if not overlapping:
        return counts[:, values >= 0]
    return counts @ (values[:, None] >> np.arange(MAX_OVERLAPPING) & 1)


@dataclass
class RegionQuality:
    """Collects the best overlaps of a data set's instances.

    Attributes:
        overlaps: for each image, (R,) best overlaps of its instances; R may be 0.
        num_regions: for each image.
    """

    overlaps: list[np.ndarray] = field(default_factory=list)
    num_regions: list[int] = field(default_factory=list)

    def update(self, region_map: np.ndarray, gt_masks: np.ndarray, *, overlapping: bool = False) -> None:
        """Add an image; the arguments are those of `best_overlaps`."""
        self.overlaps.append(best_overlaps(region_map, gt_masks, overlapping=overlapping))
        self.num_regions.append(count_regions(region_map, overlapping=overlapping))

    def merge(self, other: RegionQuality) -> None:
        """Add the images of `other`."""
        self.overlaps += other.overlaps
        self.num_regions += other.num_regions

    def summarize(self) -> dict[str, float]:
        """Reduce what was collected to numbers.

        Returns:
            "abo": mean over all instances; "abo_per_image": mean over images of the mean over their instances;
            "recall_at_50": share of instances with a best overlap of at least 0.5; NaN without instances.
            "regions_per_image", over all images; "num_instances", "num_images".
        """
        instances = np.concatenate([np.zeros(0), *self.overlaps])
        return {
            "abo": _mean(instances),
            "abo_per_image": _mean([x.mean() for x in self.overlaps if len(x)]),
            "recall_at_50": _mean(instances >= _FOUND_IOU),
            "regions_per_image": _mean(self.num_regions),
            "num_instances": len(instances),
            "num_images": len(self.overlaps),
        }


def _mean(values: Sequence[Any] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def evaluate_sources(
    dataset_dicts: Sequence[dict[str, Any]],
    sources: Mapping[str, RegionSource],
    *,
    num_workers: int = 0,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Make regions of images by several sources, and measure their quality.

    Args:
        dataset_dicts: in Detectron2's format, with what `instance_masks` and the sources read.
        sources: by the names of the result.
        num_workers: processes; 0 and 1: this one. More need the caller's `__main__` guard.
        progress: show a progress bar.

    Returns:
        For each source, the numbers of `RegionQuality.summarize` and "seconds_per_image", the time of one thread or
        process to make a map, without reading the image.

    Raises:
        ValueError: if there is no image, or an image and its labels differ in size.
        OSError: if an image cannot be read.
    """
    if not dataset_dicts:
        raise ValueError("There is no image to evaluate regions on")
    qualities = {name: RegionQuality() for name in sources}
    seconds = dict.fromkeys(sources, 0.0)
    measure = partial(_measure, sources=list(sources.values()))
    measured = map_in_processes(measure, dataset_dicts, num_workers, chunk_size=_IMAGES_PER_TASK)
    for results in tqdm(measured, total=len(dataset_dicts), unit="image", disable=not progress):
        for name, (quality, duration) in zip(sources, results, strict=True):
            qualities[name].merge(quality)
            seconds[name] += duration
    return {
        name: {**quality.summarize(), "seconds_per_image": seconds[name] / len(dataset_dicts)}
        for name, quality in qualities.items()
    }


def _measure(dataset_dict: dict[str, Any], sources: Sequence[RegionSource]) -> list[tuple[RegionQuality, float]]:
    """Quality, and seconds, of each source on one image."""
    image = read_rgb_image(dataset_dict["file_name"])
    gt_masks = instance_masks(dataset_dict)
    check_same_size(f"The annotations of {dataset_dict['file_name']}", gt_masks.shape[1:], image.shape[:2])
    results = []
    for source in sources:
        start = time.perf_counter()
        region_map = source(image, dataset_dict)
        duration = time.perf_counter() - start
        quality = RegionQuality()
        quality.update(region_map, gt_masks, overlapping=source.overlapping)
        results.append((quality, duration))
    return results
