"""Average precision on folders in the layout of VOC whose answer follows from counting."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image

from d2_objssl.data.voc_datasets import register_voc_split
from d2_objssl.evaluation.voc import VOCEvaluator

CLASSES = ("red cell", "and/or", "never")
# (xmin, ymin, xmax, ymax), from 1 on: 20 x 20, 40 x 40 and 20 x 20 pixels
LEFT, BIG, RIGHT = (1, 1, 20, 20), (31, 11, 70, 50), (61, 61, 80, 80)


def write_image(root: Path, image_id: str, objects: list[tuple[str, tuple, bool]]) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((80, 100, 3), np.uint8)).save(root / "JPEGImages" / f"{image_id}.jpg")
    text = "".join(
        f"<object><name>{name}</name>{'<difficult>1</difficult>' if difficult else ''}<bndbox>"
        + "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>"
        for name, box, difficult in objects
    )
    (root / "Annotations" / f"{image_id}.xml").write_text(f"<annotation>{text}</annotation>")
    with open(root / "ImageSets/Main/test.txt", "a") as f:
        f.write(f"{image_id}\n")


@pytest.fixture
def cells(tmp_path: Path, catalog: None, request: pytest.FixtureRequest) -> str:
    """The name of a data set; an indirect parameter is its year."""
    write_image(tmp_path, "slide 1", [(CLASSES[0], LEFT, False), (CLASSES[0], BIG, False), (CLASSES[0], RIGHT, True)])
    write_image(tmp_path, "slide 2", [(CLASSES[1], BIG, False)])
    register_voc_split("test_voc", str(tmp_path), "test", CLASSES, year=getattr(request, "param", 2012))
    return "test_voc"


def evaluate(name: str, predictions: dict[str, list[tuple[int, float, tuple]]]) -> dict[str, float]:
    """The results for image id -> [(class, score, box from 1 on)]."""
    evaluator = VOCEvaluator(name)
    evaluator.reset()
    for image_id, of_image in predictions.items():
        instances = Instances((80, 100))
        boxes = torch.tensor([box for _, _, box in of_image], dtype=torch.float32).reshape(-1, 4)
        instances.pred_boxes = Boxes(boxes - torch.tensor([1.0, 1.0, 0.0, 0.0]))
        instances.scores = torch.tensor([score for _, score, _ in of_image])
        instances.pred_classes = torch.tensor([label for label, _, _ in of_image], dtype=torch.int64)
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    results = evaluator.evaluate()
    assert results is not None
    return results["bbox"]


PERFECT = {"slide 1": [(0, 0.9, LEFT), (0, 0.8, BIG)], "slide 2": [(1, 0.9, BIG)]}


def test_perfect_predictions_have_100_and_a_class_without_objects_does_not_count(cells, caplog):
    results = evaluate(cells, PERFECT)
    assert [results[k] for k in ("AP", "AP50", "AP75", "AP-red cell", "AP-and/or")] == pytest.approx([100.0] * 5)
    assert np.isnan(results["AP-never"]) and "never" in caplog.text
    wrong = {**PERFECT, "slide 2": [(1, 0.9, BIG), (2, 0.9, LEFT)]}
    assert evaluate(cells, wrong)["AP"] == pytest.approx(100.0)  # Detectron2's is NaN


def test_what_is_found_of_an_object_marked_difficult_is_neither_right_nor_wrong(cells):
    predictions = {**PERFECT, "slide 1": [(0, 0.95, RIGHT), *PERFECT["slide 1"]]}
    assert evaluate(cells, predictions)["AP"] == pytest.approx(100.0)


@pytest.mark.parametrize(("cells", "expected"), [(2012, 50.0), (2007, 600 / 11)], indirect=["cells"])
def test_one_of_two_objects_is_missed(cells, expected):
    """Recall reaches 0.5 at precision 1: half the area, or the recalls 0, 0.1 ... 0.5 of the 11."""
    results = evaluate(cells, {**PERFECT, "slide 1": [(0, 0.8, BIG)]})
    assert results["AP-red cell"] == pytest.approx(expected)
    assert results["AP50"] == pytest.approx((expected + 100) / 2)


def test_iou_of_the_boxes_decides_at_each_threshold(cells):
    x1, y1, x2, _ = BIG
    below = {**PERFECT, "slide 2": [(1, 0.9, (x1, y1 - 2, x2, y1 + 19))]}  # 20 of 40 rows, 2 outside: 20 / 42
    assert evaluate(cells, below)["AP-and/or"] == 0
    above = {**PERFECT, "slide 2": [(1, 0.9, (x1, y1, x2, y1 + 28))]}  # 29 of 40 rows: 0.725 passes 0.5 to 0.7
    results = evaluate(cells, above)
    assert results["AP-and/or"] == pytest.approx(50.0)
    assert (results["AP50"], results["AP75"]) == pytest.approx((100.0, 50.0))


def test_nothing_is_detected(cells):
    results = evaluate(cells, {"slide 1": [], "slide 2": []})
    assert (results["AP"], results["AP50"]) == (0.0, 0.0)


def test_a_model_with_more_classes_is_refused(cells):
    with pytest.raises(ValueError, match=r"classes \[3\].*NUM_CLASSES"):
        evaluate(cells, {"slide 1": [(3, 0.9, LEFT)]})


@pytest.mark.parametrize("year", [2007, 2012])
def test_figures_are_detectron2s_where_its_evaluator_runs(catalog, test_data, year):
    register_voc_split("test_bccd", str(test_data / "bccd"), "test", ("RBC", "WBC", "Platelets"), year=year)
    evaluators = [VOCEvaluator("test_bccd"), PascalVOCDetectionEvaluator("test_bccd")]
    generator = np.random.default_rng(0)
    for evaluator in evaluators:
        evaluator.reset()
    for d in DatasetCatalog.get("test_bccd"):
        boxes = np.array([a["bbox"] for a in d["annotations"]])
        instances = Instances((d["height"], d["width"]))
        instances.pred_boxes = Boxes(torch.from_numpy(boxes + generator.normal(0, 4, boxes.shape)).float())
        instances.scores = torch.from_numpy(generator.random(len(boxes)))
        instances.pred_classes = torch.tensor([a["category_id"] for a in d["annotations"]])
        for evaluator in evaluators:
            evaluator.process([d], [{"instances": instances}])
    ours, theirs = (evaluator.evaluate()["bbox"] for evaluator in evaluators)
    assert 20 < ours["AP"] < 90
    for name in ("AP", "AP50", "AP75"):
        assert ours[name] == pytest.approx(theirs[name])
