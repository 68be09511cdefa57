"""All mistakes of a config in one message, before data are read: what surely ruins a run is an error, the rest a warning.

What needs the data, the model or the file system's free space is checked by those who have them, before the first step.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.utils import comm

from ..data.finetune_augmentation import AUGMENTATION_REGISTRY
from ..data.region_maps import build_region_source
from ..modeling.methods import SSL_METHOD_REGISTRY
from .config_merging import raise_mistakes, suggest
from .config_paths import check_data_sets, check_output_dir, check_weights
from .config_ranges import check_ranges, value_of

logger = logging.getLogger(__name__)

# Of Detectron2's get_norm, and of `schedule.build_lr_scheduler`.
_NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
_WITH_NORM = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "RETINANET", "SEM_SEG_HEAD", "DEPTH")
_SCHEDULES = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR", "WarmupPolyLR", "OneCycleLR")
_CHOICES = {
    **{f"MODEL.{node}.NORM": _NORMS for node in _WITH_NORM},
    "SOLVER.LR_SCHEDULER_NAME": _SCHEDULES,
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler", "RepeatFactorTrainingSampler"),
    "SOLVER.OPTIMIZER": ("SGD", "LARS", "ADAMW"),
    "SOLVER.AMP.DTYPE": ("bfloat16", "float16"),
    "MODEL.SSL.TEACHER.MOMENTUM_SCHEDULE": ("cosine", "constant"),
    "INPUT.PAIRS.SOURCE": ("none", "sem_seg", "instances", "both"),
}
_STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


def check_config(cfg: CfgNode) -> None:
    """Refuse a config for training that contains mistakes, and warn about what is only odd.

    Raises:
        ValueError: one, with all mistakes.
    """
    raise_mistakes(find_mistakes(cfg))
    for warning in _find_oddities(cfg):
        logger.warning(warning)


def find_mistakes(cfg: CfgNode, *, resume: bool | None = None) -> list[str]:
    """List what would ruin a training run, one sentence each with key, value and what is allowed.

    Args:
        resume: whether the run goes on from the checkpoints in OUTPUT_DIR, where there are any, instead of MODEL.WEIGHTS.
            None: not known.
    """
    checks: list[Callable[[CfgNode], Iterable[str]]] = [_check_names, check_ranges, check_data_sets, check_output_dir]
    checks += [partial(check_weights, resume=resume), _check_batch, _check_schedule]
    checks.append(_check_pretraining if cfg.MODEL.META_ARCHITECTURE == "ObjectSSL" else _check_fine_tuning)
    return [mistake for check in checks for mistake in check(cfg)]


def run_checks(*checks: Callable[[], Any]) -> None:
    """Call all of the checks, each of which raises ValueError for what it finds, and raise one for all of them."""
    raise_mistakes(mistake for check in checks for mistake in _mistakes_of(check))


def _mistakes_of(check: Callable[[], Any]) -> list[str]:
    try:
        check()
    except ValueError as error:
        return [str(error)]
    return []


def _check_names(cfg: CfgNode) -> Iterator[str]:
    known: dict[str, Iterable[str]] = {
        "MODEL.META_ARCHITECTURE": [name for name, _ in META_ARCH_REGISTRY],
        "MODEL.BACKBONE.NAME": [name for name, _ in BACKBONE_REGISTRY],
        "MODEL.SSL.METHOD": [name for name, _ in SSL_METHOD_REGISTRY],
        "INPUT.AUGMENTATION": ["detectron2", *(name for name, _ in AUGMENTATION_REGISTRY)],
        **_CHOICES,
    }
    for key, names in known.items():
        value = value_of(cfg, key)
        if value not in names:
            known_names = ", ".join(name or '""' for name in sorted(names))
            yield f'{key} is "{value}"; known: {known_names}{suggest(value, names)}'


def _check_batch(cfg: CfgNode) -> Iterator[str]:
    batch, steps, processes = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS, comm.get_world_size()
    if batch % processes:
        yield f"SOLVER.IMS_PER_BATCH is {batch}; it must be a multiple of the number of processes, {processes}"
    elif steps < 1 or batch // processes % steps:
        yield (
            f"SOLVER.ACCUMULATION_STEPS is {steps}; it must be a positive divisor of the batch of a process, "
            f"{batch // processes} (SOLVER.IMS_PER_BATCH divided by the number of processes)"
        )


def _check_schedule(cfg: CfgNode) -> Iterator[str]:
    solver = cfg.SOLVER
    unit = "EPOCHS" if solver.MAX_EPOCHS > 0 else "ITER"
    length, warmup = (f"{name}_{unit}" for name in ("MAX", "WARMUP"))
    warmup += "S" if unit == "ITER" else ""
    if unit == "ITER" and solver.MAX_ITER < 1:
        yield f"SOLVER.MAX_ITER is {solver.MAX_ITER}; it must be at least 1 where SOLVER.MAX_EPOCHS is 0"
    elif solver[length] <= solver[warmup]:
        yield f"SOLVER.{warmup} is {solver[warmup]}; it must be less than SOLVER.{length}, {solver[length]}"


def _check_fine_tuning(cfg: CfgNode) -> Iterator[str]:
    if cfg.INPUT.SSL.NUM_VIEWS > 0:
        yield (
            f"INPUT.SSL.NUM_VIEWS is {cfg.INPUT.SSL.NUM_VIEWS}; it must be 0 for MODEL.META_ARCHITECTURE "
            f'"{cfg.MODEL.META_ARCHITECTURE}", which does not work on views'
        )
    if not 0 < cfg.DATASETS.TRAIN_FRACTION <= 1:
        yield f"DATASETS.TRAIN_FRACTION is {cfg.DATASETS.TRAIN_FRACTION}; it must be more than 0 and at most 1"
    if cfg.INPUT.LSJ.MIN_SCALE > cfg.INPUT.LSJ.MAX_SCALE:
        yield f"INPUT.LSJ.MIN_SCALE is {cfg.INPUT.LSJ.MIN_SCALE}; it must not be above MAX_SCALE, {cfg.INPUT.LSJ.MAX_SCALE}"


def _check_pretraining(cfg: CfgNode) -> Iterator[str]:
    """The backbone contract, and that method, views and regions go together."""
    if cfg.INPUT.FORMAT != "RGB":
        yield f'INPUT.FORMAT is "{cfg.INPUT.FORMAT}"; pretraining, its colour augmentation and its weights are in "RGB"'
    if cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        yield (
            f"MODEL.BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT}; it must be 0 in pretraining: frozen layers learn "
            "nothing"
        )
    if cfg.MODEL.RESNETS.NORM == "FrozenBN" and not cfg.MODEL.WEIGHTS:
        yield 'MODEL.RESNETS.NORM is "FrozenBN", without MODEL.WEIGHTS; batch norm must learn: "SyncBN"'
    if max(cfg.MODEL.PIXEL_STD) <= 1:
        yield f"MODEL.PIXEL_STD is {cfg.MODEL.PIXEL_STD}; pixels are from 0 to 255, so it is about [58.395, 57.12, 57.375]"
    if cfg.INPUT.SSL.NUM_VIEWS < 1:
        yield f"INPUT.SSL.NUM_VIEWS is {cfg.INPUT.SSL.NUM_VIEWS}; pretraining works on augmented views, most methods on 2"
    yield from _check_features(cfg)
    if cfg.MODEL.SSL.METHOD in SSL_METHOD_REGISTRY:
        yield from _check_method(cfg)
    if cfg.INPUT.REGIONS.SOURCE != "file":
        yield from _mistakes_of(lambda: build_region_source(cfg))
    elif not os.path.isdir(cfg.INPUT.REGIONS.ROOT):
        yield (
            f'INPUT.REGIONS.ROOT is "{cfg.INPUT.REGIONS.ROOT}"; there is no such folder: tools/generate_masks.py makes it '
            '(INPUT.REGIONS.SOURCE is "file")'
        )


def _check_features(cfg: CfgNode) -> Iterator[str]:
    ssl, name = cfg.MODEL.SSL, cfg.MODEL.BACKBONE.NAME
    node = {
        "build_resnet_backbone": "RESNETS",
        "build_objssl_resnet_backbone": "RESNETS",
        "build_swin_backbone": "SWIN",
    }
    if not ssl.IN_FEATURES:
        yield "MODEL.SSL.IN_FEATURES is empty; name features of the backbone, for example res5"
    if name in node:
        known = list(cfg.MODEL[node[name]].OUT_FEATURES)
        if missing := [f for f in ssl.IN_FEATURES if f not in known]:
            yield f"MODEL.SSL.IN_FEATURES names {missing}; MODEL.{node[name]}.OUT_FEATURES has {known}"
    if ssl.GRID_FEATURE and ssl.GRID_FEATURE not in ssl.IN_FEATURES:
        yield f'MODEL.SSL.GRID_FEATURE is "{ssl.GRID_FEATURE}"; it must be one of IN_FEATURES, {ssl.IN_FEATURES}, or ""'


def _check_method(cfg: CfgNode) -> list[str]:
    """What the builder of the method refuses; on the meta device it allocates nothing and draws no random numbers."""
    ssl, num_views = cfg.MODEL.SSL, cfg.INPUT.SSL.NUM_VIEWS
    if not ssl.IN_FEATURES:
        return []
    shapes = {feature: ShapeSpec(channels=1, stride=32) for feature in (*ssl.IN_FEATURES, ssl.GRID_FEATURE)}
    try:
        with torch.device("meta"):
            method = SSL_METHOD_REGISTRY.get(ssl.METHOD)(cfg, shapes)
    except ValueError as error:
        return [str(error)]
    if num_views not in (0, method.num_views):
        return [f"INPUT.SSL.NUM_VIEWS is {num_views}, but {ssl.METHOD} works on {method.num_views} views"]
    return []


def _find_oddities(cfg: CfgNode) -> Iterator[str]:
    """What a run can do without, or may be meant."""
    if cfg.TEST.EVAL_PERIOD > 0 and not cfg.DATASETS.TEST:
        yield f"TEST.EVAL_PERIOD is {cfg.TEST.EVAL_PERIOD}, but DATASETS.TEST is empty: nothing is evaluated."
    if cfg.MODEL.META_ARCHITECTURE != "ObjectSSL":
        if not cfg.MODEL.WEIGHTS:
            yield "MODEL.WEIGHTS IS EMPTY: fine-tuning starts from RANDOM weights, not from a pretrained backbone."
        return
    resnets, ssl = cfg.MODEL.RESNETS, cfg.MODEL.SSL
    detcon, cyborgs = ssl.DETCON, ssl.CYBORGS
    if resnets.STRIDE_IN_1X1 and resnets.DEPTH >= 50 and "resnet" in cfg.MODEL.BACKBONE.NAME:
        yield (
            "MODEL.RESNETS.STRIDE_IN_1X1 is True: the configs for fine-tuning have False, as do torchvision's weights, and "
            "will refuse this backbone."
        )
    if detcon.NUM_REGIONS > detcon.MAX_REGION_IDS:
        yield (
            f"MODEL.SSL.DETCON.NUM_REGIONS is {detcon.NUM_REGIONS}, more than the MAX_REGION_IDS {detcon.MAX_REGION_IDS} "
            "regions that an image can have: some of them are drawn more than once."
        )
    cells = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size() * math.ceil(cfg.INPUT.SSL.CROP_SIZE / 32) ** 2
    if cfg.MODEL.SSL.METHOD == "CYBORGS" and cyborgs.MAX_CLUSTERS > cells:
        yield (
            f"MODEL.SSL.CYBORGS.MAX_CLUSTERS is {cyborgs.MAX_CLUSTERS}, but the views of a process have only {cells} cells "
            "of 32 pixels: there will be fewer clusters."
        )
    # With more clusters than samples in a batch DINO learns well, and small batches are for trying things out: no mistake.
    stride = _STRIDES.get(ssl.GRID_FEATURE or ssl.IN_FEATURES[-1], 32)
    cells = cfg.SOLVER.IMS_PER_BATCH * cfg.INPUT.SSL.NUM_VIEWS * math.ceil(cfg.INPUT.SSL.CROP_SIZE / stride) ** 2
    if ssl.METHOD == "SlotCon" and ssl.SLOTCON.NUM_PROTOTYPES > cells:
        yield (
            f"MODEL.SSL.SLOTCON.NUM_PROTOTYPES is {ssl.SLOTCON.NUM_PROTOTYPES}, but the views of a batch have only {cells} "
            f"cells of {stride} pixels: many prototypes will get none."
        )
