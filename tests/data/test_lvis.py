"""LVIS is read without the package lvis, into the dicts of Detectron2's own loader."""

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.lvis import load_lvis_json

from d2_objssl.data.known_sizes import check_datasets
from d2_objssl.data.lvis import load_lvis, register_lvis


class IndexOfLVIS:
    """What Detectron2's loader uses of the package's class LVIS."""

    def __init__(self, file: str) -> None:
        content = json.loads(Path(file).read_text())
        self.imgs = {image["id"]: image for image in content["images"]}
        self.img_ann_map = defaultdict(list)
        for annotation in content["annotations"]:
            self.img_ann_map[annotation["image_id"]].append(annotation)

    def load_imgs(self, ids: list[int]) -> list[dict[str, Any]]:
        return [self.imgs[i] for i in ids]


def make_content() -> dict[str, Any]:
    url = "http://images.cocodataset.org"
    images = [
        {"id": 9, "height": 40, "width": 50, "coco_url": f"{url}/val2017/000000000009.jpg", "neg_category_ids": [2]},
        {"id": 4, "height": 30, "width": 60, "coco_url": f"{url}/train2017/000000000004.jpg"},
    ]
    images[0]["not_exhaustive_category_ids"] = [1]
    square = {"bbox": [1, 2, 10, 10], "area": 100, "segmentation": [[1, 2, 11, 2, 11, 12, 1, 12]]}
    objects = [{"id": i, "image_id": 9, "category_id": c, **square} for i, c in ((1, 3), (2, 1))]
    return {"images": images, "annotations": objects, "categories": [{"id": i} for i in (1, 2, 3)]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "lvis").mkdir()
    (tmp_path / "coco").mkdir()
    (tmp_path / "lvis" / "lvis_v1_val.json").write_text(json.dumps(make_content()))
    return tmp_path


def test_dicts_are_those_of_detectron2s_loader(folder, monkeypatch):
    package = ModuleType("lvis")
    package.LVIS = IndexOfLVIS
    monkeypatch.setitem(sys.modules, "lvis", package)
    file = str(folder / "lvis" / "lvis_v1_val.json")
    ours = load_lvis(file, str(folder / "coco"))
    assert ours == load_lvis_json(file, f"{folder}/coco/")
    assert [d["image_id"] for d in ours] == [4, 9] and ours[1]["file_name"] == f"{folder}/coco/val2017/000000000009.jpg"
    assert [a["category_id"] for a in ours[1]["annotations"]] == [2, 0]


def test_the_catalogs_names_need_no_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lvis", None)  # importing it fails
    entries = {name: DatasetCatalog[name] for name in ("lvis_v1_train", "lvis_v1_val")}
    register_lvis(str(folder))
    try:
        assert len(DatasetCatalog.get("lvis_v1_val")) == 2
    finally:
        DatasetCatalog.update(entries)
    metadata = MetadataCatalog.get("lvis_v1_val")
    assert metadata.evaluator_type == "lvis" and len(metadata.thing_classes) == 1203
    with pytest.raises(FileNotFoundError, match=r"lvis/lvis_v1_val\.json"):
        check_datasets(["lvis_v1_val"], "DATASETS.TEST")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("segmentation", [[1, 2, 3, 4]], "annotation 1 has no polygon, or one of less than 3 points"),
        ("category_id", 4, "annotation 1 is of class 4; they are 1 to 3"),
    ],
)
def test_broken_annotations_are_named(tmp_path, key, value, message):
    content = make_content()
    content["annotations"][0][key] = value
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"a\.json: {message}"):
        load_lvis(str(tmp_path / "a.json"), "")


def test_cocos_own_format_is_refused(tmp_path):
    content = make_content()
    del content["images"][1]["coco_url"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"a\.json: image 4 has no coco_url"):
        load_lvis(str(tmp_path / "a.json"), "")
