"""Data sets with semantic label maps, under DETECTRON2_DATASETS.

voc_2012_trainaug_sem_seg            VOC2012/{JPEGImages, SegmentationClassAug, ImageSets/Segmentation/trainaug.txt}
voc_2012_val_sem_seg                 VOC2012/{JPEGImages, SegmentationClass, ImageSets/Segmentation/val.txt}
cocostuff10k_{train,test}_sem_seg    cocostuff10k/{images, annotations_detectron2, imageLists/{train,test}.txt}
coco_2017_train_stuff_things_sem_seg coco/{train2017, stuffthingmaps/train2017}
camvid_{train,val,test}_sem_seg      camvid/{images,labels}/{train,val,test}, the split of 11 classes; label 11 is ignored

Detectron2 itself knows ade20k_sem_seg_{train,val}, in ADEChallengeData2016/{images, annotations_detectron2}, and
cityscapes_fine_sem_seg_{train,val}. The folders annotations_detectron2 are made by tools/prepare_label_maps.py, the files
*_labelTrainIds.png of Cityscapes by cityscapesscripts/preparation/createTrainIdLabelImgs.py.

COCO-Stuff 10k is its release 1.1 (Caesar et al., CVPR 2018): a Matlab file an image, whose `S` is 0 for unlabelled pixels,
and else COCO's category id: 1 to 90 with gaps for things, 92 to 182 for stuff. The 171 ids that occur, in their order, are
our labels 0 to 170; 255 is ignored. MMSegmentation numbers them alike, but from 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from .image_reading import missing_files

_VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
# COCO's category ids 92 to 182, under the names of COCO-Stuff's labels.txt.
_COCO_STUFF_CLASSES = (
    "banner", "blanket", "branch", "bridge", "building-other", "bush", "cabinet", "cage", "cardboard", "carpet",
    "ceiling-other", "ceiling-tile", "cloth", "clothes", "clouds", "counter", "cupboard", "curtain", "desk-stuff", "dirt",
    "door-stuff", "fence", "floor-marble", "floor-other", "floor-stone", "floor-tile", "floor-wood", "flower", "fog",
    "food-other", "fruit", "furniture-other", "grass", "gravel", "ground-other", "hill", "house", "leaves", "light", "mat",
    "metal", "mirror-stuff", "moss", "mountain", "mud", "napkin", "net", "paper", "pavement", "pillow", "plant-other",
    "plastic", "platform", "playingfield", "railing", "railroad", "river", "road", "rock", "roof", "rug", "salad", "sand",
    "sea", "shelf", "sky-other", "skyscraper", "snow", "solid-other", "stairs", "stone", "straw", "structural-other",
    "table", "tent", "textile-other", "towel", "tree", "vegetable", "wall-brick", "wall-concrete", "wall-other",
    "wall-panel", "wall-stone", "wall-tile", "wall-wood", "water-other", "waterdrops", "window-blind", "window-other",
    "wood",
)  # fmt: skip
_COCO_THINGS = {c["id"]: c["name"] for c in COCO_CATEGORIES if c["isthing"]}
# COCO's category id -> name of the 171 classes of COCO-Stuff 10k, in the order of their labels.
COCO_STUFF_10K_CLASSES: dict[int, str] = _COCO_THINGS | dict(enumerate(_COCO_STUFF_CLASSES, start=92))
_NUM_CAMVID_IMAGES = {"train": 367, "val": 101, "test": 233}
_NUM_ADE20K_IMAGES = {"train": 20_210, "val": 2_000}
_NUM_COCO_LABELS = 182  # labels of the pixel maps: COCO's category id - 1, with gaps
_NUM_EXAMPLES = 3  # files that a message names


def load_listed_label_maps(list_file: str, image_root: str, label_root: str) -> list[dict[str, Any]]:
    """Dataset dicts ("file_name", "image_id", "sem_seg_file_name") of the images that a text file names, one a line.

    Raises:
        FileNotFoundError: if a label map does not exist. An image that does not is for the loader, as any broken one.
        ValueError: if the file names none.
    """
    with open(list_file) as f:
        names = f.read().split()
    if not names:
        raise ValueError(f"{list_file} names no image")
    if missing := missing_files(os.path.join(label_root, f"{name}.png") for name in names):
        raise FileNotFoundError(
            f"{list_file}: {len(missing)} of the label maps of its {len(names)} images do not exist, for example "
            f"{', '.join(missing[:_NUM_EXAMPLES])}"
        )
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
    voc, stuff = (os.path.join(root, folder) for folder in ("VOC2012", "cocostuff10k"))
    # The labels of training are those of Hariharan et al. (ICCV 2011), of the validation VOC's own; borders are ignored.
    for split, folder, num_images in (
        ("trainaug", "SegmentationClassAug", 10_582),
        ("val", "SegmentationClass", 1_449),
    ):
        listed = os.path.join(voc, "ImageSets", "Segmentation", f"{split}.txt")
        images, maps = os.path.join(voc, "JPEGImages"), os.path.join(voc, folder)
        _register(f"voc_2012_{split}_sem_seg", images, maps, _VOC_CLASSES, num_images, list_file=listed)
    for split, num_images in (("train", 9_000), ("test", 1_000)):
        listed = os.path.join(stuff, "imageLists", f"{split}.txt")
        images, maps = os.path.join(stuff, "images"), os.path.join(stuff, "annotations_detectron2")
        classes = COCO_STUFF_10K_CLASSES.values()
        _register(f"cocostuff10k_{split}_sem_seg", images, maps, classes, num_images, list_file=listed)
    for split, num_images in _NUM_CAMVID_IMAGES.items():
        images, maps = (os.path.join(root, "camvid", kind, split) for kind in ("images", "labels"))
        _register(
            f"camvid_{split}_sem_seg", images, maps, _CAMVID_CLASSES, num_images, ignore_label=len(_CAMVID_CLASSES)
        )
    images, maps = (os.path.join(root, "coco", kind, "train2017") for kind in ("", "stuffthingmaps"))
    labels = [f"category {i + 1}" for i in range(_NUM_COCO_LABELS)]
    _register("coco_2017_train_stuff_things_sem_seg", images, maps, labels, num_images=118_287)
    for split, num_images in _NUM_ADE20K_IMAGES.items():
        MetadataCatalog.get(f"ade20k_sem_seg_{split}").num_images = num_images


def _register(
    name: str,
    images: str,
    maps: str,
    classes: Iterable[str],
    num_images: int,
    *,
    list_file: str = "",
    ignore_label: int = 255,
) -> None:
    """Register the images of a folder that `list_file` names, or all, with the label maps of another folder.

    Args:
        name: in the catalogs.
        images, maps: the folders.
        classes: names of the labels 0, 1, ...
        num_images: of the complete set.
        list_file: see `load_listed_label_maps`.
        ignore_label: of pixels without a class.
    """
    if list_file:
        DatasetCatalog.register(name, lambda: load_listed_label_maps(list_file, images, maps))
    else:
        DatasetCatalog.register(name, lambda: load_sem_seg(maps, images))
    MetadataCatalog.get(name).set(
        stuff_classes=list(classes),
        ignore_label=ignore_label,
        image_root=images,
        sem_seg_root=maps,
        list_file=list_file,
        evaluator_type="sem_seg",
        num_images=num_images,
    )


register_label_map_datasets(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
