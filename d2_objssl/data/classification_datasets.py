"""Data sets of images with one class each, "label", kept as a folder of class subfolders.

* `folders:PATH` in DATASETS.TRAIN or DATASETS.TEST: PATH/CLASS/**/*.jpg; nothing to register. Classes are numbered in the
  sorted order of their names.
* `imagenet_1k_train`, `imagenet_1k_val`: imagenet/{train,val}/CLASS/*.JPEG under the dataset root, CLASS a WordNet id.
* `imagenet_1k_train_1pct`, `imagenet_1k_train_10pct`: the images of imagenet/train that SimCLR's lists name, one file name a
  line: imagenet/1percent.txt and imagenet/10percent.txt, from github.com/google-research/simclr, imagenet_subsets.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

logger = logging.getLogger(__name__)

FOLDERS_PREFIX = "folders:"

# Numbers of images of the complete sets; those of the lists: Chen et al., "Big self-supervised models are strong
# semi-supervised learners", NeurIPS 2020.
_IMAGENET_SPLITS = {"train": 1_281_167, "val": 50_000}
_IMAGENET_LISTS = {"1pct": ("1percent.txt", 12_811), "10pct": ("10percent.txt", 128_116)}


def list_classes(folder: str) -> list[str]:
    """Sorted names of the subfolders; hidden ones are left out.

    Raises:
        FileNotFoundError, NotADirectoryError: if there is no such folder.
        ValueError: if it has no subfolders.
    """
    if not os.path.exists(folder):
        raise FileNotFoundError(f'The folder "{folder}" does not exist; it should have a subfolder for each class')
    if not os.path.isdir(folder):
        raise NotADirectoryError(f'"{folder}" is a file; a folder with a subfolder for each class is needed')
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f'"{folder}" has no subfolders; it should have one for each class, with its images')
    return names


def load_class_folders(folder: str) -> list[dict[str, Any]]:
    """Dataset dicts ("file_name", "image_id", "label") of all images below the class subfolders of a folder.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as `list_classes`, and for a class without images.
    """
    labels = {name: i for i, name in enumerate(list_classes(folder))}
    try:
        samples = make_dataset(folder, labels, extensions=IMG_EXTENSIONS)
    except FileNotFoundError as error:  # names the classes, but not where they are
        raise FileNotFoundError(f'"{folder}": {error}') from error
    samples = [(file, label) for file, label in samples if not os.path.basename(file).startswith(".")]
    logger.info("Found %d images of %d classes in %s", len(samples), len(labels), folder)
    return [{"file_name": file, "image_id": i, "label": label} for i, (file, label) in enumerate(samples)]


def load_listed_images(list_file: str, folder: str) -> list[dict[str, Any]]:
    """Dataset dicts as of `load_class_folders`, of the images that a text file names, one CLASS_NUMBER.JPEG a line.

    Raises:
        FileNotFoundError: if the file, the folder or an image that is listed does not exist.
        ValueError: if a line names no class of the folder, or there is none.
    """
    if not os.path.isfile(list_file):
        raise FileNotFoundError(
            f"{list_file} does not exist; it is a list of github.com/google-research/simclr, folder imagenet_subsets"
        )
    with open(list_file) as f:
        names = f.read().split()
    if not names:
        raise ValueError(f"{list_file} names no image")
    labels = {name: i for i, name in enumerate(list_classes(folder))}
    dicts: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        class_name = name.partition("_")[0]
        if class_name not in labels:
            raise ValueError(f'{list_file}, line {i + 1}: "{name}" is of no class in {folder}')
        dicts.append({"file_name": os.path.join(folder, class_name, name), "image_id": i, "label": labels[class_name]})
    missing = [d["file_name"] for d in dicts if not os.path.isfile(d["file_name"])]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(names)} images that {list_file} names do not exist, for example {missing[0]}"
        )
    return dicts


def class_names(dataset_name: str) -> list[str]:
    """Names of a data set's classes, in the order of their numbers.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as `list_classes`, and if the catalogs know of no classes.
    """
    metadata = MetadataCatalog.get(dataset_name)
    folder = metadata.get("class_root", None)
    names = metadata.get("thing_classes", None) if folder is None else list_classes(folder)
    if names is None:
        raise ValueError(f'"{dataset_name}" has no classes: neither class subfolders nor thing_classes in its metadata')
    return list(names)


def common_class_names(dataset_names: Sequence[str]) -> list[str]:
    """`class_names` of data sets that have the same ones.

    Raises:
        ValueError: if they differ, or there is no data set. The message names two sets that do not fit together.
    """
    if not dataset_names:
        raise ValueError("DATASETS.TRAIN and DATASETS.TEST are empty: there are no classes to learn")
    first, *others = dataset_names
    expected = class_names(first)
    for other in others:
        found = class_names(other)
        if found != expected:
            only = [sorted(set(a) - set(b))[:5] for a, b in ((expected, found), (found, expected))]
            raise ValueError(
                f'"{first}" has {len(expected)} classes and "{other}" has {len(found)}; they must be the same, in the '
                f"same order. Only the first has {only[0]}, only the second {only[1]} (at most 5 are shown)"
            )
    return expected


def register_class_folders(names: Iterable[str]) -> None:
    """Enter every `folders:PATH` of `names` into the catalogs, unless it is there already."""
    for name in names:
        if name.startswith(FOLDERS_PREFIX) and name not in DatasetCatalog:
            path = name[len(FOLDERS_PREFIX) :]
            if not path:
                raise ValueError(f'DATASETS names "{name}": a folder must follow "{FOLDERS_PREFIX}"')
            folder = os.path.expanduser(path)
            DatasetCatalog.register(name, partial(load_class_folders, folder))
            MetadataCatalog.get(name).set(image_root=folder, class_root=folder, evaluator_type="classification")


def register_imagenet(root: str) -> None:
    """Enter the sets of ImageNet into the catalogs; nothing is read yet.

    Args:
        root: the dataset root.
    """
    imagenet = os.path.join(root, "imagenet")
    for split, num_images in _IMAGENET_SPLITS.items():
        folder = os.path.join(imagenet, split)
        _register(f"imagenet_1k_{split}", folder, num_images, partial(load_class_folders, folder))
    train = os.path.join(imagenet, "train")
    for part, (list_name, num_images) in _IMAGENET_LISTS.items():
        listed = os.path.join(imagenet, list_name)
        _register(f"imagenet_1k_train_{part}", train, num_images, partial(load_listed_images, listed, train))


def _register(name: str, folder: str, num_images: int, load: Callable[[], list[dict[str, Any]]]) -> None:
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        image_root=folder, class_root=folder, num_images=num_images, evaluator_type="classification"
    )


register_imagenet(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
