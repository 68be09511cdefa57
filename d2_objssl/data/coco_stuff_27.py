"""COCO-Stuff with its 182 labels merged into 27 classes, for unsupervised segmentation.

coco_2017_{train,val}_stuff_27   coco/{train,val}2017, coco/stuffthingmaps/{train,val}2017, under DETECTRON2_DATASETS

The label maps stay as they are published, with values 0 to 181 and 255. Whoever reads them merges the labels by the
metadata's `fine_to_coarse`; `evaluate.py segmentation` does. Detectron2's evaluators do not: there is no evaluator type.

The published numbers are of the curated lists of IIC and PiCIE, `Coco164kFull_Stuff_Coarse_7.txt`, one image id a line:
49,629 images of train2017 and 2,175 of val2017 (the metadata's `num_curated_images`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg

NUM_FINE_LABELS = 182
IGNORED_FINE_LABEL = 255
_CURATED_IMAGES = {"train": 49_629, "val": 2_175}

# Class -> labels of the pixel maps, COCO's category id - 1. The first 12 classes are things, the other 15 stuff.
COARSE_CLASSES: dict[str, tuple[int, ...]] = {
    "electronic": tuple(range(71, 77)),
    "appliance": tuple(range(77, 83)),
    "food": tuple(range(51, 61)),
    "furniture": tuple(range(61, 71)),
    "indoor": tuple(range(83, 91)),
    "kitchen": tuple(range(43, 51)),
    "accessory": tuple(range(25, 33)),
    "animal": tuple(range(15, 25)),
    "outdoor": tuple(range(9, 15)),
    "person": (0,),
    "sports": tuple(range(33, 43)),
    "vehicle": tuple(range(1, 9)),
    "ceiling": (101, 102),
    "floor": (100, 113, 114, 115, 116, 117),
    "food-stuff": (120, 121, 152, 169),
    "furniture-stuff": (97, 106, 107, 109, 111, 122, 129, 132, 155, 160, 164),
    "raw-material": (99, 131, 138, 142),
    "textile": (91, 92, 103, 104, 108, 130, 136, 140, 151, 166, 167),
    "wall": tuple(range(170, 177)),
    "window": (179, 180),
    "building": (94, 95, 127, 150, 157, 165),
    "ground": (110, 124, 125, 135, 139, 143, 144, 146, 148, 153, 158),
    "plant": (93, 96, 118, 123, 128, 133, 141, 162, 168),
    "sky": (105, 156),
    "solid": (126, 134, 149, 159, 161, 181),
    "structural": (98, 112, 137, 145, 163),
    "water": (119, 147, 154, 177, 178),
}


def fine_to_coarse(classes: Mapping[str, Sequence[int]] = COARSE_CLASSES) -> dict[int, int]:
    """Class of each label, in ascending order of the labels.

    Args:
        classes: the labels of each class; the class is the position.

    Raises:
        ValueError: if a label belongs to two classes or is not in [0, 182).
    """
    table: dict[int, int] = {}
    for coarse, (name, labels) in enumerate(classes.items()):
        for label in labels:
            if not 0 <= label < NUM_FINE_LABELS:
                raise ValueError(f'the label {label} of the class "{name}" is not in [0, {NUM_FINE_LABELS})')
            if label in table:
                raise ValueError(f'the label {label} belongs to "{list(classes)[table[label]]}" and to "{name}"')
            table[label] = coarse
    return dict(sorted(table.items()))


def keep_listed_images(dataset_dicts: Sequence[dict[str, Any]], list_file: str) -> list[dict[str, Any]]:
    """The images whose file names, without suffix, a text file lists one a line; in the order of the data set.

    Raises:
        ValueError: if the file lists nothing, or an image that the data set does not have.
    """
    listed = set(Path(list_file).read_text().split())
    if not listed:
        raise ValueError(f"{list_file} names no image")
    missing = sorted(listed - {Path(d["file_name"]).stem for d in dataset_dicts})
    if missing:
        raise ValueError(
            f"{list_file} names {len(missing)} images that the data set does not have: {', '.join(missing[:3])}, ..."
        )
    return [d for d in dataset_dicts if Path(d["file_name"]).stem in listed]


def register_coco_stuff_27(root: str) -> None:
    """Enter the two splits into the catalogs; nothing is read yet.

    Args:
        root: the dataset root.
    """
    coco = os.path.join(root, "coco")
    for split, num_curated in _CURATED_IMAGES.items():
        images, maps = os.path.join(coco, f"{split}2017"), os.path.join(coco, "stuffthingmaps", f"{split}2017")
        name = f"coco_2017_{split}_stuff_27"
        DatasetCatalog.register(name, lambda images=images, maps=maps: load_sem_seg(maps, images))
        MetadataCatalog.get(name).set(
            stuff_classes=list(COARSE_CLASSES),
            ignore_label=IGNORED_FINE_LABEL,
            fine_to_coarse=fine_to_coarse(),
            num_curated_images=num_curated,
            image_root=images,
            sem_seg_root=maps,
            evaluator_type="none",
        )


register_coco_stuff_27(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
