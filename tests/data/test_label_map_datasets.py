"""Registered data sets with label maps: classes, sizes of the complete sets, files that are read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2_objssl.data.known_sizes import check_datasets
from d2_objssl.data.label_map_datasets import COCO_STUFF_10K_CLASSES, load_listed_label_maps


@pytest.mark.parametrize(
    ("name", "num_images", "num_classes", "ignored"),
    [
        ("voc_2012_trainaug_sem_seg", 10_582, 21, 255),
        ("voc_2012_val_sem_seg", 1_449, 21, 255),
        ("cityscapes_fine_sem_seg_train", 2_975, 19, 255),
        ("cityscapes_fine_sem_seg_val", 500, 19, 255),
        ("ade20k_sem_seg_train", 20_210, 150, 255),
        ("ade20k_sem_seg_val", 2_000, 150, 255),
        ("cocostuff10k_train_sem_seg", 9_000, 171, 255),
        ("cocostuff10k_test_sem_seg", 1_000, 171, 255),
        ("camvid_train_sem_seg", 367, 11, 11),
        ("camvid_val_sem_seg", 101, 11, 11),
    ],
)
def test_catalog(name, num_images, num_classes, ignored):
    assert name in DatasetCatalog
    metadata = MetadataCatalog.get(name)
    assert (metadata.num_images, len(metadata.stuff_classes), metadata.ignore_label) == (
        num_images,
        num_classes,
        ignored,
    )
    assert metadata.evaluator_type in ("sem_seg", "cityscapes_sem_seg")


def test_coco_stuff_10k_has_the_80_things_and_91_stuff_classes_in_the_order_of_their_ids():
    ids = list(COCO_STUFF_10K_CLASSES)
    assert ids == sorted(ids) and ids[79:81] == [90, 92] and ids[-1] == 182
    assert set(range(1, 91)) - set(ids) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}, "ids that COCO never used"
    names = [COCO_STUFF_10K_CLASSES[i] for i in (1, 13, 90, 92, 105, 110, 124, 149, 157, 169, 182)]
    expected = ["person", "stop sign", "toothbrush", "banner", "clothes", "desk-stuff", "grass", "road", "sky-other"]
    assert names == [*expected, "tree", "wood"]


@pytest.fixture
def root() -> Iterator[Path]:
    """The dataset root of the tests, for folders that are gone afterwards."""
    folder = Path(os.environ["DETECTRON2_DATASETS"])
    before = set(folder.iterdir())
    yield folder
    for path in set(folder.iterdir()) - before:
        path.unlink() if path.is_symlink() else shutil.rmtree(path)


def test_camvid_is_complete_and_has_its_labels(test_data: Path, root: Path):
    (root / "camvid").symlink_to(test_data / "camvid")
    for split in ("train", "val", "test"):
        dicts = DatasetCatalog.get(f"camvid_{split}_sem_seg")
        assert len(dicts) == MetadataCatalog.get(f"camvid_{split}_sem_seg").num_images
        labels = np.asarray(Image.open(dicts[-1]["sem_seg_file_name"]))
        assert labels.shape == (360, 480) and labels.max() <= 11


def write_maps(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names:
        (folder / f"{name}.png").touch()


def test_listed_images_of_voc(root: Path):
    for split in ("trainaug", "val"):
        lists = root / "VOC2012" / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("2007_000032\n2007_000039\n")
        folder = {"trainaug": "SegmentationClassAug", "val": "SegmentationClass"}[split]
        write_maps(root / "VOC2012" / folder, "2007_000032", "2007_000039")
        dicts = DatasetCatalog.get(f"voc_2012_{split}_sem_seg")
        assert [d["image_id"] for d in dicts] == ["2007_000032", "2007_000039"]
        assert dicts[1]["file_name"] == str(root / "VOC2012" / "JPEGImages" / "2007_000039.jpg")
        assert dicts[1]["sem_seg_file_name"] == str(root / "VOC2012" / folder / "2007_000039.png")


def test_a_list_without_images_is_refused(tmp_path):
    (tmp_path / "train.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"train\.txt names no image"):
        load_listed_label_maps(str(tmp_path / "train.txt"), "images", "labels")


def test_label_maps_that_are_missing_are_counted_and_named(tmp_path):
    names = [f"city/{i}" for i in range(12)]
    (tmp_path / "train.txt").write_text("\n".join(names))
    write_maps(tmp_path / "maps" / "city", *(str(i) for i in range(12) if i not in (3, 5, 7, 8)))
    (tmp_path / "maps" / "city" / "8.png").mkdir()  # no file
    with pytest.raises(
        FileNotFoundError, match=r"train\.txt: 4 of the label maps of its 12 images.*city/3\.png, .*5\.png, .*7\.png$"
    ):
        load_listed_label_maps(str(tmp_path / "train.txt"), "images", str(tmp_path / "maps"))


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_a_missing_list_of_images_is_found_before_the_run(root, key):
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        (root / "VOC2012" / folder).mkdir(parents=True)
    name = {"TRAIN": "voc_2012_trainaug_sem_seg", "TEST": "voc_2012_val_sem_seg"}[key]
    split = {"TRAIN": "trainaug", "TEST": "val"}[key]
    with pytest.raises(FileNotFoundError, match=rf"{name}.*no \S*ImageSets/Segmentation/{split}\.txt:"):
        check_datasets([name], f"DATASETS.{key}")
