"""COCO box and mask AP with faster-coco-eval where it is installed; its figures equal pycocotools'."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import itertools
import json
import logging
import os
from typing import Any

from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager

logger = logging.getLogger(__name__)


class FastCOCOEvaluator(COCOEvaluator):
    """Detectron2's `COCOEvaluator` on the C++ evaluation of faster-coco-eval; falls back to pycocotools."""

    lvis_style = False  # whether images name the classes that they are labelled with, as LVIS' do

    def __init__(self, dataset_name: str, **kwargs: Any) -> None:
        """
        Args:
            dataset_name: name in the catalogs.
            **kwargs: arguments of `COCOEvaluator`.
        """
        super().__init__(dataset_name, use_fast_impl=False, **kwargs)

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: list[int] | None = None) -> None:
        results = list(itertools.chain(*[x["instances"] for x in predictions]))
        tasks = self._tasks or self._tasks_from_predictions(results)
        available = importlib.util.find_spec("faster_coco_eval") is not None
        if not available or "keypoints" in tasks or not self._do_evaluation:
            super()._eval_predictions(predictions, img_ids)
            return
        results = self._to_dataset_ids(results)
        if self._output_dir:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            logger.info("Saving results to %s", path)
            with PathManager.open(path, "w") as f:
                json.dump(results, f)
        for task in sorted(tasks):
            evaluation = self._evaluate(results, task, img_ids) if results else None
            self._results[task] = self._derive_coco_results(
                evaluation, task, class_names=self._metadata.get("thing_classes")
            )

    def _to_dataset_ids(self, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Results with the data set's category ids instead of the model's contiguous ones.

        Raises:
            ValueError: if the model predicts a class that the data set does not have.
        """
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if mapping is None:
            return results
        to_dataset = {contiguous: dataset for dataset, contiguous in mapping.items()}
        unknown = {r["category_id"] for r in results} - set(to_dataset)
        if unknown:
            raise ValueError(
                f'The model predicts classes {sorted(unknown)}, but "{self._metadata.name}" has {len(to_dataset)} '
                "(0 is the first): check MODEL.ROI_HEADS.NUM_CLASSES"
            )
        return [{**r, "category_id": to_dataset[r["category_id"]]} for r in results]

    def _evaluate(self, results: list[dict[str, Any]], task: str, img_ids: list[int] | None) -> Any:
        """Run one task ("bbox" or "segm") on results in COCO's format."""
        from faster_coco_eval import COCO, COCOeval_faster

        with contextlib.redirect_stdout(io.StringIO()):
            ground_truth = COCO(copy.deepcopy(self._coco_api.dataset))
        if task == "segm":
            # With a box in the result, the area that sorts it into small, medium and large would be the box's.
            results = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
        predictions = ground_truth.loadRes(copy.deepcopy(results))
        evaluation = COCOeval_faster(ground_truth, predictions, task, lvis_style=self.lvis_style)
        evaluation.params.maxDets = self._max_dets_per_image
        if img_ids is not None:
            evaluation.params.imgIds = img_ids
        evaluation.evaluate()
        evaluation.accumulate()
        summary = io.StringIO()
        with contextlib.redirect_stdout(summary):
            evaluation.summarize()
        logger.info("%s (faster-coco-eval)\n%s", task, summary.getvalue())
        return evaluation
