"""FastCOCOEvaluator gives the figures of Detectron2's COCOEvaluator on pycocotools."""

import importlib.util
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from d2_objssl.evaluation import FastCOCOEvaluator

NAME = "test_coco_random"
SIZE = 200
CATEGORY_IDS = (3, 7, 9, 20)  # as in COCO, with gaps
NUM_IMAGES = 14

needs_faster_coco_eval = pytest.mark.skipif(
    importlib.util.find_spec("faster_coco_eval") is None, reason="faster-coco-eval is not installed"
)


def random_box(rng: np.random.Generator) -> np.ndarray:
    """XYXY; sides of 6 to 150 pixels, so that small, medium and large objects occur."""
    side = np.exp(rng.uniform(math.log(6), math.log(150), 2))
    corner = rng.uniform(0, SIZE - side)
    return np.concatenate([corner, corner + side])


def ellipse(box: np.ndarray) -> np.ndarray:
    """Mask of the ellipse that fits a box."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    cx, cy = (box[:2] + box[2:]) / 2
    rx, ry = np.maximum((box[2:] - box[:2]) / 2, 0.8)
    return (((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1).astype(np.uint8)


def rle(mask: np.ndarray) -> dict[str, Any]:
    encoded = mask_util.encode(np.asfortranarray(mask))
    return {**encoded, "counts": encoded["counts"].decode()}


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[list[tuple[int, np.ndarray]]]]:
    """A registered random data set; (class, box) of each image's objects. The last category never occurs."""
    rng = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    objects = []
    for image_id in range(NUM_IMAGES):
        objects.append([])
        for _ in range(int(rng.integers(0, 7)) if image_id else 0):  # the first image is empty
            category, box = int(rng.integers(3)), random_box(rng)
            mask = ellipse(box)
            area = float(mask.sum())
            x0, y0, x1, y1 = box.tolist()
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": CATEGORY_IDS[category]}
            crowd = int(rng.random() < 0.1)
            geometry = {"bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": rle(mask), "area": area, "iscrowd": crowd}
            annotations.append({**annotation, **geometry})
            objects[-1].append((category, box))
    names = [f"class{i}" for i in range(len(CATEGORY_IDS))]
    images = [{"id": i, "height": SIZE, "width": SIZE, "file_name": f"{i}.jpg"} for i in range(NUM_IMAGES)]
    categories = [{"id": i, "name": n} for i, n in zip(CATEGORY_IDS, names, strict=True)]
    file = tmp_path_factory.mktemp("coco") / "instances.json"
    file.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": categories}))
    mapping = {c: i for i, c in enumerate(CATEGORY_IDS)}
    MetadataCatalog.get(NAME).set(
        json_file=str(file), thing_classes=names, thing_dataset_id_to_contiguous_id=mapping, evaluator_type="coco"
    )
    yield objects
    MetadataCatalog.remove(NAME)


def predict(
    objects: list[list[tuple[int, np.ndarray]]], seed: int, *, masks: bool = True, without: int | None = None
) -> list[Instances]:
    """Most objects with some noise, some of the wrong class, some twice, and some that are not there."""
    rng = np.random.default_rng(seed)
    outputs = []
    for image in objects:
        found = [(c, box + rng.normal(0, rng.choice([0.5, 3, 12]), 4)) for c, box in image if rng.random() < 0.85]
        found += [(int(rng.integers(4)), box + rng.normal(0, 2, 4)) for _, box in image if rng.random() < 0.4]
        found += [(int(rng.integers(4)), random_box(rng)) for _ in range(int(rng.integers(0, 5)))]
        found = [(c, np.sort(b.clip(0, SIZE).reshape(2, 2), axis=0).ravel()) for c, b in found if c != without]
        instances = Instances((SIZE, SIZE))
        instances.pred_boxes = Boxes(torch.tensor(np.array([b for _, b in found]).reshape(-1, 4), dtype=torch.float32))
        # Coarse scores: ties must be broken alike.
        instances.scores = torch.from_numpy(rng.integers(1, 21, len(found)) / 20).float()
        instances.pred_classes = torch.tensor([c for c, _ in found], dtype=torch.int64)
        if masks:
            stacked = np.array([ellipse(b) for _, b in found]).reshape(-1, SIZE, SIZE)
            instances.pred_masks = torch.from_numpy(stacked.astype(bool))
        outputs.append(instances)
    return outputs


def evaluate(evaluator: COCOEvaluator, outputs: list[Instances], **kwargs: Any) -> dict[str, dict[str, float]]:
    evaluator.reset()
    for image_id, instances in enumerate(outputs):
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate(**kwargs)


def assert_equal_results(ours: dict[str, dict[str, float]], theirs: dict[str, dict[str, float]]) -> None:
    assert ours.keys() == theirs.keys()
    for task in theirs:
        assert list(ours[task]) == list(theirs[task])
        for metric, value in theirs[task].items():
            assert ours[task][metric] == pytest.approx(value, abs=1e-6, nan_ok=True), (task, metric)


@needs_faster_coco_eval
@pytest.mark.parametrize("seed", range(6))
def test_figures_equal_pycocotools(truth, seed, tmp_path):
    outputs = predict(truth, seed)
    ours = evaluate(FastCOCOEvaluator(NAME, output_dir=str(tmp_path / "ours")), outputs)
    theirs = evaluate(COCOEvaluator(NAME, output_dir=str(tmp_path / "theirs"), use_fast_impl=False), outputs)
    assert set(theirs) == {"bbox", "segm"} and len(theirs["bbox"]) == 6 + len(CATEGORY_IDS)
    assert_equal_results(ours, theirs)
    assert 5 < theirs["bbox"]["AP"] < 95 and 5 < theirs["segm"]["AP"] < 95, "the comparison must mean something"
    assert all(math.isfinite(theirs[t][m]) for t in theirs for m in ("APs", "APm", "APl"))
    files = [json.loads((tmp_path / who / "coco_instances_results.json").read_text()) for who in ("ours", "theirs")]
    assert files[0] == files[1]
    assert {r["category_id"] for r in files[0]} <= set(CATEGORY_IDS)


@needs_faster_coco_eval
def test_boxes_only(truth):
    outputs = predict(truth, 1, masks=False)
    theirs = evaluate(COCOEvaluator(NAME, use_fast_impl=False), outputs)
    assert set(theirs) == {"bbox"}
    assert_equal_results(evaluate(FastCOCOEvaluator(NAME), outputs), theirs)


@needs_faster_coco_eval
def test_tasks_that_are_asked_for(truth):
    outputs = predict(truth, 2)
    theirs = evaluate(COCOEvaluator(NAME, use_fast_impl=False, tasks=("segm",)), outputs)
    assert set(theirs) == {"segm"}
    assert_equal_results(evaluate(FastCOCOEvaluator(NAME, tasks=("segm",)), outputs), theirs)


@needs_faster_coco_eval
@pytest.mark.parametrize("limit", [5, 300])
def test_limit_of_detections_per_image(truth, limit):
    many = [
        Instances.cat(list(parts)) for parts in zip(*(predict(truth, s, masks=False) for s in range(12)), strict=True)
    ]
    theirs = evaluate(COCOEvaluator(NAME, use_fast_impl=False, max_dets_per_image=limit), many)
    default = evaluate(COCOEvaluator(NAME, use_fast_impl=False), many)
    assert (theirs["bbox"]["AP"] == default["bbox"]["AP"]) == (limit > 100), "the comparison must mean something"
    assert_equal_results(evaluate(FastCOCOEvaluator(NAME, max_dets_per_image=limit), many), theirs)


@needs_faster_coco_eval
def test_a_subset_of_the_images(truth):
    outputs = predict(truth, 3)
    ids = [1, 4, 5, 9]
    theirs = evaluate(COCOEvaluator(NAME, use_fast_impl=False), outputs, img_ids=ids)
    assert theirs["bbox"]["AP"] != evaluate(COCOEvaluator(NAME, use_fast_impl=False), outputs)["bbox"]["AP"]
    assert_equal_results(evaluate(FastCOCOEvaluator(NAME), outputs, img_ids=ids), theirs)


@needs_faster_coco_eval
def test_one_category_is_never_predicted(truth):
    outputs = predict(truth, 4, without=1)
    ours = evaluate(FastCOCOEvaluator(NAME), outputs)
    assert_equal_results(ours, evaluate(COCOEvaluator(NAME, use_fast_impl=False), outputs))
    assert ours["bbox"]["AP-class1"] == 0
    assert math.isnan(ours["bbox"]["AP-class3"]), "no image has one, so there is nothing to find"


@needs_faster_coco_eval
def test_the_evaluator_can_be_used_again(truth):
    """As in training, where it runs every EVAL_PERIOD."""
    evaluator = FastCOCOEvaluator(NAME)
    first = evaluate(evaluator, predict(truth, 0))
    evaluate(evaluator, predict(truth, 1))
    assert_equal_results(evaluate(evaluator, predict(truth, 0)), first)


def test_nothing_is_predicted_in_any_image(truth, caplog):
    outputs = predict(truth, 0)
    empty = [instances[torch.zeros(len(instances), dtype=torch.bool)] for instances in outputs]
    ours = evaluate(FastCOCOEvaluator(NAME), empty)
    assert_equal_results(ours, evaluate(COCOEvaluator(NAME, use_fast_impl=False), empty))
    assert all(math.isnan(v) for v in ours["bbox"].values())


def test_no_image_was_processed(truth):
    assert evaluate(FastCOCOEvaluator(NAME), []) == {}


@pytest.fixture
def without_faster_coco_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "faster" in name else find_spec(name))


def test_falls_back_to_pycocotools_where_the_package_is_absent(truth, monkeypatch, without_faster_coco_eval, caplog):
    def fail(self: object, *args: object) -> None:
        raise AssertionError("faster-coco-eval must not be used")

    monkeypatch.setattr(FastCOCOEvaluator, "_evaluate", fail)
    outputs = predict(truth, 5)
    with caplog.at_level(logging.INFO):
        ours = evaluate(FastCOCOEvaluator(NAME), outputs)
    assert_equal_results(ours, evaluate(COCOEvaluator(NAME, use_fast_impl=False), outputs))
    assert "faster-coco-eval)" not in caplog.text


@needs_faster_coco_eval
def test_the_fast_package_is_used_where_it_is_installed(truth, caplog):
    with caplog.at_level(logging.INFO):
        evaluate(FastCOCOEvaluator(NAME), predict(truth, 5))
    assert "bbox (faster-coco-eval)" in caplog.text and "segm (faster-coco-eval)" in caplog.text
    assert "Annotations are not available" not in caplog.text


@needs_faster_coco_eval
def test_a_class_that_the_data_set_does_not_have_is_named(truth):
    outputs = predict(truth, 0)
    outputs[3].pred_classes[0] = 17
    with pytest.raises(ValueError, match=r"classes \[17\].*NUM_CLASSES"):
        evaluate(FastCOCOEvaluator(NAME), outputs)


@needs_faster_coco_eval
def test_keypoints_are_left_to_detectron2(truth, monkeypatch):
    """They are recognised in the predictions, too, not only where `tasks` names them."""
    tasks = []
    monkeypatch.setattr(COCOEvaluator, "_eval_predictions", lambda self, p, img_ids=None: tasks.append("parent"))
    outputs = predict(truth, 0, masks=False)
    for instances in outputs:
        instances.pred_keypoints = torch.zeros(len(instances), 17, 3)
    evaluate(FastCOCOEvaluator(NAME), outputs)
    assert tasks == ["parent"]


@needs_faster_coco_eval
def test_a_test_set_without_annotations_only_writes_the_results(truth, tmp_path):
    content = json.loads(Path(MetadataCatalog.get(NAME).json_file).read_text())
    del content["annotations"]
    (tmp_path / "test.json").write_text(json.dumps(content))
    MetadataCatalog.get("test_coco_unlabelled").set(json_file=str(tmp_path / "test.json"))
    try:
        assert evaluate(FastCOCOEvaluator("test_coco_unlabelled", output_dir=str(tmp_path)), predict(truth, 0)) == {}
        assert json.loads((tmp_path / "coco_instances_results.json").read_text())
    finally:
        MetadataCatalog.remove("test_coco_unlabelled")
