"""The mapper of SemCL: V views of the anchor and of the not-anchor of a pair."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from ..geometry import image_to_view
from .augmentation import sample_crop_boxes
from .dataset_mapper import ObjSSLDatasetMapper
from .image_reading import read_rgb_image
from .semantic_pairs import compose_pair, read_pair_mask


class PairDatasetMapper(ObjSSLDatasetMapper):
    """Maps the dicts of `semantic_pairs.load_pair_dicts`; its outputs are those of `ObjSSLDatasetMapper`.

    Of the INPUT.SSL.NUM_VIEWS views the first half shows the anchor, the second half the not-anchor. View v of either
    has the same crop and flip, and the same decisions about jitter, greyscale, blur and solarisation; how strong jitter
    and blur are is drawn for each of them.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read INPUT.SSL; its lists of probabilities are those of one member's views."""
        args = super().from_config(cfg, is_train)
        num_views = args["num_views"]
        if num_views % 2:
            raise ValueError(f"INPUT.SSL.NUM_VIEWS is {num_views}; pairs (INPUT.PAIRS.SOURCE) need an even number")
        if args["region_source"] is not None:
            raise ValueError(
                f'INPUT.REGIONS.SOURCE is "{cfg.INPUT.REGIONS.SOURCE}"; pairs (INPUT.PAIRS.SOURCE) have no regions'
            )
        args["view_augmentations"] = args["view_augmentations"][: num_views // 2] * 2
        return args

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one pair; see the class."""
        image = read_rgb_image(dataset_dict["file_name"])
        height, width = image.shape[:2]
        members = compose_pair(image, read_pair_mask(dataset_dict, height, width))
        boxes = sample_crop_boxes(
            height,
            width,
            num_views=self.num_views // 2,
            scale=self.crop_scale,
            ratio=self.crop_ratio,
            min_overlap=self.min_overlap,
            same_crop=not self.geometric,
        )
        views = [
            self._make_pair_of_views(members, box, augmentations)
            for box, augmentations in zip(boxes, self.view_augmentations, strict=False)
        ]
        return {
            "file_name": dataset_dict["file_name"],
            "image_id": dataset_dict.get("image_id"),
            "height": height,
            "width": width,
            "views": [anchor for anchor, _ in views] + [not_anchor for _, not_anchor in views],
        }

    def _make_pair_of_views(
        self, members: Sequence[np.ndarray], box: np.ndarray, augmentations: list[T.Augmentation]
    ) -> list[dict[str, Any]]:
        """Crop, flip and colour one view of either member; `box` is XYXY in whole pixels of the image."""
        geometry = self._draw_geometry(box, *members[0].shape[:2])
        crop_box, hflip = image_to_view(geometry, (self.crop_size, self.crop_size))
        images = augment_pair([geometry.apply_image(member) for member in members], augmentations)
        return [
            {
                "image": torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1),
                "crop_box": torch.from_numpy(crop_box),
                "hflip": hflip,
            }
            for image in images
        ]


def augment_pair(images: Sequence[np.ndarray], augmentations: Sequence[T.Augmentation]) -> list[np.ndarray]:
    """Apply each augmentation to all images or to none, with a strength of its own for each image.

    Args:
        images: (S, S, 3) uint8 each.
        augmentations: with an attribute `prob`, see `augmentation.build_view_augmentations`.

    Returns:
        As many images.
    """
    augmented = list(images)
    for augmentation in augmentations:
        if np.random.uniform() < augmentation.prob:
            always = copy.copy(augmentation)
            always.prob = 1.0
            augmented = [always.get_transform(image).apply_image(image) for image in augmented]
    return augmented
