"""A resumed run takes weights, momenta and position from its checkpoint, and every setting from the config it is given."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode

from ..evaluation.results import WITHOUT_EFFECT, flatten_config

logger = logging.getLogger(__name__)

# What momenta and the place in a schedule mean depends on these.
_FIXED = ("SOLVER.OPTIMIZER", "SOLVER.LR_SCHEDULER_NAME")
_POSITION = ("last_epoch", "_step_count", "_last_lr")  # of a scheduler's state; the rest are settings


def check_resumed(cfg: CfgNode, checkpoint: Mapping[str, Any], path: str) -> None:
    """Compare a checkpoint to resume from with the run that would go on from it; warn of every setting that has changed.

    Args:
        cfg: the trainer's, with norms and schedule resolved.
        checkpoint: content of the file `path`.

    Raises:
        ValueError: if it lies behind SOLVER.MAX_ITER, or SOLVER.OPTIMIZER or LR_SCHEDULER_NAME has changed.
    """
    done = checkpoint["trainer"]["iteration"] + 1
    if done > cfg.SOLVER.MAX_ITER:
        raise ValueError(
            f"{path} was written after {done} iterations, but SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER} (from MAX_EPOCHS, if "
            "that is set): there is nothing to go on with. Raise it, or delete the checkpoints behind it"
        )
    text = (checkpoint.get("d2_objssl") or {}).get("config")
    if text is None or text == cfg.dump():
        return
    before, now = flatten_config(CfgNode.load_cfg(text)), flatten_config(cfg)
    # A key that only one of them has came with another version.
    changed = {k: (v, now[k]) for k, v in before.items() if k in now and v != now[k] and k not in WITHOUT_EFFECT}
    for key in _FIXED:
        if key in changed:
            old, new = changed[key]
            raise ValueError(
                f'{key} is "{new}", but the run of {path} has "{old}", whose state does not fit. Resume with "{old}", or give '
                "the file as MODEL.WEIGHTS, without --resume and with another OUTPUT_DIR"
            )
    if changed:
        listed = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in sorted(changed.items()))
        logger.warning(
            "The config is not that of %s: %s. The run goes on with the new one.", os.path.basename(path), listed
        )


def with_settings_of(
    state: Mapping[str, Any], optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler
) -> dict[str, Any]:
    """Replace, in a trainer's state, settings of optimiser and schedule by those of `optimizer` and `scheduler`.

    Momenta and the place in the schedule stay. `scheduler` is at its beginning: `recompute_rates` must follow the loading.

    Raises:
        ValueError: if the parameter groups are other ones.
    """
    saved, own = state["_trainer"]["optimizer"], optimizer.state_dict()["param_groups"]
    before, now = ([len(group["params"]) for group in groups] for groups in (saved["param_groups"], own))
    if before != now:
        raise ValueError(
            f"The checkpoint has momenta for groups of {before} parameters, but the config makes groups of {now}: a setting "
            "of the learning rates or weight decays of some parameters (SOLVER.WEIGHT_DECAY*, BIAS_LR_FACTOR, HEAD_LR_FACTOR) "
            "has changed. Resume with the old one, or start again without --resume"
        )
    state = {**state, "_trainer": {**state["_trainer"], "optimizer": {**saved, "param_groups": own}}}
    schedule = state["hooks"].get("LRScheduler")
    if schedule is not None:
        settings = {key: value for key, value in scheduler.state_dict().items() if key not in _POSITION}
        state["hooks"] = {**state["hooks"], "LRScheduler": {**schedule, **settings}}
    return state


def recompute_rates(scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Give the optimiser the learning rates, and momenta where they are scheduled, of the scheduler's position."""
    scheduler.last_epoch -= 1
    scheduler._step_count -= 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch would have the optimiser make a step first
        scheduler.step()
