"""Trainer, hooks, optimisers and schedules."""

from .hooks import EMATeacher, RandomState, ema_momentum
from .launch import default_setup, launch, setup_cfg
from .optimizer import LARS, build_optimizer
from .schedule import resolve_norms, resolve_schedule
from .trainer import Trainer

__all__ = [
    "LARS",
    "EMATeacher",
    "RandomState",
    "Trainer",
    "build_optimizer",
    "default_setup",
    "ema_momentum",
    "launch",
    "resolve_norms",
    "resolve_schedule",
    "setup_cfg",
]
