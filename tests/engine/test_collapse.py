"""The warning of a collapsed network, and silence about a healthy one."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from tiny_runs import pretrain_cfg
from tiny_slotcon import tiny_cfg

from d2_objssl.engine import Trainer
from d2_objssl.engine.collapse import CollapseMonitor, Limit, build_collapse_monitor

MODEL = SimpleNamespace(prototypes=torch.zeros(8, 2))
HEALTHY = {"feature_std": 0.4, "active_slots": 5.0, "dead_prototypes": 3.0, "positive_pairs": 4.0, "cell_std": 0.8}
HEALTHY |= {"images_without_region": 0.0, "cluster_entropy": 0.9}


def warnings_of(monitor: CollapseMonitor | None, metrics: Any, caplog: Any, iterations: int = 400) -> list[str]:
    """Warnings of a run whose metrics, written every 20 iterations, are `metrics(iteration)`."""
    assert monitor is not None
    caplog.clear()
    caplog.set_level(logging.WARNING, "d2_objssl")
    with EventStorage() as storage:
        monitor.trainer = SimpleNamespace(iter=0, storage=storage)
        for i in range(iterations):
            storage.iter = monitor.trainer.iter = i
            if (i + 1) % 20 == 0:
                storage.put_scalars(**metrics(i))
            monitor.after_step()
    return [r.getMessage() for r in caplog.records]


@pytest.mark.parametrize(
    ("metric", "value", "advice"),
    [
        ("feature_std", 0.01, "SOLVER.WARMUP_ITERS"),
        ("cell_std", 0.01, "SOLVER.WARMUP_ITERS"),
        ("active_slots", 1.0, "MODEL.SSL.SLOTCON.TEACHER_TEMP"),
        ("dead_prototypes", 8.0, "MODEL.SSL.SLOTCON.NUM_PROTOTYPES"),  # of 8
        ("positive_pairs", 0.0, "INPUT.SSL.MIN_OVERLAP"),
        ("images_without_region", 4.0, "INPUT.REGIONS"),  # of 4
        ("cluster_entropy", 0.0, "MODEL.SSL.CYBORGS.VMF_WEIGHT"),
    ],
)
def test_each_metric_beyond_its_limit_is_warned_about_once(caplog: Any, metric: str, value: float, advice: str) -> None:
    monitor = build_collapse_monitor(tiny_cfg("SOLVER.WARMUP_ITERS", 40), MODEL, images_per_process=4)
    (message,) = warnings_of(monitor, lambda i: {**HEALTHY, metric: value}, caplog)
    assert f'"{metric}" is {value:.3g}' in message and advice in message and "since iteration 59" in message


def test_healthy_and_passing_values_are_not_warned_about(caplog: Any) -> None:
    def monitor() -> CollapseMonitor:
        return CollapseMonitor([Limit("feature_std", "MIN_FEATURE_STD", 0.03, "")], period=100, start=40)

    assert not warnings_of(monitor(), lambda i: HEALTHY, caplog)
    # 80 iterations behind the first 40.
    assert not warnings_of(monitor(), lambda i: {"feature_std": 0.0 if i < 140 else 0.4}, caplog)
    assert not warnings_of(monitor(), lambda i: {"feature_std": 0.0 if i % 100 < 80 else 0.4}, caplog)
    assert not warnings_of(monitor(), lambda i: {"other": 0.0}, caplog)


def test_it_can_be_switched_off() -> None:
    assert build_collapse_monitor(tiny_cfg("MODEL.SSL.COLLAPSE.PERIOD", 0), MODEL, 4) is None


class Collapse(HookBase):
    """Makes the projector give one constant, whatever the image and whatever was learnt."""

    def before_step(self) -> None:
        last = list(self.trainer.model.student.embedder.projector.layers)[-1]
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.ones_(last.bias)


@pytest.mark.parametrize("constant", [True, False])
def test_runs_of_a_constant_and_of_a_healthy_network(photos, folder, caplog, monkeypatch, constant) -> None:
    monkeypatch.setattr("d2_objssl.modeling.meta_arch._LOG_PERIOD", 2)  # instead of 20 iterations
    run = ("SOLVER.MAX_ITER", 4, "SOLVER.WARMUP_ITERS", 0, "SOLVER.CHECKPOINT_PERIOD", 99)
    run += ("SOLVER.BASE_LR", 1e-5, "MODEL.SSL.COLLAPSE.PERIOD", 2)
    trainer = Trainer(pretrain_cfg(photos, folder, *run))
    trainer.register_hooks([Collapse()] if constant else [])
    caplog.set_level(logging.WARNING, "d2_objssl")
    trainer.train()
    messages = [r.getMessage() for r in caplog.records if "collapsed" in r.getMessage()]
    assert bool([m for m in messages if '"feature_std" is' in m]) == constant
    assert constant or not messages
