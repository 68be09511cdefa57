"""Conversion of released label maps: every id becomes the class that the data set's registration names."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from PIL import Image
from scipy.io import savemat


@pytest.fixture(scope="module")
def tool(load_tool) -> ModuleType:
    return load_tool("prepare_label_maps")


def test_ade20k(tool, tmp_path: Path, capsys):
    labels = np.arange(151, dtype=np.uint8).reshape(1, -1)
    folder = tmp_path / "annotations" / "training"
    folder.mkdir(parents=True)
    Image.fromarray(labels).save(folder / "a.png")
    for count in (1, 0):  # the second time nothing is left to do
        tool.main(["ade20k", str(tmp_path)])
        assert f"{count} label maps" in capsys.readouterr().out
    converted = np.asarray(Image.open(tmp_path / "annotations_detectron2" / "training" / "a.png"))
    assert converted.tolist() == [[255, *range(150)]] and converted.dtype == np.uint8
    Image.fromarray(np.uint8([[151]])).save(folder / "b.png")
    with pytest.raises(SystemExit, match=r"error: .*b\.png has the label\(s\) \[151\]"):
        tool.main(["ade20k", str(tmp_path)])


def test_coco_stuff_10k(tool, tmp_path: Path):
    classes = MetadataCatalog.get("cocostuff10k_train_sem_seg").stuff_classes
    ids = {0: None, 1: "person", 13: "stop sign", 90: "toothbrush", 92: "banner", 157: "sky-other", 182: "wood"}
    (tmp_path / "annotations").mkdir()
    savemat(tmp_path / "annotations" / "COCO_train2014_1.mat", {"S": np.array([list(ids)], dtype=np.uint8)})
    assert tool.prepare("cocostuff10k", tmp_path) == 1
    (converted,) = np.asarray(Image.open(tmp_path / "annotations_detectron2" / "COCO_train2014_1.png")).tolist()
    assert [None if i == 255 else classes[i] for i in converted] == list(ids.values())
    savemat(tmp_path / "annotations" / "COCO_train2014_2.mat", {"S": np.array([[12]], dtype=np.uint8)})  # no such class
    with pytest.raises(ValueError, match=r"_2\.mat has the label\(s\) \[12\]"):
        tool.prepare("cocostuff10k", tmp_path)


def test_a_folder_without_label_maps_is_an_error(tool, tmp_path: Path):
    with pytest.raises(SystemExit, match=r"error: there is no \*\.png below .*annotations"):
        tool.main(["ade20k", str(tmp_path)])
