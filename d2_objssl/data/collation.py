"""From the mapper's dicts to the batch that a pretraining model takes; runs in the loader's workers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..structures import ViewBatch


@dataclass
class SSLBatch:
    """A collated pretraining batch.

    Attributes:
        views: V ViewBatches of N images each, in the same order.
        file_names: N paths of the images.
        replaced: (path, reason) of the unreadable images that others stand in for.
        dropped_regions: (path, how many regions it lost) of the images with more regions than allowed.
    """

    views: list[ViewBatch]
    file_names: list[str]
    replaced: list[tuple[str, str]] = field(default_factory=list)
    dropped_regions: list[tuple[str, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.file_names)

    def pin_memory(self) -> SSLBatch:
        """Copy to page-locked memory; called by the data loader."""
        return replace(self, views=[v.pin_memory() for v in self.views])


def split_batch(batch: Any, num_parts: int) -> list[Any]:
    """Cut a batch into equal parts, in order.

    Args:
        batch: an `SSLBatch`, or a list of dicts; its length is a multiple of `num_parts`.
        num_parts: how many.
    """
    if num_parts == 1:
        return [batch]
    size = len(batch) // num_parts
    assert size * num_parts == len(batch), (len(batch), num_parts)
    parts = [slice(i * size, (i + 1) * size) for i in range(num_parts)]
    if isinstance(batch, SSLBatch):
        return [SSLBatch([view[rows] for view in batch.views], batch.file_names[rows]) for rows in parts]
    return [batch[rows] for rows in parts]


def collate_views(dataset_dicts: list[dict[str, Any]]) -> SSLBatch:
    """Stack the views of N mapped images into V ViewBatches, so that V tensors travel instead of 2N.

    Args:
        dataset_dicts: N outputs of `ObjSSLDatasetMapper`, each with "views": V dicts of "image" (3, S, S) uint8,
            "crop_box" (4,) float32 XYXY_ABS, "hflip" bool and optionally "region_map" (S, S) and "colors" (11,), and optionally
            "overlapping_regions" True where the region maps are bit sets; see `structures.ViewBatch`. Either all images
            have region maps or none.
    """
    views = []
    overlapping = {bool(d.get("overlapping_regions")) for d in dataset_dicts}
    assert len(overlapping) == 1, "images with and without overlapping regions in one batch"
    for group in zip(*(d["views"] for d in dataset_dicts), strict=True):
        maps = [v["region_map"] for v in group if v.get("region_map") is not None]
        views.append(
            ViewBatch(
                # Pixels were (S, S, 3) in memory and stay so: channels_last.
                images=torch.stack([v["image"].permute(1, 2, 0) for v in group]).permute(0, 3, 1, 2),
                crop_boxes=torch.stack([v["crop_box"] for v in group]),
                hflip=torch.tensor([v["hflip"] for v in group]),
                region_maps=torch.stack(maps) if maps else None,
                overlapping=overlapping == {True},
                colors=torch.stack([v["colors"] for v in group]) if "colors" in group[0] else None,
            )
        )
    return SSLBatch(
        views=views,
        file_names=[d["file_name"] for d in dataset_dicts],
        replaced=[r for d in dataset_dicts for r in d.get("replaced", ())],
        dropped_regions=[
            (d["file_name"], d["num_dropped_regions"]) for d in dataset_dicts if d.get("num_dropped_regions")
        ],
    )
