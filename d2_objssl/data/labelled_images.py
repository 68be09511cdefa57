"""What fine-tuning asks of labelled images: the part of them to train on, and classes that fit the model."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

logger = logging.getLogger(__name__)


def take_fraction(cfg: CfgNode, dicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the part of `dicts` that DATASETS.TRAIN_FRACTION asks for, in their order.

    The images are the first ones of a permutation that follows from DATASETS.TRAIN_FRACTION_SEED and the number of
    images alone: a smaller fraction is a part of a larger one, and every SEED trains on the same images. Their number is
    rounded, and at least 1. Published lists of 1 % or 10 % of COCO are other images: compare within one way of choosing.

    Raises:
        ValueError: if the fraction is not in (0, 1].
    """
    fraction = cfg.DATASETS.TRAIN_FRACTION
    if not 0 < fraction <= 1:
        raise ValueError(f"DATASETS.TRAIN_FRACTION is {fraction}; it must be more than 0 and at most 1")
    if fraction == 1:
        return dicts
    order = np.random.default_rng(cfg.DATASETS.TRAIN_FRACTION_SEED).permutation(len(dicts))
    kept = sorted(order[: max(round(fraction * len(dicts)), 1)])
    logger.info("DATASETS.TRAIN_FRACTION %g: %d of %d training images", fraction, len(kept), len(dicts))
    return [dicts[i] for i in kept]


def check_classes(cfg: CfgNode) -> None:
    """Check that the data sets of an R-CNN have the same classes, as many as MODEL.ROI_HEADS.NUM_CLASSES says.

    Data sets that do not name their classes are left out, as are other meta-architectures.

    Raises:
        ValueError: naming the data set.
    """
    if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
        return
    first: tuple[str, list[str]] | None = None
    for name in [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]:
        classes = list(MetadataCatalog.get(name).get("thing_classes", ()))
        if not classes:
            continue
        if len(classes) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
            raise ValueError(
                f'"{name}" has {len(classes)} classes ({", ".join(classes[:5])}{", ..." if len(classes) > 5 else ""}), '
                f"but MODEL.ROI_HEADS.NUM_CLASSES is {cfg.MODEL.ROI_HEADS.NUM_CLASSES}"
            )
        first = first or (name, classes)
        if classes != first[1]:
            i = next(i for i, c in enumerate(classes) if c != first[1][i])
            raise ValueError(f'Class {i} of "{name}" is "{classes[i]}", but "{first[1][i]}" in "{first[0]}"')
