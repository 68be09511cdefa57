"""Data sets with semantic label maps that Detectron2 does not know, under DETECTRON2_DATASETS.

voc_2012_trainaug_sem_seg            VOC2012/{JPEGImages, SegmentationClassAug, ImageSets/Segmentation/trainaug.txt}
coco_2017_train_stuff_things_sem_seg coco/{train2017, stuffthingmaps/train2017}
camvid_{train,val,test}_sem_seg      camvid/{images,labels}/{train,val,test}, the split of 11 classes; label 11 is ignored
"""

from __future__ import annotations

import os
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg

_VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
_NUM_COCO_LABELS = 182  # labels of the pixel maps: COCO's category id - 1, with gaps


def load_listed_label_maps(list_file: str, image_root: str, label_root: str) -> list[dict[str, Any]]:
    """Dataset dicts ("file_name", "image_id", "sem_seg_file_name") of the images that a text file names, one a line.

    Raises:
        ValueError: if the file names none.
    """
    with open(list_file) as f:
        names = f.read().split()
    if not names:
        raise ValueError(f"{list_file} names no image")
    return [
        {
            "file_name": os.path.join(image_root, f"{name}.jpg"),
            "image_id": name,
            "sem_seg_file_name": os.path.join(label_root, f"{name}.png"),
        }
        for name in names
    ]


def register_label_map_datasets(root: str) -> None:
    """Enter them into the catalogs; nothing is read yet.

    Args:
        root: the dataset root.
    """
    voc = os.path.join(root, "VOC2012")
    images, maps = os.path.join(voc, "JPEGImages"), os.path.join(voc, "SegmentationClassAug")
    listed = os.path.join(voc, "ImageSets", "Segmentation", "trainaug.txt")
    name = "voc_2012_trainaug_sem_seg"
    DatasetCatalog.register(name, lambda: load_listed_label_maps(listed, images, maps))
    MetadataCatalog.get(name).set(
        stuff_classes=list(_VOC_CLASSES),
        ignore_label=255,
        image_root=images,
        sem_seg_root=maps,
        evaluator_type="sem_seg",
    )

    for split in ("train", "val", "test"):
        images, maps = (os.path.join(root, "camvid", kind, split) for kind in ("images", "labels"))
        name = f"camvid_{split}_sem_seg"
        DatasetCatalog.register(name, lambda images=images, maps=maps: load_sem_seg(maps, images))
        MetadataCatalog.get(name).set(
            stuff_classes=list(_CAMVID_CLASSES),
            ignore_label=len(_CAMVID_CLASSES),
            image_root=images,
            sem_seg_root=maps,
            evaluator_type="sem_seg",
        )

    coco_images = os.path.join(root, "coco", "train2017")
    coco_maps = os.path.join(root, "coco", "stuffthingmaps", "train2017")
    name = "coco_2017_train_stuff_things_sem_seg"
    DatasetCatalog.register(name, lambda: load_sem_seg(coco_maps, coco_images))
    MetadataCatalog.get(name).set(
        stuff_classes=[f"category {i + 1}" for i in range(_NUM_COCO_LABELS)],
        ignore_label=255,
        image_root=coco_images,
        sem_seg_root=coco_maps,
        evaluator_type="sem_seg",
    )


register_label_map_datasets(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
