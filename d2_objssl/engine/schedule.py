"""From epochs to iterations, from a reference batch to a learning rate, from SyncBN to what the processes allow."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver import build_lr_scheduler as build_detectron2_scheduler
from detectron2.utils import comm
from fvcore.common.param_scheduler import ParamScheduler

logger = logging.getLogger(__name__)


def resolve_schedule(cfg: CfgNode, num_images: int) -> CfgNode:
    """Turn SOLVER.*_EPOCHS and SOLVER.REFERENCE_BATCH into Detectron2's own keys, and log the result.

    An epoch is `num_images / IMS_PER_BATCH` iterations (not rounded: the data order runs on over the end of an epoch).

    Returns:
        A frozen copy of `cfg` with BASE_LR, MAX_ITER, WARMUP_ITERS, STEPS and CHECKPOINT_PERIOD filled in, and the keys
        that they came from set to 0, so that resolving it again changes nothing.

    Raises:
        ValueError: if the run would be shorter than its warm-up, or have no iteration, or SOLVER.ACCUMULATION_STEPS does
            not divide the batch of a process.
    """
    cfg = cfg.clone()
    cfg.defrost()
    solver = cfg.SOLVER
    per_epoch = num_images / solver.IMS_PER_BATCH
    if solver.MAX_EPOCHS > 0:
        solver.MAX_ITER = int(per_epoch * solver.MAX_EPOCHS)
        solver.WARMUP_ITERS = round(per_epoch * solver.WARMUP_EPOCHS)
        solver.STEPS = tuple(int(per_epoch * e) for e in solver.STEPS_EPOCHS)
        if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and not solver.STEPS:
            logger.warning("SOLVER.STEPS_EPOCHS is empty: the learning rate stays constant after the warm-up.")
        if solver.CHECKPOINT_EPOCHS > 0:
            solver.CHECKPOINT_PERIOD = max(round(per_epoch * solver.CHECKPOINT_EPOCHS), 1)
    if solver.REFERENCE_BATCH > 0:
        solver.BASE_LR = solver.BASE_LR * solver.IMS_PER_BATCH / solver.REFERENCE_BATCH
    if solver.MAX_ITER < 1:
        raise ValueError(
            f"SOLVER.MAX_EPOCHS {solver.MAX_EPOCHS} of {num_images} images in batches of {solver.IMS_PER_BATCH} "
            "(SOLVER.IMS_PER_BATCH) are less than one iteration"
        )
    if 0 < solver.MAX_ITER <= solver.WARMUP_ITERS:
        raise ValueError(
            f"The warm-up ({solver.WARMUP_ITERS} iterations; SOLVER.WARMUP_ITERS or WARMUP_EPOCHS) is not shorter than "
            f"the run ({solver.MAX_ITER}; SOLVER.MAX_ITER or MAX_EPOCHS)"
        )
    _check_accumulation(cfg)
    solver.MAX_EPOCHS = solver.WARMUP_EPOCHS = solver.CHECKPOINT_EPOCHS = 0.0
    solver.STEPS_EPOCHS = ()
    solver.REFERENCE_BATCH = 0
    logger.info(
        "Schedule: %d images, batch %d, %.2f iterations an epoch; %d iterations (%.1f epochs), warm-up %d, "
        "peak learning rate %g, %s with %s, a checkpoint every %d iterations",
        num_images,
        solver.IMS_PER_BATCH,
        per_epoch,
        solver.MAX_ITER,
        solver.MAX_ITER / per_epoch,
        solver.WARMUP_ITERS,
        solver.BASE_LR,
        solver.OPTIMIZER,
        solver.LR_SCHEDULER_NAME,
        solver.CHECKPOINT_PERIOD,
    )
    cfg.freeze()
    return cfg


def _check_accumulation(cfg: CfgNode) -> None:
    steps, batch = cfg.SOLVER.ACCUMULATION_STEPS, cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    if steps < 1 or batch % steps:
        raise ValueError(
            f"SOLVER.ACCUMULATION_STEPS is {steps}; it must be a positive divisor of the batch of a process, {batch} "
            "(SOLVER.IMS_PER_BATCH divided by the number of processes)"
        )
    if steps > 1 and cfg.MODEL.META_ARCHITECTURE == "ObjectSSL":
        logger.warning(
            "SOLVER.ACCUMULATION_STEPS is %d: batch norm and contrastive losses see %d images of a process at a time. "
            "Accumulation makes the batch of the optimiser larger, not that of the negatives.",
            steps,
            batch // steps,
        )


class PolyParamScheduler(ParamScheduler):
    """max((1 - t) ** power, ending) when the part t of a run is over."""

    def __init__(self, power: float, ending: float) -> None:
        self.power, self.ending = power, ending

    def __call__(self, where: float) -> float:
        return max((1 - where) ** self.power, self.ending)


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Build the scheduler of SOLVER.LR_SCHEDULER_NAME: "OneCycleLR", "WarmupPolyLR", or one of Detectron2's.

    With "OneCycleLR" the learning rate rises by a cosine from WARMUP_FACTOR BASE_LR to BASE_LR during the first
    WARMUP_ITERS iterations (Smith and Topin 2018; PyTorch's scheduler), then falls by a cosine to 1 / 10,000 of where it
    began. In the meantime the momentum of SGD and LARS, or Adam's beta1, goes from 0.95 to 0.85 and back, whatever
    SOLVER.MOMENTUM and SOLVER.ADAMW_BETAS say.

    With "WarmupPolyLR" it is BASE_LR max((1 - i / MAX_ITER) ** POLY_LR_POWER, POLY_LR_CONSTANT_ENDING) at iteration i. The
    keys and the formula are those of Detectron2's DeepLab project, but for the warm-up, which is that of Detectron2's other
    schedules: linear up to that curve. MMSegmentation adds its `min_lr` to a curve that ends at 0, where this one stops
    falling at POLY_LR_CONSTANT_ENDING = min_lr / BASE_LR: the rates differ by less than `min_lr`.

    Raises:
        ValueError: for settings of "OneCycleLR" or "WarmupPolyLR" out of range.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupPolyLR":
        return _build_poly_scheduler(cfg, optimizer)
    if solver.LR_SCHEDULER_NAME != "OneCycleLR":
        return build_detectron2_scheduler(cfg, optimizer)
    if solver.WARMUP_ITERS < 2:
        raise ValueError(
            f"SOLVER.WARMUP_ITERS is {solver.WARMUP_ITERS} (from WARMUP_EPOCHS, if that is set); "
            '"OneCycleLR" needs at least 2 iterations to rise'
        )
    if not 0 < solver.WARMUP_FACTOR <= 1:
        raise ValueError(f'SOLVER.WARMUP_FACTOR is {solver.WARMUP_FACTOR}; "OneCycleLR" needs one above 0, up to 1')
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=solver.MAX_ITER,
        pct_start=solver.WARMUP_ITERS / solver.MAX_ITER,
        div_factor=1 / solver.WARMUP_FACTOR,
        final_div_factor=1e4,
    )


def _build_poly_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    solver = cfg.SOLVER
    power, ending = solver.POLY_LR_POWER, solver.POLY_LR_CONSTANT_ENDING
    if power <= 0 or not 0 <= ending <= 1:
        raise ValueError(
            f"SOLVER.POLY_LR_POWER is {power} and POLY_LR_CONSTANT_ENDING {ending}; the one must be positive, the other, "
            "a share of BASE_LR, from 0 to 1"
        )
    multiplier = WarmupParamScheduler(
        PolyParamScheduler(power, ending),
        solver.WARMUP_FACTOR,
        solver.WARMUP_ITERS / solver.MAX_ITER,
        solver.WARMUP_METHOD,
        solver.RESCALE_INTERVAL,
    )
    return LRMultiplier(optimizer, multiplier=multiplier, max_iter=solver.MAX_ITER)


def resolve_norms(cfg: CfgNode) -> CfgNode:
    """Replace SyncBN where it cannot run: by BN in a single process, by naiveSyncBN in several on CPUs.

    Returns:
        A frozen copy of `cfg`, or `cfg` itself where nothing had to change.
    """
    world_size = comm.get_world_size()
    if world_size > 1 and cfg.MODEL.DEVICE.startswith("cuda"):
        return cfg
    norm, reason = ("BN", "there is one process") if world_size == 1 else ("naiveSyncBN", "SyncBN needs GPUs")
    cfg = cfg.clone()
    cfg.defrost()
    changed = []
    for path, node in _walk(cfg.MODEL, "MODEL"):
        if node.get("NORM") == "SyncBN":
            node.NORM = norm
            changed.append(f"{path}.NORM")
    cfg.freeze()
    if changed:
        logger.warning("SyncBN is replaced by %s in %s: %s", norm, ", ".join(changed), reason)
    return cfg


def uses_norm(cfg: CfgNode, norm: str) -> bool:
    """Tell whether any NORM below cfg.MODEL has this name."""
    return any(node.get("NORM") == norm for _, node in _walk(cfg.MODEL, "MODEL"))


def _walk(node: CfgNode, path: str) -> Iterator[tuple[str, CfgNode]]:
    yield path, node
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _walk(value, f"{path}.{key}")
