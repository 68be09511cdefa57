"""FastLVISEvaluator: answers known by construction, and the figures of the package lvis where that is installed."""

import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, LVISEvaluator
from detectron2.structures import Boxes, Instances

from d2_objssl.evaluation import FastLVISEvaluator

NAME = "test_lvis"
SIZE = 200
FREQUENCIES = "rcff"  # of classes 1 to 4
Found = tuple[int, float, list[float]]  # class (the model's, from 0), score, XYXY box

needs_faster_coco_eval = pytest.mark.skipif(
    importlib.util.find_spec("faster_coco_eval") is None, reason="faster-coco-eval is not installed"
)


def square(x: float, y: float, side: float = 40) -> list[float]:
    return [x, y, x + side, y + side]


def annotate(number: int, image_id: int, category: int, box: list[float]) -> dict[str, Any]:
    x0, y0, x1, y1 = box
    geometry = {"bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]]}
    return {"id": number, "image_id": image_id, "category_id": category, "area": (x1 - x0) * (y1 - y0), **geometry}


@pytest.fixture
def register(tmp_path: Path) -> Iterator[Callable[..., None]]:
    def write(images: list[dict[str, Any]], objects: list[tuple[int, int, list[float]]] | None) -> None:
        """`objects`: (image id, category id from 1, box); None: the file has no annotations."""
        content: dict[str, Any] = {"images": [{"height": SIZE, "width": SIZE, **image} for image in images]}
        content["categories"] = [{"id": i, "name": str(i), "frequency": f} for i, f in enumerate(FREQUENCIES, 1)]
        if objects is not None:
            content["annotations"] = [annotate(n, *o) for n, o in enumerate(objects, 1)]
        (tmp_path / "lvis.json").write_text(json.dumps(content))
        MetadataCatalog.get(NAME).set(json_file=str(tmp_path / "lvis.json"), evaluator_type="lvis")

    yield write
    MetadataCatalog.pop(NAME, None)


def evaluate(evaluator: DatasetEvaluator, found: dict[int, list[Found]], *, masks: bool = False) -> dict[str, Any]:
    evaluator.reset()
    for image_id, predictions in found.items():
        instances = Instances((SIZE, SIZE))
        boxes = np.array([b for _, _, b in predictions], dtype=np.float32).reshape(-1, 4)
        instances.pred_boxes = Boxes(torch.from_numpy(boxes))
        instances.scores = torch.tensor([s for _, s, _ in predictions])
        instances.pred_classes = torch.tensor([c for c, _, _ in predictions], dtype=torch.int64)
        if masks:
            y, x = np.mgrid[:SIZE, :SIZE] + 0.5
            filled = [(x > x0) & (x < x1) & (y > y0) & (y < y1) for x0, y0, x1, y1 in boxes]
            instances.pred_masks = torch.from_numpy(np.array(filled).reshape(-1, SIZE, SIZE))
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate()


@pytest.fixture
def federated(register: Callable[..., None]) -> dict[int, list[Found]]:
    """Four images, of which each is labelled with some classes only; returns predictions."""
    images = [
        {"id": 1, "neg_category_ids": [2], "not_exhaustive_category_ids": []},
        {"id": 2, "neg_category_ids": [3], "not_exhaustive_category_ids": [2]},
        {"id": 3, "neg_category_ids": [], "not_exhaustive_category_ids": []},
        {"id": 4, "neg_category_ids": [], "not_exhaustive_category_ids": []},
    ]
    register(images, [(1, 1, square(10, 10)), (2, 2, square(10, 10)), (3, 3, square(10, 10)), (3, 3, square(100, 100))])
    return {
        # Right; a mistake, because the image is known to have no class 2; of no account, because class 3 is not labelled.
        1: [(0, 0.9, square(10, 10)), (1, 0.95, square(10, 10)), (2, 1.0, square(10, 10))],
        # Right; of no account, because class 2 is not labelled exhaustively; a mistake, with the lowest score.
        2: [(1, 0.9, square(10, 10)), (1, 0.99, square(100, 100)), (2, 0.1, square(10, 10))],
        # One of two objects; a better score for an unlabelled class.
        3: [(2, 0.8, square(100, 100)), (3, 0.85, square(50, 50))],
        # Of no account, because the image is labelled with no class. (faster-coco-eval 1.8 alone fails at its masks.)
        4: [(0, 1.0, square(10, 10))],
    }


@needs_faster_coco_eval
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_only_labelled_classes_of_an_image_count(federated, task):
    results = evaluate(FastLVISEvaluator(NAME), federated, masks=task == "segm")[task]
    half = 51 / 101  # the share of the 101 recall levels that one of two objects reaches
    expected = {"APr": 100, "APc": 50, "APf": 100 * half, "AP": 100 * (1 + 0.5 + half) / 3}
    assert {key: results[key] for key in expected} == pytest.approx(expected)
    assert results["APm"] == pytest.approx(results["AP"]), "40 x 40 pixels are medium"
    assert math.isnan(results["APs"]) and math.isnan(results["APl"])


@needs_faster_coco_eval
def test_the_limit_of_an_image_is_shared_by_all_classes(federated):
    results = evaluate(FastLVISEvaluator(NAME, max_dets_per_image=1), federated)["bbox"]
    # The best prediction of image 3 is of class 4, and that of image 1 of class 3: nobody finds the objects.
    assert (results["APr"], results["APc"], results["APf"]) == (0, 0, 0)


@needs_faster_coco_eval
def test_nothing_is_predicted(federated):
    results = evaluate(FastLVISEvaluator(NAME), {image_id: [] for image_id in federated})
    assert len(results["bbox"]) == 9 and all(math.isnan(value) for value in results["bbox"].values())


@needs_faster_coco_eval
def test_a_class_that_the_data_set_does_not_have_is_named(federated):
    federated[2].append((4, 0.5, square(0, 0)))
    with pytest.raises(ValueError, match=r"classes \[4\].*has 4 .*NUM_CLASSES"):
        evaluate(FastLVISEvaluator(NAME), federated)


@needs_faster_coco_eval
def test_a_test_set_without_annotations_is_refused(register):
    register([{"id": 1}], None)
    with pytest.raises(ValueError, match=r"lvis\.json has no annotations"):
        FastLVISEvaluator(NAME)


def test_the_extra_is_named_where_the_package_is_absent(federated, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "faster" in name else find_spec(name))
    with pytest.raises(ImportError, match=r"fast-eval"):
        FastLVISEvaluator(NAME)


def random_set(rng: np.random.Generator) -> tuple[list[dict[str, Any]], list[Any], dict[int, list[Found]]]:
    images: list[dict[str, Any]] = []
    objects, found = [], {}
    for image_id in range(1, 13):
        kinds = rng.integers(0, 3, 4)  # of classes 1 to 4: unlabelled, absent, present
        present = [c for c in range(1, 5) if kinds[c - 1] == 2]
        partly = [c for c in present if rng.random() < 0.3]
        negative = [c for c in range(1, 5) if kinds[c - 1] == 1]
        images.append({"id": image_id, "neg_category_ids": negative, "not_exhaustive_category_ids": partly})
        here = []
        for category in [c for c in present for _ in range(int(rng.integers(1, 4)))]:
            side = float(np.exp(rng.uniform(math.log(8), math.log(120))))
            x, y = (np.round(rng.uniform(0, SIZE - side, 2))).tolist()
            here.append((image_id, category, square(x, y, round(side))))
        objects += here
        boxes = [(c, b) for _, c, b in here if rng.random() < 0.8] * 2
        guesses = [(c - 1, np.array(b) + rng.normal(0, rng.choice([0.5, 4]), 4)) for c, b in boxes]
        guesses += [(int(rng.integers(4)), np.array(square(*rng.uniform(0, 150, 2)))) for _ in range(4)]
        found[image_id] = [(c, int(rng.integers(1, 21)) / 20, np.clip(b, 0, SIZE).tolist()) for c, b in guesses]
    return images, objects, found


@needs_faster_coco_eval
@pytest.mark.parametrize("limit", [300, 8])
@pytest.mark.parametrize("seed", range(4))
def test_figures_equal_the_package_lvis(register, monkeypatch, seed, limit):
    pytest.importorskip("lvis")  # pip install --no-deps lvis
    monkeypatch.setattr(np, "float", float, raising=False)  # which that package uses, and NumPy dropped in 1.24
    images, objects, found = random_set(np.random.default_rng(seed))
    register(images, objects)
    theirs = evaluate(LVISEvaluator(NAME, max_dets_per_image=limit), found, masks=True)
    ours = evaluate(FastLVISEvaluator(NAME, max_dets_per_image=limit), found, masks=True)
    assert set(theirs) == set(ours) == {"bbox", "segm"}
    for task, figures in theirs.items():
        expected = {metric: value if value >= 0 else math.nan for metric, value in figures.items()}
        assert ours[task] == pytest.approx(expected, abs=1e-9, nan_ok=True)
        assert 5 < expected["AP"] < 95, "the comparison must mean something"
