"""The evaluator of a data set follows from its `evaluator_type` in the MetadataCatalog."""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators

from ..data.image_reading import missing_files
from ..data.loading import load_test_dicts
from .cityscapes import CityscapesLabelEvaluator, CityscapesMaskEvaluator, require_cityscapesscripts
from .classification import ClassificationEvaluator
from .coco import FastCOCOEvaluator
from .depth import DepthEvaluator
from .lvis import FastLVISEvaluator, require_faster_coco_eval
from .sem_seg import CheckedSemSegEvaluator
from .voc import VOCEvaluator

_KNOWN_TYPES = (
    "coco", "lvis", "pascal_voc", "cityscapes_instance", "cityscapes_sem_seg", "sem_seg", "classification", "depth",
)  # fmt: skip
# Evaluator type -> keys of the dataset dicts whose files the evaluator reads, image by image.
_TRUTH_FILES = {"sem_seg": ("sem_seg_file_name",), "depth": ("depth_file_name", "camera_file_name")}
_NUM_EXAMPLES = 3  # files that a message names


def check_evaluators(cfg: CfgNode) -> None:
    """Check, before a run, that what it ends with can be evaluated: the sets of DATASETS.TEST. Nothing is read.

    Raises:
        ValueError: if a data set has no known evaluator.
        ImportError: if a package for it is missing.
    """
    for name in cfg.DATASETS.TEST:
        evaluator_type = _evaluator_type(name)
        if evaluator_type == "lvis":
            require_faster_coco_eval(name)
        elif evaluator_type.startswith("cityscapes_"):
            require_cityscapesscripts(name)


def check_test_sets(cfg: CfgNode) -> None:
    """Load every set of DATASETS.TEST once, before a run: its faults would show in the test that the run ends with.

    Label and depth maps are looked for, but not read.

    Raises:
        ValueError, OSError: see `data.loading.load_test_dicts`, and what the loader of the data set raises for its labels.
        FileNotFoundError: if label maps or depth maps are missing.
    """
    for name in cfg.DATASETS.TEST:
        dicts = load_test_dicts(cfg, name)
        keys = _TRUTH_FILES.get(MetadataCatalog.get(name).get("evaluator_type"), ())
        if missing := missing_files(d[key] for d in dicts for key in keys if d.get(key)):
            raise FileNotFoundError(
                f'{len(missing)} file(s) with which DATASETS.TEST "{name}" is evaluated do not exist, for example '
                f"{', '.join(missing[:_NUM_EXAMPLES])}"
            )


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
        return CheckedSemSegEvaluator(dataset_name, output_dir=output_folder)
    if evaluator_type == "depth":
        depth, crop = cfg.MODEL.DEPTH, MetadataCatalog.get(dataset_name).get("depth_crop", "none")
        return DepthEvaluator(min_depth=depth.MIN, max_depth=depth.MAX, crop=crop)
    assert evaluator_type == "classification"
    return ClassificationEvaluator()
