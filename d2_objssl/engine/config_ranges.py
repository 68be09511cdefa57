"""Which values of a config are possible at all: numbers and their ranges."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode

_POSITIVE = [
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.BASE_LR",
    "SOLVER.LARS_TRUST_COEFFICIENT",
    "MODEL.SSL.SLOTCON.STUDENT_TEMP",
    "MODEL.SSL.SLOTCON.TEACHER_TEMP",
    "MODEL.SSL.SLOTCON.SLOT_TEMP",
    "MODEL.SSL.DETCON.TEMP",
    "MODEL.SSL.SEMCL.TEMP",
    "MODEL.SSL.SLOTCON.NUM_PROTOTYPES",
    "MODEL.SSL.DETCON.NUM_REGIONS",
    "INPUT.SSL.CROP_SIZE",
    "INPUT.CLASSIFICATION.CROP_SIZE",
    "INPUT.SEM_SEG.CROP_SIZE",
    "INPUT.LSJ.IMAGE_SIZE",
]
_NOT_NEGATIVE = [
    "SOLVER.WEIGHT_DECAY",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.WARMUP_EPOCHS",
    "SOLVER.MAX_EPOCHS",
    "SOLVER.CHECKPOINT_EPOCHS",
    "SOLVER.MAX_TO_KEEP",
    "DATALOADER.NUM_WORKERS",
]
# From 0 to 1: probabilities, momenta, parts of a whole; where the value is a sequence, all of it.
_SHARES = [
    "INPUT.SSL.FLIP_PROB",
    "INPUT.SSL.COLOR_JITTER_PROB",
    "INPUT.SSL.GRAYSCALE_PROB",
    "INPUT.SSL.BLUR_PROB",
    "INPUT.SSL.SOLARIZE_PROB",
    "INPUT.SSL.MIN_OVERLAP",
    "INPUT.SSL.CROP_SCALE",
    "INPUT.CLASSIFICATION.CROP_SCALE",
    "INPUT.CLASSIFICATION.FLIP_PROB",
    "INPUT.PAIRS.MIN_AREA",
    "MODEL.SSL.TEACHER.MOMENTUM",
    "MODEL.SSL.SLOTCON.CENTER_MOMENTUM",
    "MODEL.SWIN.DROP_PATH_RATE",
    "MODEL.SSL.SLOTCON.GROUP_LOSS_WEIGHT",
    "SOLVER.MOMENTUM",
    "DATALOADER.MAX_BAD_IMAGES",
]
# Ranges (low, high) of numbers that are not negative; of those that are positive.
_LOW_HIGH = ["INPUT.SSL.CROP_SCALE", "INPUT.SSL.BLUR_SIGMA", "INPUT.CLASSIFICATION.CROP_SCALE"]
_POSITIVE_LOW_HIGH = ["INPUT.SSL.CROP_RATIO", "INPUT.CLASSIFICATION.CROP_RATIO", "INPUT.SEM_SEG.SCALE_RANGE"]


def value_of(cfg: CfgNode, key: str) -> Any:
    """Value of a full key, such as "SOLVER.MAX_ITER"."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def check_ranges(cfg: CfgNode) -> Iterator[str]:
    """A sentence for each value out of its range."""
    for keys, low, high, allowed in (
        (_POSITIVE, math.ulp(0.0), math.inf, "more than 0"),
        (_NOT_NEGATIVE, 0.0, math.inf, "at least 0"),
        (_SHARES, 0.0, 1.0, "from 0 to 1"),
    ):
        for key in keys:
            value = value_of(cfg, key)
            if not all(low <= v <= high for v in (value if isinstance(value, (list, tuple)) else [value])):
                yield f"{key} is {value}; it must be {allowed}"
    for keys, low, allowed in (
        (_LOW_HIGH, 0.0, "none of them negative"),
        (_POSITIVE_LOW_HIGH, math.ulp(0.0), "both more than 0"),
    ):
        for key in keys:
            value = value_of(cfg, key)
            if len(value) != 2 or not low <= value[0] <= value[1]:
                yield f"{key} is {value}; it must be two numbers, the smaller one first, {allowed}"
