"""The guard of a training step: neither a loss nor a gradient that is not finite reaches the weights."""

import copy
import logging
import math
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from detectron2.engine import hooks
from detectron2.utils import comm
from multiprocess import run_in_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from d2_objssl.engine import EMATeacher
from d2_objssl.engine.train_step import TrainStep, gradient_norm

PARAMETERS = ("layer.weight", "layer.bias")


class Regression(nn.Module):
    """Pulls the outputs of a linear layer towards 1; `spoil` changes the gradient of an iteration."""

    def __init__(self, spoil: Callable[[int], float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 2)
        self.calls = -1
        for p in self.layer.parameters():
            p.register_hook(lambda gradient: gradient * spoil(self.calls))

    def forward(self, data: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"loss": (self.layer(data).float() - 1).square().mean()}


def make_step(folder: Path, spoil: Callable[[int], float], dtype: torch.dtype | None = None) -> TrainStep:
    model = Regression(spoil).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = [torch.ones(3, 4)] * 100
    return TrainStep(model, data, optimizer, device_type="cpu", dtype=dtype, output_dir=str(folder))


class Recorder(hooks.HookBase):
    """Keeps the weights behind every iteration, and the learning rate in it."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.rates: list[float] = []

    def after_step(self) -> None:
        self.weights.append(self.trainer.model.layer.weight.detach().clone())
        self.rates.append(self.trainer.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(tmp_path: Path, factor: float) -> None:
    step = make_step(tmp_path, lambda i: factor if i == 2 else 1.0)
    recorder = Recorder()
    step.register_hooks([recorder])
    with pytest.raises(FloatingPointError, match="The gradient became infinite or NaN at iteration 2") as error:
        step.train(0, 5)
    file = tmp_path / "nonfinite_batch_0000002_rank0.pth"
    assert all(name in str(error.value) for name in (*PARAMETERS, str(file), "SOLVER.BASE_LR"))
    assert torch.equal(torch.load(file, weights_only=True), torch.ones(3, 4))
    assert len(recorder.weights) == 2 and not torch.equal(recorder.weights[0], recorder.weights[1])
    assert torch.equal(step.model.layer.weight, recorder.weights[1])
    assert all(v.isfinite().all() for state in step.optimizer.state.values() for v in state.values())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("basic_ios::clear\nC++ stack")])
def test_a_full_disk_does_not_hide_what_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(torch, "save", Mock(side_effect=error))
    message = r"(?s)^The gradient became infinite or NaN at iteration 0: .*could not be saved.*(No space|ios::clear)\b.*none was"
    with pytest.raises(FloatingPointError, match=message) as caught:
        make_step(tmp_path, lambda i: math.nan).train(0, 1)
    assert "C++ stack" not in str(caught.value)


def stop_of_a_process(dtype: torch.dtype | None) -> str:
    """Train in several processes, of which the last one gets a batch that is not finite; returns the error's message."""
    data = [torch.ones(3, 4)] * 3
    if comm.get_rank() == comm.get_world_size() - 1:
        data[1] = torch.full((3, 4), math.nan)
    model = DistributedDataParallel(Regression(lambda i: 1.0).train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tempfile.TemporaryDirectory() as folder:
        step = TrainStep(model, data, optimizer, device_type="cpu", dtype=dtype, output_dir=folder)
        step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype is not None)
        with pytest.raises(FloatingPointError) as error:
            step.train(0, 3)
    assert all(p.isfinite().all() for p in model.parameters())
    return str(error.value)


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["float32", "float16"])
def test_a_loss_of_one_process_that_is_not_finite_stops_all_of_them(dtype: torch.dtype | None) -> None:
    """None waits for the one that has stopped; in float16 the gradient alone could have overflowed."""
    healthy, bad = run_in_processes(stop_of_a_process, dtype)
    assert bad.startswith("The loss became infinite or NaN at iteration 1")
    assert healthy.startswith("The loss of another process became infinite or NaN at iteration 1")


def test_gradient_norm() -> None:
    model = nn.Linear(2, 1)
    assert gradient_norm(model) == 0
    model.weight.grad = torch.tensor([[3.0, 0.0]])
    assert gradient_norm(model) == 3  # of those that have one
    model.bias.grad = torch.tensor([4.0])
    assert gradient_norm(model) == 5


def test_float16_overflow_skips_optimizer_and_teacher_but_counts_the_iteration(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "d2_objssl")
    step = make_step(tmp_path, lambda i: math.inf if i in (1, 2) else 1.0, torch.float16)
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # not one that overflows by itself at first
    teacher = copy.deepcopy(step.model.layer).requires_grad_(False)
    recorder, followed = Recorder(), []

    class Follower(hooks.HookBase):
        def after_step(self) -> None:
            followed.append(teacher.weight.clone())

    schedule = torch.optim.lr_scheduler.LambdaLR(step.optimizer, lambda i: 1 / (i + 1))
    ema = EMATeacher(teacher, step.model.layer, 0.5, "constant")
    step.register_hooks([ema, hooks.LRScheduler(step.optimizer, schedule), recorder, Follower()])
    step.train(0, 5)
    moved = [not torch.equal(a, b) for a, b in pairwise(recorder.weights)]
    assert moved == [False, False, True, True]
    assert [not torch.equal(a, b) for a, b in pairwise(followed)] == moved
    assert recorder.rates == pytest.approx([0.1 / i for i in (2, 3, 4, 5, 6)])  # a function of the iteration alone
    assert step.grad_scaler.get_scale() == 2.0**8
    assert "Iteration 1: float16 gradients overflow" in caplog.text and not step.step_skipped


def test_a_collapsed_scale_stops_the_run(tmp_path: Path) -> None:
    """Without an end, every step would be skipped, and the run would go on to its last iteration unchanged."""
    step = make_step(tmp_path, lambda i: math.nan, torch.float16)
    before = step.model.layer.weight.detach().clone()
    with pytest.raises(FloatingPointError, match=r"gradient, even if scaled by 6\.1\S+e-05, became .* at iteration 29"):
        step.train(0, 100)
    assert torch.equal(step.model.layer.weight, before)
