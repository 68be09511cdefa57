"""Detection data sets in the layout of Pascal VOC.

    PATH/JPEGImages/ID.jpg          the images; other types than JPEG are found, too
    PATH/Annotations/ID.xml         the objects of an image
    PATH/ImageSets/Main/SPLIT.txt   the ids of a split, one a line
    PATH/labels.txt or classes.txt  optional: the classes in their order, one a line

* `voc:PATH:SPLIT` in DATASETS.TRAIN or DATASETS.TEST: a split of any such folder; nothing to register. Without a list of
  classes, they are the names found in Annotations, sorted. The whole folder is read for them, so that its splits agree.
* `bccd_{train,val,trainval,test}`: BCCD, three kinds of blood cells, in DETECTRON2_DATASETS/bccd.

A box (xmin, ymin, xmax, ymax) counts pixels from 1, both ends included. As in Detectron2's `load_voc_instances` it becomes
(xmin - 1, ymin - 1, xmax, ymax), and objects marked "difficult" are trained with. Unlike there, what is missing or wrong
is an error that names the file, and only `name` and `bndbox` of an object are required. Boxes that count from 0 are
accepted with a warning: they are a pixel off.
"""

from __future__ import annotations

import logging
import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from .image_reading import check_ordinary_file

logger = logging.getLogger(__name__)

VOC_PREFIX = "voc:"
_CLASS_FILES = ("labels.txt", "classes.txt")
_BCCD_CLASSES = ("RBC", "WBC", "Platelets")
_BCCD_SIZES = {"train": 205, "val": 87, "trainval": 292, "test": 72}  # split -> images
_EXIF_ORIENTATION = 0x0112
_TURNED = range(5, 9)  # the orientations that exchange width and height


class VOCObject(NamedTuple):
    """An object as its annotation has it.

    Attributes:
        name: the class.
        box: (xmin, ymin, xmax, ymax) in pixels from 1 on, both ends included.
        difficult: whether it does not count in the evaluation.
    """

    name: str
    box: tuple[float, float, float, float]
    difficult: bool


class VOCAnnotation(NamedTuple):
    """What an annotation file holds: the (width, height) of the image in pixels, None if not given, and the objects."""

    size: tuple[int, int] | None
    objects: list[VOCObject]


def read_annotation(file: str) -> VOCAnnotation:
    """Read one file of Annotations.

    Raises:
        FileNotFoundError: naming the file, if there is none.
        ValueError: naming the file, if it is no XML, or an object has no name or no box of four numbers.
    """
    try:
        tree = ET.parse(file)
    except ET.ParseError as error:
        raise ValueError(f"{file} is no valid XML: {error}") from error
    objects = []
    for i, node in enumerate(tree.findall("object"), start=1):
        name = (node.findtext("name") or "").strip()
        if not name:
            raise ValueError(f"{file}: object {i} has no name")
        try:
            xmin, ymin, xmax, ymax = (float(node.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax"))
        except ValueError:
            raise ValueError(f'{file}: object {i} ("{name}") has no bndbox of xmin, ymin, xmax, ymax') from None
        difficult = (node.findtext("difficult") or "0").strip() in ("1", "True", "true")
        objects.append(VOCObject(name, (xmin, ymin, xmax, ymax), difficult))
    if tree.find("size") is None:
        return VOCAnnotation(None, objects)
    try:
        return VOCAnnotation((int(tree.findtext("size/width", "")), int(tree.findtext("size/height", ""))), objects)
    except ValueError:
        raise ValueError(f"{file}: its size has no integer width and height") from None


def read_split(root: str, split: str) -> list[str]:
    """Image ids of a split, in the order of its file.

    Raises:
        FileNotFoundError: if there is no such split; the message says which ones exist.
        ValueError: if the file names no image, or one twice.
    """
    folder = os.path.join(root, "ImageSets", "Main")
    file = os.path.join(folder, f"{split}.txt")
    if not os.path.isfile(file):
        present = sorted(n[:-4] for n in os.listdir(folder) if n.endswith(".txt")) if os.path.isdir(folder) else []
        raise FileNotFoundError(f"There is no {file}; splits of {root}: {', '.join(present) or 'none'}")
    with open(file) as f:
        ids = [line.strip() for line in f if line.strip()]
    if not ids:
        raise ValueError(f"{file} names no image")
    if len(set(ids)) < len(ids):
        raise ValueError(f"{file} names images twice, for example {next(i for i in ids if ids.count(i) > 1)}")
    return ids


def find_classes(root: str) -> list[str]:
    """Classes of a data set: those that its labels.txt or classes.txt lists, else the names in Annotations, sorted.

    Raises:
        FileNotFoundError: if there is neither a list nor a folder Annotations.
        ValueError: if there is no class, or a list has one twice.
    """
    for name in _CLASS_FILES:
        file = os.path.join(root, name)
        if os.path.isfile(file):
            with open(file) as f:
                classes = [line.strip() for line in f if line.strip()]
            if not classes or len(set(classes)) < len(classes):
                raise ValueError(f"{file} must list each class once, one a line; it has {classes}")
            return classes
    folder = os.path.join(root, "Annotations")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"There is no folder {folder}: {root} has not the layout of Pascal VOC")
    files = (os.path.join(folder, n) for n in os.listdir(folder) if n.endswith(".xml"))
    classes = sorted({obj.name for file in files for obj in read_annotation(file).objects})
    if not classes:
        raise ValueError(f"No file in {folder} has an object")
    return classes


def load_voc_split(root: str, split: str, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Dataset dicts of a split, checked.

    Args:
        root: the folder PATH of the module's docstring.
        split: name of a file in ImageSets/Main.
        classes: their indices are the category ids.

    Returns:
        Dicts of "file_name", "image_id" (the id in the split), "height", "width" (pixels, after rotation by the EXIF
        orientation), and "annotations" with "bbox" (XYXY_ABS), "bbox_mode" and "category_id".

    Raises:
        FileNotFoundError: if the split, an image or an annotation does not exist.
        ValueError: naming the annotation, for an unknown class, a size that is not the image's, a box that leaves the
            image or has no area.
    """
    ids = read_split(root, split)
    images = _find_images(os.path.join(root, "JPEGImages"))
    dicts = []
    num_from_zero = 0
    for image_id in ids:
        if image_id not in images:
            source = os.path.join(root, "ImageSets", "Main", f"{split}.txt")
            raise FileNotFoundError(f"{source} names {image_id}, but there is no {root}/JPEGImages/{image_id}.jpg")
        file = os.path.join(root, "Annotations", f"{image_id}.xml")
        if not os.path.isfile(file):
            raise FileNotFoundError(f"There is no {file} for {images[image_id]}, an image of the split {split}")
        annotation = read_annotation(file)
        width, height = _image_size(images[image_id])
        _check(file, annotation, (width, height), classes)
        num_from_zero += any(min(obj.box[:2]) < 1 for obj in annotation.objects)
        dicts.append(
            {
                "file_name": images[image_id],
                "image_id": image_id,
                "height": height,
                "width": width,
                "annotations": [_to_detectron2(obj, classes) for obj in annotation.objects],
            }
        )
    if num_from_zero:
        logger.warning(
            "%s: boxes of %d image(s) count pixels from 0, those of VOC from 1; boxes may be a pixel off",
            root,
            num_from_zero,
        )
    return dicts


def _find_images(folder: str) -> dict[str, str]:
    """Name without suffix -> path, of the files in a folder that Pillow's list of suffixes knows as images."""
    suffixes = Image.registered_extensions()
    files: dict[str, str] = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in suffixes:
            files.setdefault(stem, os.path.join(folder, name))
    return files


def _image_size(file: str) -> tuple[int, int]:
    check_ordinary_file(file)
    try:
        with Image.open(file) as image:
            width, height = image.size
            return (height, width) if image.getexif().get(_EXIF_ORIENTATION) in _TURNED else (width, height)
    except OSError as error:
        raise OSError(f"{file}: cannot read this image: {error}") from error


def _check(file: str, annotation: VOCAnnotation, size: tuple[int, int], classes: Sequence[str]) -> None:
    """Refuse what does not fit the image, whose (width, height) is `size`, or the classes."""
    width, height = size
    if annotation.size not in (None, size):
        raise ValueError(f"{file}: its size (width, height) is {annotation.size}, but that of the image is {size}")
    for name, box, _ in annotation.objects:
        if name not in classes:
            raise ValueError(f'{file}: unknown class "{name}"; the classes are {", ".join(classes)}')
        xmin, ymin, xmax, ymax = box
        if xmax < xmin or ymax < ymin:
            raise ValueError(f'{file}: the box {box} of "{name}" has no area')
        if not (xmin >= 0 and ymin >= 0 and xmax <= width and ymax <= height):
            raise ValueError(f'{file}: the box {box} of "{name}" leaves the image of {width} x {height} pixels')


def _to_detectron2(obj: VOCObject, classes: Sequence[str]) -> dict[str, Any]:
    xmin, ymin, xmax, ymax = obj.box
    box = [xmin - 1.0, ymin - 1.0, xmax, ymax]
    return {"category_id": classes.index(obj.name), "bbox": box, "bbox_mode": BoxMode.XYXY_ABS}


def register_voc_split(name: str, root: str, split: str, classes: Sequence[str], *, year: int = 2012) -> None:
    """Enter a split into the catalogs; nothing is read yet.

    Args:
        name: the catalog name.
        root, split, classes: as in `load_voc_split`.
        year: decides what AP is: 2007: the mean at 11 points of recall; 2012: the area under the curve.
    """
    DatasetCatalog.register(name, partial(load_voc_split, root, split, classes))
    MetadataCatalog.get(name).set(
        thing_classes=list(classes), dirname=root, split=split, year=year, evaluator_type="pascal_voc"
    )


def register_voc_folder(name: str) -> None:
    """Enter `voc:PATH:SPLIT` into the catalogs, unless it is there already; all of it is checked.

    Raises:
        FileNotFoundError, ValueError: for a name of another form, and as `find_classes` and `load_voc_split`.
    """
    if name in DatasetCatalog:
        return
    path, _, split = name[len(VOC_PREFIX) :].rpartition(":")
    if not path or not split:
        raise ValueError(
            f'DATASETS names "{name}"; the form is "{VOC_PREFIX}PATH:SPLIT", as {VOC_PREFIX}/data/cells:train'
        )
    root = os.path.expanduser(path)
    classes = find_classes(root)
    load_voc_split(root, split, classes)  # a test split is read again at the end of training: find its errors now
    register_voc_split(name, root, split, classes)


def register_bccd(root: str) -> None:
    """Enter the splits of BCCD, which lies in `root`/bccd, into the catalogs."""
    for split, num_images in _BCCD_SIZES.items():
        register_voc_split(f"bccd_{split}", os.path.join(root, "bccd"), split, _BCCD_CLASSES)
        MetadataCatalog.get(f"bccd_{split}").num_images = num_images
