"""The evaluator of a data set follows from its `evaluator_type`, and works on this stack."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image

from d2_objssl.config import add_objssl_config
from d2_objssl.data.voc_datasets import register_voc_split
from d2_objssl.evaluation import FastCOCOEvaluator, build
from d2_objssl.evaluation.build import build_evaluator

NAME = "test_evaluation_build"


@pytest.fixture
def metadata() -> Iterator[Any]:
    yield MetadataCatalog.get(NAME)
    MetadataCatalog.remove(NAME)


def make_cfg(output_dir: Path) -> CfgNode:
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.OUTPUT_DIR = str(output_dir)
    return cfg


@pytest.mark.parametrize(
    ("evaluator_type", "name"),
    [
        ("coco", "FastCOCOEvaluator"),
        ("lvis", "FastLVISEvaluator"),
        ("pascal_voc", "VOCEvaluator"),
        ("cityscapes_sem_seg", "CityscapesLabelEvaluator"),
        ("sem_seg", "CheckedSemSegEvaluator"),
    ],
)
def test_every_known_type_has_its_evaluator(metadata, monkeypatch, tmp_path, evaluator_type, name):
    """The packages that some of them need may be absent, so only the call is looked at."""
    metadata.evaluator_type = evaluator_type
    monkeypatch.setattr(build, name, lambda dataset, **kwargs: (name, dataset, kwargs.get("output_dir")))
    built = build_evaluator(make_cfg(tmp_path), NAME)
    assert built[:2] == (name, NAME)
    assert built[2] in (None, str(tmp_path / "inference"))


def test_results_go_where_the_caller_wants(metadata, monkeypatch, tmp_path):
    metadata.evaluator_type = "coco"
    monkeypatch.setattr(build, "FastCOCOEvaluator", lambda dataset, output_dir: output_dir)
    assert build_evaluator(make_cfg(tmp_path), NAME, "elsewhere") == "elsewhere"


@pytest.mark.parametrize("evaluator_type", [None, "coco_panoptic_seg", "none"])
def test_an_unknown_type_is_refused_with_the_data_sets_name(metadata, tmp_path, evaluator_type):
    if evaluator_type is not None:
        metadata.evaluator_type = evaluator_type
    with pytest.raises(ValueError, match=rf'DATASETS\.TEST names "{NAME}".*"{evaluator_type or "none"}".*Known: coco'):
        build_evaluator(make_cfg(tmp_path), NAME)


@pytest.mark.parametrize(
    ("evaluator_type", "error", "message"),
    [
        ("lvis", ImportError, r"fast-eval"),
        ("cityscapes_sem_seg", ImportError, "pip install cityscapesscripts"),
        ("cityscapes_instance", ImportError, "pip install cityscapesscripts"),
        ("none", ValueError, r"evaluator_type is \"none\""),
    ],
)
def test_what_cannot_be_evaluated_is_found_before_the_run(
    metadata, monkeypatch, tmp_path, evaluator_type, error, message
):
    metadata.evaluator_type = evaluator_type
    find_spec, absent = importlib.util.find_spec, ("faster_coco_eval", "cityscapesscripts")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    cfg = make_cfg(tmp_path)
    build.check_evaluators(cfg)
    cfg.DATASETS.TEST = (NAME,)
    with pytest.raises(error, match=rf'"{NAME}".*{message}'):
        build.check_evaluators(cfg)


def test_a_folder_of_images_cannot_be_evaluated(tmp_path):
    with pytest.raises(ValueError, match="coco_2017_val_images"):
        build_evaluator(make_cfg(tmp_path), "coco_2017_val_images")


# ------------------------------------------------------------------------- test sets are loaded before the run


def voc_split(root: Path, name: str) -> None:
    """Register an image with one object, of that class."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(root / "JPEGImages" / "a.jpg")
    (root / "ImageSets" / "Main" / "test.txt").write_text("a\n")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    text = f"<annotation><object><name>{name}</name>{box}</object></annotation>"
    (root / "Annotations" / "a.xml").write_text(text)
    register_voc_split(NAME, str(root), "test", ("RBC", "WBC"))


def test_an_unknown_class_in_a_test_set_is_found_before_the_run(catalog, tmp_path):
    voc_split(tmp_path, "Elephant")
    cfg = make_cfg(tmp_path)
    build.check_test_sets(cfg)  # no test, no check
    cfg.DATASETS.TEST = (NAME,)
    with pytest.raises(ValueError, match=r'a\.xml: unknown class "Elephant"'):
        build.check_test_sets(cfg)


def test_an_incomplete_test_set_is_found_before_the_run(catalog, tmp_path):
    voc_split(tmp_path, "RBC")
    MetadataCatalog.get(NAME).num_images = 72
    cfg = make_cfg(tmp_path)
    cfg.DATASETS.TEST = (NAME,)
    build.check_test_sets(cfg)
    cfg.DATASETS.REQUIRE_COMPLETE = True
    with pytest.raises(ValueError, match=r"1 images here.*72.*DATASETS\.REQUIRE_COMPLETE"):
        build.check_test_sets(cfg)


def test_a_missing_image_of_a_test_set_is_found_before_the_run(catalog, tmp_path):
    (tmp_path / "a.jpg").touch()
    DatasetCatalog.register(NAME, lambda: [{"file_name": str(tmp_path / "a.jpg"), "label": 0}])
    cfg = make_cfg(tmp_path)
    cfg.DATASETS.TEST = (NAME,)
    with pytest.raises(OSError, match=r"a\.jpg: the file is empty"):
        build.check_test_sets(cfg)


@pytest.mark.parametrize(("evaluator_type", "key"), [("sem_seg", "sem_seg"), ("depth", "depth"), ("depth", "camera")])
def test_missing_label_and_depth_maps_of_a_test_set_are_found_before_the_run(catalog, tmp_path, evaluator_type, key):
    key = f"{key}_file_name"
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    dicts = [{"file_name": str(tmp_path / "a.png"), key: str(tmp_path / f"{i}.png")} for i in range(5)]
    DatasetCatalog.register(NAME, lambda: dicts)
    MetadataCatalog.get(NAME).evaluator_type = evaluator_type
    (tmp_path / "2.png").touch()
    cfg = make_cfg(tmp_path)
    cfg.DATASETS.TEST = (NAME,)
    with pytest.raises(FileNotFoundError, match=rf'4 file\(s\).*"{NAME}".*0\.png, \S*1\.png, \S*3\.png$'):
        build.check_test_sets(cfg)
    MetadataCatalog.remove(NAME)  # other evaluators do without them
    build.check_test_sets(cfg)


# -------------------------------------------------------------- perfect predictions on generated scenes score 100


def run(evaluator: DatasetEvaluator, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    evaluator.reset()
    for inputs, outputs in pairs:
        evaluator.process([inputs], [outputs])
    return evaluator.evaluate()


def perfect(dicts: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    pairs = []
    for d in dicts:
        instances = Instances((d["height"], d["width"]))
        boxes = np.array([a["bbox"] for a in d["annotations"]], dtype=np.float32)
        if d["annotations"][0]["bbox_mode"] == 1:  # XYWH_ABS
            boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = Boxes(torch.from_numpy(boxes))
        instances.pred_classes = torch.tensor([a["category_id"] for a in d["annotations"]])
        instances.scores = torch.ones(len(boxes))
        pairs.append((d, {"instances": instances}))
    return pairs


def test_coco(tmp_path):
    dicts = DatasetCatalog.get("scenes_tiny_val")
    evaluator = build_evaluator(make_cfg(tmp_path), "scenes_tiny_val")
    assert isinstance(evaluator, FastCOCOEvaluator)
    assert run(evaluator, perfect(dicts))["bbox"]["AP"] == pytest.approx(100)
    assert (tmp_path / "inference" / "coco_instances_results.json").exists()


def test_voc(tmp_path):
    dicts = DatasetCatalog.get("scenes_tiny_val_voc")
    results = run(build_evaluator(make_cfg(tmp_path), "scenes_tiny_val_voc"), perfect(dicts))["bbox"]
    assert results["AP50"] == pytest.approx(100)


def test_sem_seg_works_on_numpy_2(tmp_path):
    dicts = DatasetCatalog.get("scenes_tiny_val_sem_seg")
    num_classes = len(MetadataCatalog.get("scenes_tiny_val_sem_seg").stuff_classes)
    pairs = []
    for d in dicts:
        labels = torch.from_numpy(np.array(Image.open(d["sem_seg_file_name"]))).long()
        scores = torch.nn.functional.one_hot(labels, num_classes).permute(2, 0, 1).float()
        pairs.append((d, {"sem_seg": scores}))
    results = run(build_evaluator(make_cfg(tmp_path), "scenes_tiny_val_sem_seg"), pairs)["sem_seg"]
    assert results["mIoU"] == pytest.approx(100) and results["pACC"] == pytest.approx(100)
    pairs[0][1]["sem_seg"] = pairs[0][1]["sem_seg"].roll(1, dims=0)
    assert run(build_evaluator(make_cfg(tmp_path), "scenes_tiny_val_sem_seg"), pairs)["sem_seg"]["pACC"] < 95


def test_cityscapes_instances_are_scored_by_its_own_protocol_and_their_boxes_by_cocos(catalog, monkeypatch, tmp_path):
    class MaskEvaluator(DatasetEvaluator):
        """In the place of Cityscapes' scripts, which may be absent."""

        def __init__(self, dataset_name: str) -> None:
            assert dataset_name == NAME

        def evaluate(self) -> dict[str, Any]:
            return {"segm": {"AP": 1.5}}

    scenes = DatasetCatalog.get("scenes_tiny_val")
    # Cityscapes identifies images by their file names, and its classes have no other ids.
    dicts = [{**d, "image_id": Path(d["file_name"]).name} for d in scenes]
    DatasetCatalog.register(NAME, lambda: dicts)
    classes = MetadataCatalog.get("scenes_tiny_val").thing_classes
    MetadataCatalog.get(NAME).set(evaluator_type="cityscapes_instance", thing_classes=classes)
    monkeypatch.setattr(build, "CityscapesMaskEvaluator", MaskEvaluator)
    results = run(build_evaluator(make_cfg(tmp_path), NAME), perfect(dicts))
    assert results["segm"] == {"AP": 1.5}
    assert set(results) == {"bbox", "segm"} and results["bbox"]["AP"] == pytest.approx(100)
