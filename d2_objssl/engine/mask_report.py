"""How good bootstrapped region masks are: figures where the data sets have labels, and pictures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import get_detection_dataset_dicts
from detectron2.utils.events import EventStorage

from ..data.image_reading import read_rgb_image
from ..data.region_files import RegionIndex
from ..evaluation.region_quality import RegionQuality, instance_masks
from ..visualization import contact_sheet, overlay_region_map, region_caption, save_png
from .feature_clustering import reduce_image

logger = logging.getLogger(__name__)

_NUM_LABELLED = 200  # images at most that the figures are of
_NUM_PICTURES = 8
_PICTURE_SIDE = 240  # pixels, at most


class MaskReport:
    """Reports on a round of region masks: the same images every time, spread evenly over the data set."""

    def __init__(self, *, dataset: Sequence[dict[str, Any]], dataset_names: list[str]) -> None:
        """
        Args:
            dataset: dataset dicts with "file_name" and "region_key", without labels.
            dataset_names: of DATASETS.TRAIN; their labels, where they have instances, are loaded at the first report.
        """
        self._dataset = dataset
        self._dataset_names = dataset_names
        self._labelled: list[dict[str, Any]] | None = None

    def write(self, root: Path, storage: EventStorage) -> None:
        """Log the quality of the masks in `root`, and draw some of them.

        Scalars: "bootstrap/abo", the mean over instances of their best IoU with a region; "bootstrap/recall", the share of
        instances where that is at least 0.5; "bootstrap/regions", regions per image. Picture: "bootstrap" and `root`.png.
        """
        index = RegionIndex.load(root)
        quality = self._measure(index)
        if quality["num_instances"]:
            storage.put_scalar("bootstrap/abo", quality["abo"], smoothing_hint=False)
            storage.put_scalar("bootstrap/recall", quality["recall_at_50"], smoothing_hint=False)
            storage.put_scalar("bootstrap/regions", quality["regions_per_image"], smoothing_hint=False)
            logger.info(
                "Quality of the region masks on %d labelled images: average best overlap %.3f, %.1f %% of %d instances "
                "found (IoU 0.5), %.1f regions an image",
                quality["num_images"],
                quality["abo"],
                100 * quality["recall_at_50"],
                quality["num_instances"],
                quality["regions_per_image"],
            )
        picture = self._draw(index)
        if picture is not None:
            save_png(root.with_name(f"{root.name}.png"), picture)
            storage.put_image("bootstrap", torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))))

    def _measure(self, index: RegionIndex) -> dict[str, float]:
        if self._labelled is None:
            self._labelled = self._load_labelled()
        quality = RegionQuality()
        for d in self._labelled:
            try:
                region_map = index.read(d["region_key"], d["height"], d["width"])
            except OSError:  # the image is unreadable, so it has no mask
                continue
            quality.update(region_map, instance_masks(d))
        return quality.summarize()

    def _load_labelled(self) -> list[dict[str, Any]]:
        """Dataset dicts with "region_key" and "annotations" of some images, if there are such."""
        labels = {
            d["file_name"]: d
            for name in self._dataset_names
            for d in get_detection_dataset_dicts(name, filter_empty=False, check_consistency=False)
            if d.get("annotations")
        }
        if not labels:
            return []
        labelled = [d for d in self._dataset if d["file_name"] in labels]
        return [labels[d["file_name"]] | {"region_key": d["region_key"]} for d in _spread(labelled, _NUM_LABELLED)]

    def _draw(self, index: RegionIndex) -> np.ndarray | None:
        """Contact sheet, (H, W, 3) uint8 RGB: pairs of an image and its regions, two in a row."""
        tiles, captions = [], []
        for d in _spread(self._dataset, _NUM_PICTURES):
            try:
                image = read_rgb_image(d["file_name"])
                region_map = index.read(d["region_key"], *image.shape[:2])
            except OSError:
                continue
            small = reduce_image(image, _PICTURE_SIDE)
            tiles += [small, overlay_region_map(small, region_map)]
            captions += [Path(d["region_key"]).name, region_caption(region_map)]
        return contact_sheet(tiles, 4, captions) if tiles else None


def _spread(items: Sequence[Any], num: int) -> list[Any]:
    """At most `num` items at equal distances."""
    num = min(num, len(items))
    return [items[i * len(items) // num] for i in range(num)]
