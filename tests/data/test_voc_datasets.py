"""Data sets in the layout of Pascal VOC, and the part of a data set that is fine-tuned on."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_voc_instances
from PIL import Image

from d2_objssl.config import add_objssl_config
from d2_objssl.data import register_image_folders
from d2_objssl.data.labelled_images import check_classes, take_fraction
from d2_objssl.data.loading import load_dataset_dicts
from d2_objssl.data.voc_datasets import find_classes, load_voc_split, register_voc_split

HEIGHT, WIDTH = 30, 40


def write(root: Path, image_id: str, body: str, *, suffix: str = ".jpg", split: str = "train", exif: int = 1) -> Path:
    """Add an image of 40 x 30 pixels with that XML to a split; returns the annotation's path."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    orientation = Image.Exif()
    orientation[0x0112] = exif
    image = Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    image.save(root / "JPEGImages" / f"{image_id}{suffix}", exif=orientation)
    with open(root / "ImageSets/Main" / f"{split}.txt", "a") as f:
        f.write(f"{image_id}\n")
    annotation = root / "Annotations" / f"{image_id}.xml"
    annotation.write_text(f"<annotation>{body}</annotation>")
    return annotation


def xml_object(name: str, *box: float) -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=False))
    return f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "a", xml_object("dog", 1, 1, WIDTH, HEIGHT) + xml_object("cat", 5, 6, 5, 6))
    write(tmp_path, "b c", xml_object("ant", 2.5, 3, 10, 12), suffix=".png", split="test")
    return tmp_path


# ---------------------------------------------------------------------------------------------------- what is read


def test_a_folder_needs_no_registration_and_its_splits_agree_on_the_classes(folder, catalog):
    names = [f"voc:{folder}:train", f"voc:{folder}:test"]
    register_image_folders([*names, names[0]])
    for name in names:
        assert MetadataCatalog.get(name).thing_classes == ["ant", "cat", "dog"]
    (first,), (second,) = (DatasetCatalog.get(name) for name in names)
    assert (first["height"], first["width"], first["image_id"]) == (HEIGHT, WIDTH, "a")
    # From 1 with both ends included to continuous coordinates: the whole image, and a single pixel.
    assert [(a["category_id"], a["bbox"]) for a in first["annotations"]] == [(2, [0, 0, 40, 30]), (1, [4, 5, 5, 6])]
    assert Path(second["file_name"]).name == "b c.png"
    assert second["annotations"][0]["bbox"] == [1.5, 2, 10, 12]


@pytest.mark.parametrize("name", ["labels.txt", "classes.txt"])
def test_a_list_of_classes_decides_on_their_order(folder, name):
    (folder / name).write_text("dog\nant\ncat\nbee\n")
    assert find_classes(str(folder)) == ["dog", "ant", "cat", "bee"]
    (folder / name).write_text("dog\ndog\n")
    with pytest.raises(ValueError, match=rf"{name} must list each class once"):
        find_classes(str(folder))


def test_bccd_is_read_as_detectron2_reads_it(catalog, test_data):
    classes = ("RBC", "WBC", "Platelets")
    assert MetadataCatalog.get("bccd_train").thing_classes == list(classes)
    root = str(test_data / "bccd")
    assert find_classes(root) == sorted(classes)
    ours = load_voc_split(root, "val", classes)
    assert ours == load_voc_instances(root, "val", classes)
    assert len(ours) == MetadataCatalog.get("bccd_val").num_images


def test_size_is_that_of_the_image_as_it_is_read(tmp_path):
    size = "<size><width>{}</width><height>{}</height></size>"
    file = write(tmp_path, "a", size.format(HEIGHT, WIDTH) + xml_object("dog", 1, 1, 30, 40), exif=6)
    (turned,) = load_voc_split(str(tmp_path), "train", ["dog"])
    assert (turned["width"], turned["height"]) == (HEIGHT, WIDTH)
    file.write_text(f"<annotation>{size.format(WIDTH, HEIGHT)}</annotation>")
    with pytest.raises(ValueError, match=rf"a\.xml: its size \(width, height\) is \({WIDTH}, {HEIGHT}\)"):
        load_voc_split(str(tmp_path), "train", ["dog"])


def test_boxes_that_count_from_0_are_warned_about(tmp_path, caplog):
    write(tmp_path, "a", xml_object("dog", 0, 3, 10, 12))
    assert load_voc_split(str(tmp_path), "train", ["dog"])[0]["annotations"][0]["bbox"] == [-1, 2, 10, 12]
    assert "1 image(s) count pixels from 0" in caplog.text


# ---------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (xml_object("dgo", 1, 1, 2, 2), 'unknown class "dgo"; the classes are ant, cat, dog'),
        (xml_object("dog", 1, 1, WIDTH + 1, 2), r"leaves the image of 40 x 30"),
        (xml_object("dog", -1, 1, 5, 2), "leaves the image"),
        (xml_object("dog", float("nan"), 1, 5, 2), "leaves the image"),
        (xml_object("dog", 9, 1, 8, 5), "has no area"),
        (xml_object("dog", 1, 1, 2), r'object 1 \("dog"\) has no bndbox'),
        (xml_object("", 1, 1, 2, 2), "object 1 has no name"),
        ("<size><width>40</width></size>", "no integer width and height"),
        ("<object>", "no valid XML"),
    ],
)
def test_a_wrong_annotation_is_refused_with_its_path(folder, body, message):
    file = write(folder, "wrong", body)
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}.*{message}"):
        load_voc_split(str(folder), "train", ["ant", "cat", "dog"])


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("Annotations/a.xml", r"no .*Annotations/a\.xml for .*a\.jpg"),
        ("JPEGImages/a.jpg", r"train\.txt names a, but there is no .*a\.jpg"),
        ("ImageSets/Main/train.txt", r"no .*ImageSets/Main/train\.txt; splits of .*: test$"),
    ],
)
def test_a_missing_file_is_found_when_the_name_is_given(folder, catalog, gone, message):
    (folder / gone).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        register_image_folders([f"voc:{folder}:train"])


@pytest.mark.parametrize(("lines", "message"), [("", "names no image"), ("a\na\n", "images twice, for example a")])
def test_a_split_names_each_image_once(folder, lines, message):
    (folder / "ImageSets/Main/train.txt").write_text(lines)
    with pytest.raises(ValueError, match=message):
        load_voc_split(str(folder), "train", ["cat", "dog"])


@pytest.mark.parametrize("name", ["voc:", "voc:/data/cells", "voc::train", "voc:/data/cells:"])
def test_a_name_without_folder_or_split_is_refused(name):
    with pytest.raises(ValueError, match="the form is"):
        register_image_folders([name])


# ------------------------------------------------------------------------------- the images that are fine-tuned on


@pytest.fixture
def configured(folder: Path, catalog: None) -> Callable[..., CfgNode]:
    def configure(*opts: object) -> CfgNode:
        cfg = get_cfg()
        add_objssl_config(cfg)
        cfg.DATASETS.TRAIN = (f"voc:{folder}:train",)
        cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", 3, *opts])
        return cfg

    return configure


def test_a_fraction_is_fixed_and_part_of_every_larger_one(configured):
    images = [{"image_id": i} for i in range(205)]

    def taken(fraction: float, *opts: object) -> list[int]:
        return [d["image_id"] for d in take_fraction(configured("DATASETS.TRAIN_FRACTION", fraction, *opts), images)]

    ten, half = taken(0.1, "SEED", 5), taken(0.5)
    assert (len(ten), len(half), len(taken(1.0)), len(taken(0.001))) == (20, 102, 205, 1)
    assert set(ten) < set(half) and ten == sorted(ten) == taken(0.1)
    assert ten != taken(0.1, "DATASETS.TRAIN_FRACTION_SEED", 1)
    assert max(ten) > 100  # not the first ones
    with pytest.raises(ValueError, match=r"TRAIN_FRACTION is 10\.0"):
        taken(10.0)


def test_fine_tuning_loads_the_fraction_and_pretraining_all(folder, configured):
    for i in range(9):
        write(folder, f"more{i}", xml_object("dog", 1, 1, 5, 5))
    opts = ("DATASETS.TRAIN_FRACTION", 0.5)
    assert len(load_dataset_dicts(configured(*opts))) == 5
    assert len(load_dataset_dicts(configured(*opts, "INPUT.SSL.NUM_VIEWS", 2))) == 10


def test_classes_must_fit_the_model_and_the_test_set(configured, folder):
    register_image_folders([f"voc:{folder}:train"])
    check_classes(configured())
    with pytest.raises(ValueError, match=r"has 3 classes \(ant, cat, dog\), but MODEL.ROI_HEADS.NUM_CLASSES is 80"):
        check_classes(configured("MODEL.ROI_HEADS.NUM_CLASSES", 80))
    register_voc_split("test_other_order", str(folder), "test", ["ant", "dog", "cat"])
    with pytest.raises(ValueError, match='Class 1 of "test_other_order" is "dog", but "cat" in "voc:'):
        check_classes(configured("DATASETS.TEST", ("test_other_order",)))
