"""Epochs to iterations, linear scaling, the learning rate that Detectron2 makes of the result, norm layers."""

import logging
import math

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.solver import LRMultiplier, build_lr_scheduler
from detectron2.utils import comm

from d2_objssl.config import add_objssl_config
from d2_objssl.engine import LARS, resolve_norms, resolve_schedule
from d2_objssl.engine.schedule import build_lr_scheduler as build_any_lr_scheduler


def make_cfg(*opts: object) -> CfgNode:
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.merge_from_list(list(opts))
    return cfg


SLOTCON = (
    *("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR", 1.0, "SOLVER.BASE_LR_END", 1e-6),
    *("SOLVER.WARMUP_FACTOR", 0.01, "SOLVER.RESCALE_INTERVAL", True, "SOLVER.REFERENCE_BATCH", 256),
)


def learning_rates(cfg: CfgNode) -> list[float]:
    """The learning rate of every iteration."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def slotcon_learning_rate(i: int, peak: float, warmup: int, total: int) -> float:
    """SlotCon's schedule: linear from peak / 100, then a cosine to 1e-6, both per iteration."""
    if i <= warmup:
        return peak * (0.01 + 0.99 * i / warmup)
    return 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * (i - warmup) / (total - warmup))) / 2


@pytest.mark.parametrize(
    ("num_images", "batch", "epochs", "warmup_epochs"),
    [(64, 16, 50.0, 5.0), (1000, 512, 100.0, 5.0), (130, 32, 20.0, 3.0), (640, 64, 10.0, 1.0)],
)
def test_slotcon_learning_rate(num_images, batch, epochs, warmup_epochs):
    opts = ("SOLVER.IMS_PER_BATCH", batch, "SOLVER.MAX_EPOCHS", epochs, "SOLVER.WARMUP_EPOCHS", warmup_epochs)
    cfg = resolve_schedule(make_cfg(*SLOTCON, *opts), num_images)
    total, warmup, peak = int(num_images / batch * epochs), round(num_images / batch * warmup_epochs), batch / 256
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.BASE_LR) == (total, warmup, peak)
    expected = [slotcon_learning_rate(i, peak, warmup, total) for i in range(total)]
    assert learning_rates(cfg) == pytest.approx(expected, rel=1e-9)
    assert expected[0] == pytest.approx(peak / 100)
    assert max(expected) == expected[warmup] == pytest.approx(peak)


def test_step_schedule_in_epochs():
    opts = ("SOLVER.IMS_PER_BATCH", 10, "SOLVER.BASE_LR", 0.1, "SOLVER.MAX_EPOCHS", 10.0)
    steps = ("SOLVER.STEPS_EPOCHS", (6.0, 9.0), "SOLVER.CHECKPOINT_EPOCHS", 2.5, "SOLVER.WARMUP_EPOCHS", 0.5)
    cfg = resolve_schedule(make_cfg(*opts, *steps), num_images=40)  # 4 iterations an epoch
    assert cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR"
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.CHECKPOINT_PERIOD) == (40, (24, 36), 10)
    assert cfg.SOLVER.WARMUP_ITERS == 2
    rates = learning_rates(cfg)
    assert rates[2:24] == pytest.approx([0.1] * 22)
    assert rates[24:36] == pytest.approx([0.01] * 12)
    assert rates[36:] == pytest.approx([0.001] * 4)
    assert rates[0] == pytest.approx(0.1 * cfg.SOLVER.WARMUP_FACTOR)


def test_iterations_stand_where_no_epochs_are_given():
    before = make_cfg("SOLVER.BASE_LR", 0.3, "SOLVER.IMS_PER_BATCH", 32)
    after = resolve_schedule(before, num_images=7)
    assert after == before
    assert after.is_frozen() and not before.is_frozen()


@pytest.mark.parametrize(("batch", "expected"), [(256, 1.0), (512, 2.0), (1024, 4.0), (64, 0.25)])
def test_linear_scaling(batch, expected):
    cfg = make_cfg("SOLVER.BASE_LR", 1.0, "SOLVER.REFERENCE_BATCH", 256, "SOLVER.IMS_PER_BATCH", batch)
    assert resolve_schedule(cfg, 5000).SOLVER.BASE_LR == expected


def test_resolving_twice_changes_nothing():
    """A resumed run, or a config.yaml that is used again, must not be scaled again."""
    opts = ("SOLVER.IMS_PER_BATCH", 512, "SOLVER.MAX_EPOCHS", 8.0, "SOLVER.WARMUP_EPOCHS", 1.0)
    more = ("SOLVER.STEPS_EPOCHS", (6.0,), "SOLVER.CHECKPOINT_EPOCHS", 1.0)
    cfg = make_cfg(*SLOTCON, *opts, *more)
    original = cfg.clone()
    once = resolve_schedule(cfg, 5120)
    assert cfg == original, "the argument must stay as it is"
    assert once.SOLVER.BASE_LR == 2.0
    keys = ("MAX_EPOCHS", "WARMUP_EPOCHS", "STEPS_EPOCHS", "CHECKPOINT_EPOCHS", "REFERENCE_BATCH")
    assert not any(once.SOLVER[key] for key in keys)
    assert resolve_schedule(once, 5120) == once
    assert resolve_schedule(once, 99) == once


def test_a_checkpoint_period_is_at_least_one_iteration():
    cfg = make_cfg("SOLVER.MAX_EPOCHS", 10.0, "SOLVER.CHECKPOINT_EPOCHS", 0.1, "SOLVER.IMS_PER_BATCH", 16)
    assert resolve_schedule(cfg, 16).SOLVER.CHECKPOINT_PERIOD == 1


def test_a_run_shorter_than_one_iteration_is_refused():
    cfg = make_cfg("SOLVER.MAX_EPOCHS", 1.0, "SOLVER.IMS_PER_BATCH", 512)
    with pytest.raises(ValueError, match=r"MAX_EPOCHS 1\.0 of 100 images .*512.*IMS_PER_BATCH"):
        resolve_schedule(cfg, 100)


@pytest.mark.parametrize("warmup_epochs", [4.0, 5.0])
def test_a_warm_up_as_long_as_the_run_is_refused(warmup_epochs):
    cfg = make_cfg("SOLVER.MAX_EPOCHS", 4.0, "SOLVER.WARMUP_EPOCHS", warmup_epochs, "SOLVER.IMS_PER_BATCH", 16)
    with pytest.raises(ValueError, match=r"WARMUP_ITERS or WARMUP_EPOCHS.*MAX_ITER or MAX_EPOCHS"):
        resolve_schedule(cfg, 160)


def test_the_result_is_logged(caplog):
    cfg = make_cfg(*SLOTCON, "SOLVER.MAX_EPOCHS", 4.0, "SOLVER.IMS_PER_BATCH", 512)
    with caplog.at_level(logging.INFO, "d2_objssl"):
        resolve_schedule(cfg, 5120)
    assert "5120 images, batch 512, 10.00 iterations an epoch; 40 iterations (4.0 epochs)" in caplog.text


# --------------------------------------------------------------------------------------------------------- norms


def norms(cfg: CfgNode) -> dict[str, str]:
    model = cfg.MODEL
    nodes = {"RESNETS": model.RESNETS, "FPN": model.FPN, "BOX": model.ROI_BOX_HEAD, "PROJECTOR": model.SSL.PROJECTOR}
    return {name: node.NORM for name, node in nodes.items()}


SYNC = ("MODEL.RESNETS.NORM", "SyncBN", "MODEL.FPN.NORM", "SyncBN", "MODEL.ROI_BOX_HEAD.NORM", "GN")


@pytest.mark.parametrize(
    ("processes", "device", "expected"),
    [(1, "cpu", "BN"), (1, "cuda", "BN"), (2, "cpu", "naiveSyncBN"), (2, "cuda", "SyncBN")],
)
def test_sync_bn_becomes_what_the_processes_allow(monkeypatch, caplog, processes, device, expected):
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    cfg = make_cfg(*SYNC, "MODEL.DEVICE", device)
    with caplog.at_level(logging.WARNING, "d2_objssl"):
        resolved = resolve_norms(cfg)
    assert norms(resolved) == {"RESNETS": expected, "FPN": expected, "BOX": "GN", "PROJECTOR": expected}
    assert norms(cfg)["RESNETS"] == "SyncBN", "the argument must stay as it is"
    assert ("MODEL.RESNETS.NORM" in caplog.text) == (expected != "SyncBN")


def test_other_norms_are_left_alone(caplog):
    names = ("RESNETS", "FPN", "SSL.PROJECTOR", "SSL.PREDICTOR")
    cfg = make_cfg(*(x for n in names for x in (f"MODEL.{n}.NORM", "GN")))
    with caplog.at_level(logging.WARNING, "d2_objssl"):
        assert resolve_norms(cfg) == cfg
    assert "SyncBN" not in caplog.text


# ------------------------------------------------------------------------------------------------- OneCycle


def one_cycle(total: int, warmup: int, peak: float, optimizer: type[torch.optim.Optimizer]) -> list[dict[str, float]]:
    """Learning rate and momentum of every iteration."""
    opts = ("SOLVER.LR_SCHEDULER_NAME", "OneCycleLR", "SOLVER.WARMUP_FACTOR", 0.04, "SOLVER.BASE_LR", peak)
    cfg = make_cfg(*opts, "SOLVER.MAX_ITER", total, "SOLVER.WARMUP_ITERS", warmup)
    kwargs = {} if optimizer is torch.optim.AdamW else {"momentum": 0.9}
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": peak * f} for f in (1, 2)]
    built = optimizer(groups, lr=peak, **kwargs)
    scheduler = build_any_lr_scheduler(cfg, built)
    values = []
    for _ in range(total):
        first, second = built.param_groups
        assert second["lr"] == pytest.approx(2 * first["lr"]), "a group with a rate of its own keeps the ratio"
        momentum = first["betas"][0] if "betas" in first else first["momentum"]
        values.append({"lr": first["lr"], "momentum": momentum})
        built.step()
        scheduler.step()
    return values


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, LARS])
def test_one_cycle(optimizer):
    total, warmup, peak = 40, 10, 0.3
    values = one_cycle(total, warmup, peak, optimizer)
    for i, value in enumerate(values):
        if i <= warmup - 1:
            share = (1 - math.cos(math.pi * i / (warmup - 1))) / 2
            lr, momentum = peak * (0.04 + 0.96 * share), 0.95 - 0.1 * share
        else:
            share = (1 - math.cos(math.pi * (i - warmup + 1) / (total - warmup))) / 2
            lr, momentum = peak + (peak * 0.04 / 1e4 - peak) * share, 0.85 + 0.1 * share
        assert value == pytest.approx({"lr": lr, "momentum": momentum}, rel=1e-9), i


def test_one_cycle_of_the_released_code(reference_values):
    arrays = np.load(reference_values("semcl_16_schedules"))
    total = int(arrays["total_steps"])
    warmup = round(total * float(arrays["pct_start"]))
    values = one_cycle(total, warmup, float(arrays["max_lr"]), torch.optim.AdamW)
    assert [v["lr"] for v in values] == pytest.approx(arrays["lr"].tolist(), rel=1e-9)
    assert [v["momentum"] for v in values] == pytest.approx(arrays["adam_beta1"].tolist(), rel=1e-9)


def test_one_cycle_settings_out_of_range_are_refused():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    for key, value in (("WARMUP_ITERS", 1), ("WARMUP_FACTOR", 0.0), ("WARMUP_FACTOR", 1.5)):
        cfg = make_cfg("SOLVER.LR_SCHEDULER_NAME", "OneCycleLR", f"SOLVER.{key}", value)
        with pytest.raises(ValueError, match=f"SOLVER.{key} is {value}"):
            build_any_lr_scheduler(cfg, optimizer)


# ----------------------------------------------------------------------------------------------------- polynomial


def poly_schedule(total: int, warmup: int, **keys: float) -> tuple[torch.optim.Optimizer, LRMultiplier]:
    """An optimiser at 0.01 and its "WarmupPolyLR"; `keys` of SOLVER.POLY_LR_*."""
    opts = ("SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.MAX_ITER", total, "SOLVER.WARMUP_ITERS", warmup)
    poly = (x for key, value in keys.items() for x in (f"SOLVER.POLY_LR_{key}", value))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    return optimizer, build_any_lr_scheduler(make_cfg(*opts, "SOLVER.WARMUP_FACTOR", 0.1, *poly), optimizer)


@pytest.mark.parametrize("warmup", [0, 10])
def test_polynomial_decay_with_a_floor(warmup):
    """ADE20K's schedule: power 0.9 from 0.01, and never below 0.0001."""
    total, keys = 400, {"POWER": 0.9, "CONSTANT_ENDING": 0.01}
    optimizer, scheduler = poly_schedule(total, warmup, **keys)
    rates = []
    for i in range(total):
        if i == 100:  # the run was killed, and goes on from a checkpoint
            states = optimizer.state_dict(), scheduler.state_dict()
            optimizer, scheduler = poly_schedule(total, warmup, **keys)
            optimizer.load_state_dict(states[0])
            scheduler.load_state_dict(states[1])
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [max(0.01 * (1 - i / total) ** 0.9, 1e-4) for i in range(total)]
    assert rates[warmup:] == pytest.approx(expected[warmup:], rel=1e-9)
    assert rates[-1] == pytest.approx(1e-4) and rates[-4] > 1e-4
    start = [0.001 + (expected[warmup] - 0.001) * i / warmup for i in range(warmup)]
    assert rates[:warmup] == pytest.approx(start, rel=1e-9)


def test_polynomial_settings_out_of_range_are_refused():
    for key, value in (("POWER", 0.0), ("CONSTANT_ENDING", -0.1), ("CONSTANT_ENDING", 1.5)):
        with pytest.raises(ValueError, match=f"POLY_LR_.*{key} (is )?{value}"):
            poly_schedule(10, 0, **{key: value})
