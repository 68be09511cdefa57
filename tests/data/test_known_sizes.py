"""Names, files and sizes of data sets are checked before a run."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc

from d2_objssl.config import add_objssl_config
from d2_objssl.data import build_test_loader, build_train_loader
from d2_objssl.data.known_sizes import check_datasets, expected_size

NAME = "test_known_sizes"


@pytest.fixture
def boxes(tmp_path: Path, catalog: None) -> Callable[[int], str]:
    """Registers COCO-format data of N images, the last of which has no object, and returns the name."""

    def register(num_images: int) -> str:
        for i in range(num_images):
            (tmp_path / f"{i}.jpg").write_text("the loader looks whether there is something")
        images = [{"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 50} for i in range(num_images)]
        objects = [
            {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [1, 2, 20, 20], "area": 400, "iscrowd": 0}
            for i in range(num_images - 1)
        ]
        content = {"info": {}, "images": images, "annotations": objects, "categories": [{"id": 1, "name": "box"}]}
        (tmp_path / "boxes.json").write_text(json.dumps(content))
        register_coco_instances(NAME, {}, str(tmp_path / "boxes.json"), str(tmp_path))
        return NAME

    return register


def make_cfg(*opts: object) -> CfgNode:
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.merge_from_list(
        ["MODEL.ROI_HEADS.NUM_CLASSES", 1, "DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 2, *opts]
    )
    return cfg


def test_the_sets_of_the_configs_know_their_sizes() -> None:
    names = ("voc_2007_trainval", "voc_2012_trainval", "lvis_v1_train", "cityscapes_fine_instance_seg_train")
    assert [expected_size(MetadataCatalog.get(n)) for n in names] == [5_011, 11_540, 100_170, 2_975]
    assert expected_size(MetadataCatalog.get("scenes_tiny_val")) is None


@pytest.mark.parametrize("phase", ["train", "test"])
def test_an_incomplete_set_is_a_warning_and_an_error_where_asked_for(boxes, caplog, phase):
    name = boxes(5)
    MetadataCatalog.get(name).num_images = 1_200
    cfg = make_cfg("DATASETS.TRAIN", (name,), "DATASETS.TEST", ())
    build = build_train_loader if phase == "train" else lambda cfg: build_test_loader(cfg, name)
    with caplog.at_level(logging.WARNING):
        build(cfg)
    assert f'"{name}" has 5 images here, the complete set has 1,200' in caplog.text
    cfg.DATASETS.REQUIRE_COMPLETE = True
    with pytest.raises(ValueError, match=r"5 images here.*1,200.*DATASETS\.REQUIRE_COMPLETE"):
        build(cfg)


def test_images_are_counted_before_those_without_objects_are_left_out(boxes, caplog):
    name = boxes(5)
    MetadataCatalog.get(name).num_images = 5
    with caplog.at_level(logging.WARNING):
        loader = build_train_loader(make_cfg("DATASETS.TRAIN", (name,), "DATASETS.TEST", ()))
    assert loader.num_images == 4 and "images here" not in caplog.text


@pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST"])
def test_a_wrong_name_is_found_at_the_start_with_what_may_be_meant(boxes, key):
    names = {"DATASETS.TRAIN": (boxes(3),), "DATASETS.TEST": (NAME,), key: ("voc_2007_trainvall",)}
    with pytest.raises(ValueError, match=rf'{key} names "voc_2007_trainvall".*voc_2007_trainval\b'):
        build_train_loader(make_cfg(*(part for item in names.items() for part in item)))


@pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST"])
def test_a_missing_annotation_file_is_found_at_the_start(boxes, tmp_path, key):
    register_coco_instances("test_known_sizes_absent", {}, str(tmp_path / "absent.json"), str(tmp_path))
    names = {"DATASETS.TRAIN": (boxes(3),), "DATASETS.TEST": (NAME,), key: ("test_known_sizes_absent",)}
    with pytest.raises(
        FileNotFoundError, match=rf'{key} names "test_known_sizes_absent".*absent\.json.*DETECTRON2_DATA'
    ):
        build_train_loader(make_cfg(*(part for item in names.items() for part in item)))


def test_a_missing_split_of_pascal_voc_is_named(catalog, tmp_path):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/trainval.txt").touch()
    for split in ("trainval", "test"):
        register_pascal_voc(f"test_voc_{split}", str(tmp_path), split, 2007)
    check_datasets(["test_voc_trainval"], "DATASETS.TEST")
    with pytest.raises(FileNotFoundError, match=r'"test_voc_test".*ImageSets/Main/test\.txt'):
        check_datasets(["test_voc_test"], "DATASETS.TEST")


def test_sets_that_are_made_on_first_use_and_folders_are_left_to_their_loaders(catalog):
    assert "scenes_tiny_train_voc" in DatasetCatalog
    check_datasets(["scenes_tiny_train", "scenes_tiny_train_voc", "images:/nowhere"], "DATASETS.TRAIN")
