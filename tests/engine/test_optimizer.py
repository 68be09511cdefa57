"""LARS against its formula, and the optimisers that a config can name."""

import math

import oracles
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.solver import build_lr_scheduler
from torch import nn

from d2_objssl import add_objssl_config
from d2_objssl.engine import LARS, build_optimizer

SETTINGS = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.02}
SHAPES = {"scalar": (), "bias": (5,), "matrix": (3, 4), "kernel": (2, 3, 2, 2), "zero": (3, 2), "no_gradient": (2, 3)}


def make_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in SHAPES.items()}
    values["zero"].zero_()
    return {k: nn.Parameter(v) for k, v in values.items()}


def make_gradients(steps: int) -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    gradients = {
        k: [torch.randn(s, generator=generator, dtype=torch.float64) for _ in range(steps)] for k, s in SHAPES.items()
    }
    gradients["no_gradient"] = [torch.zeros_like(g) for g in gradients["no_gradient"]]
    return gradients


def step(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], gradients: dict, i: int) -> None:
    for name, parameter in parameters.items():
        parameter.grad = gradients[name][i].clone()
    optimizer.step()


def assert_equals_oracle(
    name: str, values: list[torch.Tensor], gradients: list[torch.Tensor], **settings: float
) -> None:
    """`values`: the parameter at first and after each step."""
    after = oracles.lars(
        values[0].flatten().tolist(),
        [g.flatten().tolist() for g in gradients],
        one_dimensional=values[0].ndim == 1,
        **settings,
    )
    for i, expected in enumerate(after):
        assert values[i + 1].flatten().tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14), (name, i)


class ForeachLARS(LARS):
    """Goes the way of GPUs."""

    def _is_aligned(self, param: torch.Tensor) -> bool:
        return False

    def _fused_step(self, params: list[torch.Tensor], group: dict) -> None:
        assert not params


@pytest.mark.parametrize("kind", [LARS, ForeachLARS])
def test_lars_equals_oracle(kind: type[LARS]) -> None:
    parameters, gradients = make_parameters(), make_gradients(5)
    history = {k: [p.detach().clone()] for k, p in parameters.items()}
    optimizer = kind(parameters.values(), **SETTINGS)
    for i in range(5):
        step(optimizer, parameters, gradients, i)
        for name, parameter in parameters.items():
            history[name].append(parameter.detach().clone())
            assert torch.equal(parameter.grad, gradients[name][i]), "the gradient was changed"
    for name in SHAPES:
        assert_equals_oracle(name, history[name], gradients[name], **SETTINGS)


@pytest.mark.parametrize("rest", [1e-1, 1e-3, 1e-5])
def test_lars_where_gradient_and_decay_nearly_cancel(rest: float) -> None:
    """g = -wd p (1 - rest): the norm of their sum must not be computed as the difference of large numbers."""
    p = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    p.grad = -0.1 * p.detach() * (1 - rest)
    before, update = p.detach().double(), p.grad.double() + 0.1 * p.detach().double()
    LARS([p], lr=1.0, weight_decay=0.1, momentum=0.9).step()
    expected = 0.001 * before.norm() / update.norm() * update
    torch.testing.assert_close(before - p.detach().double(), expected, rtol=3e-3, atol=1e-6)


def test_lars_keeps_channels_last() -> None:
    """The result does not depend on the memory layout of weights and gradients."""
    generator = torch.Generator().manual_seed(2)
    weight, gradient = (torch.randn(4, 3, 3, 3, generator=generator) for _ in range(2))
    results = []
    for weight_format, gradient_format in (
        (torch.contiguous_format, torch.contiguous_format),
        (torch.channels_last, torch.channels_last),
        (torch.channels_last, torch.contiguous_format),
    ):
        parameter = nn.Parameter(weight.clone(memory_format=weight_format))
        parameter.grad = gradient.clone(memory_format=gradient_format)
        optimizer = LARS([parameter], **SETTINGS)
        optimizer.step()
        assert parameter.is_contiguous(memory_format=weight_format)
        results.append(parameter.detach())
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


@pytest.mark.parametrize("kind", [LARS, ForeachLARS])
def test_lars_groups_have_their_own_settings(kind: type[LARS]) -> None:
    parameters, gradients = make_parameters(), make_gradients(3)
    first, second = ("bias", "matrix"), ("kernel", "zero", "no_gradient")
    other = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.0, "trust_coefficient": 0.5}
    groups = [{"params": [parameters[k] for k in first]}, {"params": [parameters[k] for k in second], **other}]
    optimizer = kind(groups, **SETTINGS)
    history = {k: [parameters[k].detach().clone()] for k in (*first, *second)}
    for i in range(3):
        step(optimizer, {k: parameters[k] for k in (*first, *second)}, gradients, i)
        for name in history:
            history[name].append(parameters[name].detach().clone())
    for names, settings in ((first, SETTINGS), (second, other)):
        for name in names:
            assert_equals_oracle(name, history[name], gradients[name], **settings)


def test_lars_parameters_without_gradient_stay() -> None:
    used, unused = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = LARS([used, unused], **SETTINGS)
    used.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2, 2)) and unused not in optimizer.state
    assert not torch.equal(used, torch.ones(2, 2))


def test_lars_state_dict_round_trip() -> None:
    gradients = make_gradients(5)
    straight = make_parameters()
    optimizer = LARS(straight.values(), **SETTINGS)
    for i in range(5):
        step(optimizer, straight, gradients, i)

    resumed = make_parameters()
    optimizer = LARS(resumed.values(), **SETTINGS)
    for i in range(2):
        step(optimizer, resumed, gradients, i)
    state = optimizer.state_dict()
    optimizer = LARS(resumed.values(), lr=99.0)
    optimizer.load_state_dict(state)
    assert {k: optimizer.param_groups[0][k] for k in SETTINGS} == SETTINGS
    for i in range(2, 5):
        step(optimizer, resumed, gradients, i)
    for name in SHAPES:
        assert torch.equal(straight[name], resumed[name]), name


def test_lars_closure() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([parameter], **SETTINGS)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4
    assert (parameter < 1).all()


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "trust_coefficient"])
def test_lars_refuses_negative_settings(name: str) -> None:
    with pytest.raises(ValueError, match=f"LARS: {name} is -1"):
        LARS([nn.Parameter(torch.ones(1))], **{**SETTINGS, name: -1})


# ------------------------------------------------------------------------------------------------ build_optimizer


def make_cfg(optimizer: str) -> CfgNode:
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.SOLVER.OPTIMIZER = optimizer
    cfg.SOLVER.BASE_LR = 0.5
    cfg.SOLVER.WEIGHT_DECAY = 0.03
    cfg.SOLVER.MOMENTUM = 0.8
    cfg.SOLVER.LARS_TRUST_COEFFICIENT = 0.004
    cfg.SOLVER.ADAMW_BETAS = (0.85, 0.95)
    return cfg


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    network[2].requires_grad_(False)  # as the teacher is
    return network


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("SGD", torch.optim.SGD, {"momentum": 0.8}),
        ("LARS", LARS, {"momentum": 0.8, "trust_coefficient": 0.004}),
        ("ADAMW", torch.optim.AdamW, {"betas": (0.85, 0.95)}),
    ],
)
def test_build_optimizer(name: str, kind: type[torch.optim.Optimizer], settings: dict) -> None:
    network = make_network()
    optimizer = build_optimizer(make_cfg(name), network)
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert {k: group[k] for k in settings} == settings
        assert group["lr"] == 0.5
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    # Detectron2's WEIGHT_DECAY_NORM, 0 by default, holds for every optimiser.
    assert decays == {
        id(network[0].weight): 0.03, id(network[0].bias): 0.03, id(network[1].weight): 0.0, id(network[1].bias): 0.0,
    }  # fmt: skip


def test_build_optimizer_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match=r'SOLVER.OPTIMIZER is "RMSPROP"'):
        build_optimizer(make_cfg("RMSPROP"), make_network())


@pytest.mark.parametrize("clip_type", ["value", "norm"])
def test_gradient_clipping_works_with_lars(clip_type: str) -> None:
    cfg = make_cfg("LARS")
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip_type
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.1
    network = make_network().double()
    optimizer = build_optimizer(cfg, network)
    assert isinstance(optimizer, LARS)
    named = {k: p for k, p in network.named_parameters() if p.requires_grad}
    before = {k: p.detach().clone() for k, p in named.items()}
    generator = torch.Generator().manual_seed(3)
    gradients = {k: torch.randn(p.shape, generator=generator, dtype=torch.float64) for k, p in named.items()}
    for name, parameter in named.items():
        parameter.grad = gradients[name].clone()
    optimizer.step()
    for name, parameter in named.items():
        values = gradients[name].flatten().tolist()
        if clip_type == "value":
            clipped = [min(max(x, -0.1), 0.1) for x in values]
        else:
            norm = math.sqrt(sum(x * x for x in values))
            clipped = [x * min(0.1 / (norm + 1e-6), 1.0) for x in values]
        expected = oracles.lars(
            before[name].flatten().tolist(), [clipped], one_dimensional=parameter.ndim == 1,
            lr=0.5, momentum=0.8, weight_decay=0.03, trust_coefficient=0.004,
        )  # fmt: skip
        assert parameter.flatten().tolist() == pytest.approx(expected[0], rel=1e-9), name


def test_schedulers_drive_lars() -> None:
    cfg = make_cfg("LARS")
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR = 100, 10, 0.01
    network = make_network()
    optimizer = build_optimizer(cfg, network)
    scheduler = build_lr_scheduler(cfg, optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(60):
        optimizer.step()
        scheduler.step()
    assert 0 < optimizer.param_groups[0]["lr"] < 0.5
