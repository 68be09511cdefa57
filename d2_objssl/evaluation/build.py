"""The evaluator of a data set follows from its `evaluator_type` in the MetadataCatalog."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators, SemSegEvaluator
from detectron2.utils.file_io import PathManager
from PIL import Image

from .cityscapes import CityscapesLabelEvaluator, CityscapesMaskEvaluator
from .classification import ClassificationEvaluator
from .coco import FastCOCOEvaluator
from .depth import DepthEvaluator
from .lvis import FastLVISEvaluator, require_faster_coco_eval
from .voc import VOCEvaluator

_KNOWN_TYPES = (
    "coco", "lvis", "pascal_voc", "cityscapes_instance", "cityscapes_sem_seg", "sem_seg", "classification", "depth",
)  # fmt: skip


def _load_labels(file_name: str, dtype: Any = int) -> np.ndarray:
    """Label map of a PNG; Detectron2's own loader fails on NumPy 2."""
    with PathManager.open(file_name, "rb") as f:
        return np.asarray(Image.open(f), dtype=dtype)


def check_evaluators(cfg: CfgNode) -> None:
    """Check, before a run, that what it ends with can be evaluated: the sets of DATASETS.TEST.

    Raises:
        ValueError: if a data set has no known evaluator.
        ImportError: if a package for it is missing.
    """
    for name in cfg.DATASETS.TEST:
        if _evaluator_type(name) == "lvis":
            require_faster_coco_eval(name)


def _evaluator_type(dataset_name: str) -> str:
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", "none")
    if evaluator_type not in _KNOWN_TYPES:
        raise ValueError(
            f'DATASETS.TEST names "{dataset_name}", whose evaluator_type is "{evaluator_type}": it cannot be evaluated. '
            f"Known: {', '.join(_KNOWN_TYPES)}"
        )
    return evaluator_type


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
    """Build the evaluator of a data set.

    Args:
        cfg: OUTPUT_DIR is read.
        dataset_name: name in the catalogs.
        output_folder: for the results; default OUTPUT_DIR/inference.

    Raises:
        ValueError: if the data set has no known evaluator.
    """
    output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    evaluator_type = _evaluator_type(dataset_name)
    if evaluator_type == "coco":
        return FastCOCOEvaluator(dataset_name, output_dir=output_folder)
    if evaluator_type == "lvis":
        return FastLVISEvaluator(dataset_name, output_dir=output_folder)
    if evaluator_type == "pascal_voc":
        return VOCEvaluator(dataset_name)
    if evaluator_type == "cityscapes_instance":
        # Cityscapes' protocol scores masks alone; papers score its boxes by COCO's. Its image ids are file names, and
        # faster-coco-eval takes numbers only.
        boxes = COCOEvaluator(dataset_name, tasks=("bbox",), output_dir=output_folder, use_fast_impl=False)
        return DatasetEvaluators([CityscapesMaskEvaluator(dataset_name), boxes])
    if evaluator_type == "cityscapes_sem_seg":
        return CityscapesLabelEvaluator(dataset_name)
    if evaluator_type == "sem_seg":
        return SemSegEvaluator(
            dataset_name, distributed=True, output_dir=output_folder, sem_seg_loading_fn=_load_labels
        )
    if evaluator_type == "depth":
        depth, crop = cfg.MODEL.DEPTH, MetadataCatalog.get(dataset_name).get("depth_crop", "none")
        return DepthEvaluator(min_depth=depth.MIN, max_depth=depth.MAX, crop=crop)
    assert evaluator_type == "classification"
    return ClassificationEvaluator()
