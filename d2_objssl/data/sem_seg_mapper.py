"""The mapper of semantic segmentation: labels as they are stored, and checked.

Differs from Detectron2's `DatasetMapper`, which reads label maps as grey images, in that
* a PNG with a palette, as Pascal VOC's, gives the indices, not the brightness of their colours;
* a label that is neither a class nor the ignored one is an error that names file and value. In the loss it would end the
  run with a device-side assertion, or, as an index of another class, not at all;
* tests do without labels: the evaluator reads and checks them itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import check_image_size, read_image

from .dataset_mapper import ObjSSLDatasetMapper
from .ground_truth import check_same_size, find_unknown_labels, read_label_map
from .image_reading import check_image_file


class SemSegDatasetMapper(ObjSSLDatasetMapper):
    """Maps a dataset dict to {"image" (3, H, W) uint8, "sem_seg" (H, W) int64 in training, and the dict's other keys}."""

    @configurable
    def __init__(self, is_train: bool, *, num_classes: int, ignore_value: int, **kwargs: Any) -> None:
        """
        Args:
            is_train: whether labels are read.
            num_classes: labels are below this.
            ignore_value: the label of pixels without a class.
            **kwargs: arguments of `DatasetMapper`.
        """
        super().__init__(is_train, **kwargs)
        self.num_classes = num_classes
        self.ignore_value = ignore_value

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read MODEL.SEM_SEG_HEAD, and whatever `DatasetMapper` reads.

        Raises:
            ValueError: for classes or an ignored label that are not those of the data sets, or have more than 8 bits.
        """
        head = cfg.MODEL.SEM_SEG_HEAD
        if not (0 < head.NUM_CLASSES <= 256 and 0 <= head.IGNORE_VALUE <= 255):
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {head.NUM_CLASSES} and IGNORE_VALUE {head.IGNORE_VALUE}; labels have 8 "
                "bits"
            )
        check_label_space((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST), head.NUM_CLASSES, head.IGNORE_VALUE)
        args = super().from_config(cfg, is_train)
        return {**args, "num_classes": head.NUM_CLASSES, "ignore_value": head.IGNORE_VALUE}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one dataset dict; see the class."""
        mapped = copy.deepcopy(dataset_dict)
        mapped.pop("annotations", None)
        label_file = mapped.pop("sem_seg_file_name", None)
        check_image_file(mapped["file_name"])
        image = read_image(mapped["file_name"], format=self.image_format)
        check_image_size(mapped, image)
        labels = self._read_labels(label_file, image, mapped["file_name"]) if self.is_train else None
        aug_input = T.AugInput(image, sem_seg=labels)
        self.augmentations(aug_input)
        mapped["image"] = torch.from_numpy(np.ascontiguousarray(aug_input.image.transpose(2, 0, 1)))
        if labels is not None:
            mapped["sem_seg"] = torch.from_numpy(aug_input.sem_seg.astype(np.int64))
        return mapped

    def _read_labels(self, file: str | None, image: np.ndarray, image_file: str) -> np.ndarray:
        """(H, W) uint8, checked: transforms move labels of 8 bits by the nearest pixel, wider ones half a pixel off."""
        if file is None:
            raise ValueError(f"{image_file} has no label map (sem_seg_file_name): DATASETS.TRAIN has other labels")
        labels = read_label_map(file)
        check_same_size(f"{file}, the label map of {image_file}", labels.shape, image.shape[:2])
        if unknown := find_unknown_labels(labels, self.num_classes, self.ignore_value):
            raise ValueError(
                f"{file} has the label(s) {unknown}; with "
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES {self.num_classes} labels are 0 to {self.num_classes - 1}, and "
                f"IGNORE_VALUE {self.ignore_value}"
            )
        return labels.astype(np.uint8)


def check_label_space(names: Iterable[str], num_classes: int, ignore_value: int) -> None:
    """Compare MODEL.SEM_SEG_HEAD.NUM_CLASSES and IGNORE_VALUE with the metadata of data sets, where they tell.

    Raises:
        ValueError: naming the data set and the key.
    """
    for name in names:
        metadata = MetadataCatalog.get(name)
        classes, ignored = metadata.get("stuff_classes"), metadata.get("ignore_label")
        if classes is not None and len(classes) != num_classes:
            raise ValueError(f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}, but {name} has {len(classes)} classes")
        if ignored is not None and ignored != ignore_value:
            raise ValueError(f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {ignore_value}, but {name} ignores label {ignored}")
