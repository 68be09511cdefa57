"""One mapper for both phases: Detectron2's own for fine-tuning, V augmented views of an image for pretraining."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from fvcore.transforms.transform import NoOpTransform, Transform, TransformList

from ..geometry import image_to_view
from .augmentation import FastHFlipTransform, ResizedCropTransform, build_view_augmentations, sample_crop_boxes
from .device_augmentation import encode_colors
from .finetune_augmentation import build_augmentation
from .image_reading import check_image_file, read_rgb_image
from .region_maps import RegionSource, build_region_source, limit_region_ids

logger = logging.getLogger(__name__)


class ObjSSLDatasetMapper(DatasetMapper):
    """Detectron2's `DatasetMapper`, plus views.

    With `INPUT.SSL.NUM_VIEWS` 0 its outputs equal those of `DatasetMapper`. Otherwise, in training, it returns
    {"file_name", "image_id", "height", "width", "views"}: one dict a view with "image" (3, S, S) uint8 RGB, "crop_box"
    (4,) float32 XYXY_ABS in original-image pixels and "hflip" bool; with INPUT.SSL.AUGMENT_DEVICE "model" also "colors" (11,)
    float32, what is to be done to the view's colours. All randomness is drawn from `numpy.random`.

    With regions (INPUT.REGIONS.SOURCE) each view also has "region_map": (S, S) int16 region ids, NO_REGION where there is
    none, or int32 bit sets; "overlapping_regions" says which. "num_dropped_regions" says how many regions of an image
    became NO_REGION, if any, because it has more than MODEL.SSL.DETCON.MAX_REGION_IDS.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        num_views: int = 0,
        crop_size: int = 224,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        min_overlap: float = 0.01,
        geometric: bool = True,
        flip_prob: float = 0.5,
        view_augmentations: list[list[T.Augmentation]] | None = None,
        augment_on_device: bool = False,
        region_source: RegionSource | None = None,
        max_region_ids: int = 256,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            is_train: whether it serves training; otherwise images come whole.
            num_views: V; 0 for fine-tuning.
            crop_size: S, pixels.
            crop_scale, crop_ratio: ranges of a crop's share of the area and of its width / height.
            min_overlap: share of its own area that a later view has in common with the first one, if possible.
            geometric: False: all views show one crop, unflipped.
            flip_prob: probability of a horizontal flip.
            view_augmentations: photometric augmentations of each view.
            augment_on_device: draw these, but leave it to the model to apply them; see `device_augmentation.py`.
            region_source: gives images their region maps; None: views have none.
            max_region_ids: ids of label maps are below this.
            **kwargs: arguments of `DatasetMapper`.
        """
        super().__init__(is_train, **kwargs)
        self.num_views = num_views
        self.crop_size = crop_size
        self.crop_scale = crop_scale
        self.crop_ratio = crop_ratio
        self.min_overlap = min_overlap
        self.geometric = geometric
        self.flip_prob = flip_prob
        self.view_augmentations = view_augmentations or []
        self.augment_on_device = augment_on_device
        self.region_source = region_source
        self.max_region_ids = max_region_ids
        assert len(self.view_augmentations) == num_views
        for v, augmentations in enumerate(self.view_augmentations):
            logger.info("View %d: crop to %d px, then %s", v, crop_size, augmentations)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read INPUT.SSL and INPUT.REGIONS, and whatever `DatasetMapper` reads."""
        ssl = cfg.INPUT.SSL
        num_views = ssl.NUM_VIEWS if is_train else 0
        if num_views == 0:
            args = super().from_config(cfg, is_train)
            if cfg.INPUT.AUGMENTATION != "detectron2":
                args |= build_augmentation(cfg, is_train)
            return args
        if cfg.INPUT.FORMAT != "RGB":
            raise ValueError(f'INPUT.FORMAT is "{cfg.INPUT.FORMAT}"; pretraining works on RGB')
        return {
            "is_train": is_train,
            "augmentations": [],
            "image_format": cfg.INPUT.FORMAT,
            "num_views": num_views,
            "crop_size": ssl.CROP_SIZE,
            "crop_scale": tuple(ssl.CROP_SCALE),
            "crop_ratio": tuple(ssl.CROP_RATIO),
            "min_overlap": ssl.MIN_OVERLAP,
            "geometric": ssl.GEOMETRIC,
            "flip_prob": ssl.FLIP_PROB,
            "augment_on_device": _augments_on_device(cfg),
            "region_source": build_region_source(cfg),
            "max_region_ids": cfg.MODEL.SSL.DETCON.MAX_REGION_IDS,
            "view_augmentations": build_view_augmentations(
                num_views=num_views,
                brightness=ssl.BRIGHTNESS,
                contrast=ssl.CONTRAST,
                saturation=ssl.SATURATION,
                hue=ssl.HUE,
                jitter_prob=ssl.COLOR_JITTER_PROB,
                grayscale_prob=ssl.GRAYSCALE_PROB,
                blur_probs=_per_view(ssl.BLUR_PROB, num_views, "INPUT.SSL.BLUR_PROB"),
                blur_sigma=tuple(ssl.BLUR_SIGMA),
                solarize_probs=_per_view(ssl.SOLARIZE_PROB, num_views, "INPUT.SSL.SOLARIZE_PROB"),
            ),
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one dataset dict; see the class."""
        if self.num_views == 0:
            check_image_file(dataset_dict["file_name"])
            return super().__call__(dataset_dict)
        image = read_rgb_image(dataset_dict["file_name"])
        height, width = image.shape[:2]
        boxes = sample_crop_boxes(
            height,
            width,
            num_views=self.num_views,
            scale=self.crop_scale,
            ratio=self.crop_ratio,
            min_overlap=self.min_overlap,
            same_crop=not self.geometric,
        )
        views, transforms = zip(
            *(
                self._make_view(image, box, colours)
                for box, colours in zip(boxes, self.view_augmentations, strict=True)
            ),
            strict=True,
        )
        mapped = {
            "file_name": dataset_dict["file_name"],
            "image_id": dataset_dict.get("image_id"),
            "height": height,
            "width": width,
            "views": list(views),
        }
        # After the views, so that their random draws are the same with any source of regions.
        if self.region_source is not None and self.region_source.ready:
            mapped |= self._add_region_maps(mapped["views"], transforms, self.region_source(image, dataset_dict))
        return mapped

    def _make_view(
        self, image: np.ndarray, box: np.ndarray, augmentations: list[T.Augmentation]
    ) -> tuple[dict[str, Any], TransformList]:
        """Crop, flip and colour one view; `box` is XYXY in whole pixels of the image."""
        geometry = self._draw_geometry(box, *image.shape[:2])
        aug_input = T.AugInput(geometry.apply_image(image))
        colors = {}
        if self.augment_on_device:
            transforms = geometry
            drawn = [augmentation.get_transform(aug_input.image) for augmentation in augmentations]
            colors["colors"] = encode_colors(drawn)
        else:
            transforms = geometry + T.AugmentationList(augmentations)(aug_input)
        crop_box, hflip = image_to_view(transforms, aug_input.image.shape[:2])
        pixels = torch.from_numpy(np.ascontiguousarray(aug_input.image)).permute(2, 0, 1)
        return {"image": pixels, "crop_box": torch.from_numpy(crop_box), "hflip": hflip, **colors}, transforms

    def _draw_geometry(self, box: np.ndarray, height: int, width: int) -> TransformList:
        """The crop `box`, XYXY in whole pixels of the (height, width) image, and a flip that is drawn."""
        x0, y0, x1, y1 = (int(v) for v in box)
        crop = ResizedCropTransform(x0, y0, x1 - x0, y1 - y0, self.crop_size, height, width)
        flip: Transform = NoOpTransform()
        if self.geometric and np.random.uniform() < self.flip_prob:
            flip = FastHFlipTransform(self.crop_size)
        return TransformList([crop, flip])

    def _add_region_maps(
        self, views: list[dict[str, Any]], transforms: tuple[TransformList, ...], region_map: np.ndarray
    ) -> dict[str, Any]:
        """Move the map of an image to its views, in place, and return what it adds to the image's own keys."""
        assert self.region_source is not None
        overlapping, num_dropped = self.region_source.overlapping, 0
        if not overlapping:
            region_map, num_dropped = limit_region_ids(region_map, self.max_region_ids)
        for view, moves in zip(views, transforms, strict=True):
            moved = moves.apply_segmentation(region_map).astype(np.int32 if overlapping else np.int16)
            view["region_map"] = torch.from_numpy(moved)
        return {"overlapping_regions": overlapping} | ({"num_dropped_regions": num_dropped} if num_dropped else {})


def _augments_on_device(cfg: CfgNode) -> bool:
    place = cfg.INPUT.SSL.AUGMENT_DEVICE
    if place not in ("worker", "model"):
        raise ValueError(f'INPUT.SSL.AUGMENT_DEVICE is "{place}"; known: "worker", "model"')
    if place == "model" and cfg.INPUT.PAIRS.SOURCE != "none":
        raise ValueError(
            f'INPUT.SSL.AUGMENT_DEVICE is "model", but pairs (INPUT.PAIRS.SOURCE "{cfg.INPUT.PAIRS.SOURCE}") get their '
            'colours in the loader\'s workers: set it to "worker"'
        )
    return place == "model"


def _per_view(values: list[float], num_views: int, key: str) -> list[float]:
    """One value a view; the last one serves the views beyond the list."""
    if not values:
        raise ValueError(f"{key} is empty; it needs a probability per view")
    return [values[min(v, len(values) - 1)] for v in range(num_views)]
