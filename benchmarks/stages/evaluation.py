"""AP of boxes and masks by COCO's protocol, against pycocotools, on made-up ground truth and detections."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import statistics
import time
from functools import partial
from typing import Any

import numpy as np
from pycocotools import mask as mask_api
from pycocotools.coco import COCO as PlainCOCO
from pycocotools.cocoeval import COCOeval

from .timing import Measurement, Row, repeat_in_turns

SUMMARY = "AP of boxes and masks by COCO's protocol"
_HEIGHT, _WIDTH, _NUM_CLASSES, _OBJECTS, _DETECTIONS = 120, 160, 80, 8, 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this stage."""
    parser.add_argument("--num-images", type=int, default=500, help="(default: %(default)s; --quick: 100)")


def run(args: argparse.Namespace) -> Measurement:
    """Time evaluating and accumulating, and check that all twelve numbers are equal."""
    try:
        from faster_coco_eval import COCO as FastCOCO
        from faster_coco_eval import COCOeval_faster
    except ImportError as error:
        raise ImportError("faster-coco-eval is not installed: pip install 'd2_objssl[fast-eval]'") from error
    ground_truth, detections = make_detections(100 if args.quick else args.num_images, args.seed)
    rows, details = [], {}
    for task, goal in (("bbox", 5.0), ("segm", 3.0)):
        contestants = {
            "plain": partial(evaluate, PlainCOCO, COCOeval, ground_truth, detections, task),
            "ours": partial(evaluate, FastCOCO, COCOeval_faster, ground_truth, detections, task),
        }
        runs = repeat_in_turns(contestants, min(args.repeats, 3), args.seed)
        stats = {name: results[0][1] for name, results in runs.items()}
        if not np.allclose(stats["plain"], stats["ours"], atol=1e-9):
            raise ValueError(f"{task}: {stats} differ")
        seconds = {name: statistics.median(t for t, _ in results) for name, results in runs.items()}
        rows.append(Row(f"COCO AP, {task}", seconds["plain"], seconds["ours"], unit="s CPU", goal=goal))
        details[task] = {"seconds": seconds, "AP": float(stats["ours"][0])}
    return Measurement(rows, details)


def make_detections(num_images: int, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth and detections in COCO's format: ellipses, a part of which is found with some error."""
    rng = np.random.default_rng(seed)
    annotations, detections = [], []
    for image_id in range(1, num_images + 1):
        shapes = [_ellipse(rng) for _ in range(_OBJECTS)]
        classes = rng.integers(1, _NUM_CLASSES + 1, _OBJECTS).tolist()
        for category_id, shape in zip(classes, shapes, strict=True):
            encoded = _encode(shape)
            box = mask_api.toBbox(encoded).tolist()
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id, "iscrowd": 0}
                | {"segmentation": encoded, "bbox": box, "area": float(mask_api.area(encoded))}
            )
        for i in range(_DETECTIONS):
            found = i < _OBJECTS and rng.uniform() < 0.8
            shape = shapes[i] + rng.normal(0, 2, 4) if found else _ellipse(rng)
            category_id = classes[i] if found else int(rng.integers(1, _NUM_CLASSES + 1))
            encoded = _encode(shape)
            detections.append(
                {"image_id": image_id, "category_id": category_id, "score": float(rng.uniform())}
                | {"segmentation": encoded, "bbox": mask_api.toBbox(encoded).tolist()}
            )
    images = [{"id": i, "height": _HEIGHT, "width": _WIDTH} for i in range(1, num_images + 1)]
    categories = [{"id": i, "name": str(i)} for i in range(1, _NUM_CLASSES + 1)]
    return {"info": {}, "images": images, "categories": categories, "annotations": annotations}, detections


def _ellipse(rng: np.random.Generator) -> np.ndarray:
    """Centre and half axes, pixels."""
    return np.concatenate([rng.uniform(0, (_WIDTH, _HEIGHT)), rng.uniform(4, 40, 2)])


def _encode(ellipse: np.ndarray) -> dict[str, Any]:
    x, y = np.arange(_WIDTH)[None], np.arange(_HEIGHT)[:, None]
    center_x, center_y, half_x, half_y = ellipse
    inside = ((x - center_x) / max(half_x, 2)) ** 2 + ((y - center_y) / max(half_y, 2)) ** 2 <= 1
    encoded = mask_api.encode(np.asfortranarray(inside.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def evaluate(coco_class: Any, eval_class: Any, ground_truth: Any, detections: Any, task: str) -> tuple[float, list]:
    """CPU time, s, and the twelve numbers."""
    results = copy.deepcopy(detections)
    if task == "segm":
        for result in results:
            del result["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        api = coco_class()
        api.dataset = copy.deepcopy(ground_truth)
        api.createIndex()
        predicted = api.loadRes(results)
        start = time.process_time()
        evaluation = eval_class(api, predicted, task)
        evaluation.evaluate()
        evaluation.accumulate()
        seconds = time.process_time() - start
        evaluation.summarize()
    return seconds, list(evaluation.stats[:12])
