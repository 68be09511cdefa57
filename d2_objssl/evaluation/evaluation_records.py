"""The record of an evaluation of tools/train_net.py: the same for every task."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from numbers import Real
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from .results import config_identity, weights_identity, write_record

_MAX_NAME = 150  # characters of a data set's name in that of a file

# evaluator_type of a data set -> task; of data sets with boxes it is that, or instance segmentation with MODEL.MASK_ON.
_TASKS = {
    "coco": "detection",
    "lvis": "detection",
    "pascal_voc": "detection",
    "cityscapes_instance": "detection",
    "sem_seg": "semantic segmentation",
    "cityscapes_sem_seg": "semantic segmentation",
}


def write_evaluation_records(
    cfg: CfgNode,
    results: Mapping[str, Any],
    *,
    checkpoint: str,
    config_file: str,
    precision: str,
    wall_time_s: float,
    of_training: bool,
) -> list[str]:
    """Write a record into OUTPUT_DIR/records for every data set of DATASETS.TEST; for the main process.

    That of a training's own evaluation is DATASET.json. Any other evaluation has the beginnings of the hashes of its
    weights and its config in the name as well: several checkpoints and settings stand beside each other.

    Args:
        cfg: as `setup_cfg` returned it.
        results: what `Trainer.test` returned.
        checkpoint: file of the model that was evaluated.
        config_file, precision, wall_time_s: see `results`.
        of_training: whether this is the evaluation at the end of a training, else one of --eval-only.

    Returns:
        Paths of the records.
    """
    names = cfg.DATASETS.TEST
    by_dataset = {names[0]: results} if len(names) == 1 else results
    paths = []
    for name in names:
        if not by_dataset.get(name):
            continue
        record = evaluation_record(cfg, name, by_dataset[name], checkpoint)
        record |= {"config": config_identity(cfg, config_file), "precision": precision, "wall_time_s": wall_time_s}
        hashes = (record["checkpoint"]["sha256"], record["config"]["sha256"])
        suffix = "" if of_training else "".join(f"-{sha256[:8]}" for sha256 in hashes)
        stem = name.replace(os.sep, "_")[-_MAX_NAME:]  # "voc:PATH:SPLIT" is a name, too
        paths.append(os.path.join(cfg.OUTPUT_DIR, "records", f"{stem}{suffix}.json"))
        write_record(paths[-1], record)
    return paths


def evaluation_record(cfg: CfgNode, dataset: str, results: Mapping[str, Any], checkpoint: str) -> dict[str, Any]:
    """What a record says of one data set; see `results`, without config, precision and time.

    Args:
        cfg: as `setup_cfg` returned it.
        dataset: name in the catalogs.
        results: of its evaluator: task -> metric -> number.
        checkpoint: file of the model that was evaluated.
    """
    evaluated = weights_identity(checkpoint)
    assert evaluated is not None, "a model without a file was evaluated"
    # A file of another trainer does not tell what its training started from: then it is itself what is known.
    training = evaluated.get("training")
    return {
        "task": task_of(cfg, dataset),
        "dataset": dataset,
        "metrics": {name: _finite(v) for name, v in flatten_results_dict(results).items() if isinstance(v, Real)},
        "weights": training.pop("weights") if training else evaluated,
        "checkpoint": evaluated,
        "seed": cfg.SEED if cfg.SEED >= 0 else None,
        "num_images": len(DatasetCatalog.get(dataset)),
        "num_processes": comm.get_world_size(),
    }


def task_of(cfg: CfgNode, dataset: str) -> str:
    """The task that an evaluation on a data set is of: "detection", "instance segmentation", ...; else the evaluator_type."""
    evaluator_type = MetadataCatalog.get(dataset).get("evaluator_type", "none")
    task = _TASKS.get(evaluator_type, evaluator_type)
    return "instance segmentation" if task == "detection" and cfg.MODEL.MASK_ON else task


def _finite(value: Real) -> float | None:
    """A plain number; None for NaN, which stands for "nothing to measure"."""
    return float(value) if math.isfinite(value) else None
