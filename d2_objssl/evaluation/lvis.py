"""LVIS box and mask AP with faster-coco-eval; its figures equal those of the package `lvis`.

That package, which Detectron2's `LVISEvaluator` calls, does not run on NumPy 1.24 and later. What LVIS has beyond COCO: of an
image only the classes count that it has objects of or that it names as absent; of classes that it names as not labelled
exhaustively, predictions without an object are no mistakes; the best 300 predictions of an image count, over all classes.
"""

from __future__ import annotations

import importlib.util
import math
from collections import defaultdict
from typing import Any

from .coco import FastCOCOEvaluator

# Metric -> its name in faster-coco-eval. r, c, f: rare, common and frequent classes.
_METRICS = {
    "AP": "AP_all",
    "AP50": "AP_50",
    "AP75": "AP_75",
    "APs": "AP_small",
    "APm": "AP_medium",
    "APl": "AP_large",
    "APr": "APr",
    "APc": "APc",
    "APf": "APf",
}


class FastLVISEvaluator(FastCOCOEvaluator):
    """AP of a data set in LVIS' format (version 0.5 or 1), by the metadata `json_file`.

    A metric without objects is NaN, as of `COCOEvaluator`; Detectron2's `LVISEvaluator` says -100.
    """

    lvis_style = True

    def __init__(self, dataset_name: str, *, max_dets_per_image: int = 300, **kwargs: Any) -> None:
        """
        Args:
            dataset_name: name in the catalogs.
            max_dets_per_image: how many predictions of an image count, those of all classes together.
            **kwargs: arguments of `COCOEvaluator`.

        Raises:
            ImportError: without faster-coco-eval.
            ValueError: if the set has no annotations, as LVIS' test sets.
        """
        require_faster_coco_eval(dataset_name)
        super().__init__(dataset_name, **kwargs)
        if not self._do_evaluation:
            raise ValueError(f'"{dataset_name}" cannot be evaluated: {self._metadata.json_file} has no annotations')
        self.max_dets_per_image = max_dets_per_image
        self._max_dets_per_image = [max_dets_per_image]  # of a class

    def _to_dataset_ids(self, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Results with LVIS' category ids, which count from 1; "cofied" sets have a table of their own.

        Raises:
            ValueError: if the model predicts a class that the data set does not have.
        """
        if self._metadata.get("thing_dataset_id_to_contiguous_id") is not None:
            return super()._to_dataset_ids(results)
        known = set(self._coco_api.getCatIds())
        unknown = {r["category_id"] for r in results if r["category_id"] + 1 not in known}
        if unknown:
            raise ValueError(
                f'The model predicts classes {sorted(unknown)}, but "{self._metadata.name}" has {len(known)} '
                "(0 is the first): check MODEL.ROI_HEADS.NUM_CLASSES"
            )
        return [{**r, "category_id": r["category_id"] + 1} for r in results]

    def _evaluate(self, results: list[dict[str, Any]], task: str, img_ids: list[int] | None) -> Any:
        results = best_per_image(results, self.max_dets_per_image)
        # faster-coco-eval would leave the others out, too, but fails at an image that has neither these nor objects.
        labelled = self._labelled_classes()
        counted = [r for r in results if r["category_id"] in labelled[r["image_id"]]]
        return super()._evaluate(counted, task, img_ids)

    def _labelled_classes(self) -> dict[int, set[int]]:
        """Image id -> category ids that it has objects of or names as absent."""
        dataset = self._coco_api.dataset
        labelled = {image["id"]: set(image.get("neg_category_ids", ())) for image in dataset["images"]}
        for annotation in dataset["annotations"]:
            labelled[annotation["image_id"]].add(annotation["category_id"])
        return labelled

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        if coco_eval is None:  # nothing was predicted
            return dict.fromkeys(_METRICS, math.nan)
        stats = {metric: coco_eval.stats_as_dict[name] for metric, name in _METRICS.items()}
        return {metric: 100 * value if value >= 0 else math.nan for metric, value in stats.items()}


def best_per_image(results: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """Keep the `limit` results ("image_id", "score") of each image with the highest scores; ties in their order."""
    by_image = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    return [
        result
        for of_image in by_image.values()
        for result in sorted(of_image, key=lambda r: r["score"], reverse=True)[:limit]
    ]


def require_faster_coco_eval(dataset_name: str) -> None:
    """Raise an ImportError that says what to install, where faster-coco-eval is absent."""
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise ImportError(
            f'evaluating "{dataset_name}" (LVIS) needs faster-coco-eval: pip install -e ".[fast-eval]" in a checkout of '
            "d2_objssl"
        )
