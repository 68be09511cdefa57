"""Classified images: folders of class subfolders, ImageNet's lists, the classes that sets must share, and the augmentation."""

import os
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2_objssl import add_objssl_config
from d2_objssl.data import ObjSSLDatasetMapper, register_image_folders
from d2_objssl.data.classification_datasets import (
    class_names,
    common_class_names,
    load_class_folders,
    load_listed_images,
)


def write_images(root: Path, **classes: list[str]) -> Path:
    """root/CLASS/NAME for every name of a class; images of 20 x 30 pixels (height x width)."""
    for class_name, names in classes.items():
        for name in names:
            path = root / class_name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 20)).save(path)
    return root


def test_folders_are_classes_in_sorted_order(tmp_path):
    write_images(tmp_path, zebra=["b.png"], ape=["z.jpg", "deep/a.JPEG", ".hidden.jpg"])
    (tmp_path / "zebra" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "readme.md").write_text("no class")
    dicts = load_class_folders(str(tmp_path))
    found = [(os.path.relpath(d["file_name"], tmp_path), d["label"], d["image_id"]) for d in dicts]
    assert found == [("ape/z.jpg", 0, 0), ("ape/deep/a.JPEG", 0, 1), ("zebra/b.png", 1, 2)]


def test_a_folder_is_named_by_a_prefix(tmp_path, catalog):
    name = f"folders:{write_images(tmp_path, a=['1.png'], b=['1.png'])}"
    register_image_folders([name])
    assert [d["label"] for d in DatasetCatalog.get(name)] == [0, 1]
    assert class_names(name) == ["a", "b"]
    assert MetadataCatalog.get(name).evaluator_type == "classification"


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "does not exist"),
        ("file", NotADirectoryError, "is a file"),
        ("flat", ValueError, "has no subfolders"),
        ("empty", FileNotFoundError, "no valid file for the classes empty"),
    ],
)
def test_what_is_no_folder_of_classes_is_named(tmp_path, content, error, message):
    root = tmp_path / "photos"
    if content == "file":
        root.write_text("")
    elif content == "flat":
        write_images(tmp_path, photos=["a.png"])
    elif content == "empty":
        write_images(root, full=["a.png"])
        (root / "empty").mkdir()
    with pytest.raises(error, match=message) as raised:
        load_class_folders(str(root))
    assert str(root) in str(raised.value)


def test_data_sets_of_other_classes_are_both_named(tmp_path, catalog):
    train = f"folders:{write_images(tmp_path / 'train', cat=['1.png'], dog=['1.png'])}"
    test = f"folders:{write_images(tmp_path / 'test', cat=['1.png'], wolf=['1.png'])}"
    register_image_folders([train, test])
    assert common_class_names([train, train]) == ["cat", "dog"]
    with pytest.raises(ValueError) as raised:
        common_class_names([train, test])
    assert all(text in str(raised.value) for text in (train, test, "['dog']", "['wolf']"))
    with pytest.raises(ValueError, match=r"coco_2017_train_images.*has no classes"):
        common_class_names(["coco_2017_train_images"])


def test_lists_of_simclr_select_images_of_imagenet(tmp_path):
    folder = write_images(tmp_path / "train", n01=["n01_1.JPEG", "n01_2.JPEG"], n02=["n02_7.JPEG"], n03=["n03_1.JPEG"])
    listed = tmp_path / "1percent.txt"
    listed.write_text("n03_1.JPEG\nn01_2.JPEG\n")
    dicts = load_listed_images(str(listed), str(folder))
    assert [(Path(d["file_name"]).name, d["label"]) for d in dicts] == [("n03_1.JPEG", 2), ("n01_2.JPEG", 0)]
    assert all(os.path.isfile(d["file_name"]) for d in dicts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "imagenet_subsets"),
        ("", "names no image"),
        ("n01_1.JPEG\nn09_1.JPEG\n", 'line 2: "n09_1.JPEG" is of no class'),
        ("n01_1.JPEG\nn01_5.JPEG\n", r"1 of the 2 images .* n01_5.JPEG"),
    ],
)
def test_a_wrong_list_is_explained(tmp_path, text, message):
    folder = write_images(tmp_path / "train", n01=["n01_1.JPEG"])
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace(" .* ", ".*")):
        load_listed_images(str(tmp_path / "list.txt"), str(folder))


@pytest.mark.parametrize(
    ("name", "num_images", "folder"),
    [
        ("imagenet_1k_train", 1_281_167, "train"),
        ("imagenet_1k_val", 50_000, "val"),
        ("imagenet_1k_train_1pct", 12_811, "train"),
        ("imagenet_1k_train_10pct", 128_116, "train"),
    ],
)
def test_sets_of_imagenet_know_their_sizes(name, num_images, folder):
    metadata = MetadataCatalog.get(name)
    assert (metadata.num_images, metadata.evaluator_type) == (num_images, "classification")
    assert metadata.class_root.endswith(os.path.join("imagenet", folder))


# --------------------------------------------------------------------------------------------- the augmentation


def make_cfg(**keys: object) -> CfgNode:
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.INPUT.AUGMENTATION = "classification"
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.CLASSIFICATION.CROP_SIZE = 16
    cfg.INPUT.CLASSIFICATION.TEST_SHORT_SIDE = 20
    for key, value in keys.items():
        cfg.INPUT.CLASSIFICATION[key] = value
    return cfg


@pytest.fixture
def gradient(tmp_path: Path) -> dict:
    """A dataset dict; the image's red grows from left to right, its green from top to bottom, a level a pixel."""
    y, x = np.mgrid[:20, :40]
    Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8)).save(tmp_path / "a.png")
    return {"file_name": str(tmp_path / "a.png"), "image_id": 0, "label": 7}


def test_images_of_tests_are_the_centre(gradient):
    mapped = ObjSSLDatasetMapper(make_cfg(), is_train=False)(gradient)
    assert mapped["label"] == 7
    image = mapped["image"].numpy()
    assert image.shape == (3, 16, 16)
    assert image[0, 0].tolist() == list(range(12, 28)) and image[1, :, 0].tolist() == list(range(2, 18))


def test_images_of_training_are_random_parts_and_flipped(gradient):
    mapper = ObjSSLDatasetMapper(make_cfg(CROP_SCALE=(0.1, 0.5)), is_train=True)
    np.random.seed(0)
    images = [mapper(gradient) for _ in range(20)]
    assert all(m["image"].shape == (3, 16, 16) and m["label"] == 7 for m in images)
    slopes = [int(m["image"][0, 8, -1]) - int(m["image"][0, 8, 0]) for m in images]
    assert {s > 0 for s in slopes} == {True, False}  # flipped, and not
    assert len(set(map(abs, slopes))) > 5  # of many widths
    never = ObjSSLDatasetMapper(make_cfg(FLIP_PROB=0.0), is_train=True)
    assert all(m["image"][0, 8, -1] > m["image"][0, 8, 0] for m in (never(gradient) for _ in range(10)))


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match=r"CROP_SIZE is 32.*TEST_SHORT_SIDE, 20"):
        ObjSSLDatasetMapper(make_cfg(CROP_SIZE=32), is_train=False)
