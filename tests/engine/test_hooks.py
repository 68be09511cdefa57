"""The teacher's moving average."""

import copy
import math
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from d2_objssl.engine import EMATeacher, ema_momentum
from d2_objssl.engine.hooks import Checkpoints

STEPS = 6


def test_cosine_momentum() -> None:
    assert ema_momentum(0, 100, 0.99) == pytest.approx(0.99, abs=1e-15)
    assert ema_momentum(50, 100, 0.99) == pytest.approx(0.995, abs=1e-15)
    assert ema_momentum(100, 100, 0.99) == 1
    values = [ema_momentum(k, 100, 0.996, "cosine") for k in range(101)]
    assert values == sorted(values)
    assert values[25] == pytest.approx(1 - 0.004 * (math.sqrt(0.5) + 1) / 2, abs=1e-15)


def test_constant_momentum() -> None:
    assert {ema_momentum(k, 10, 0.996, "constant") for k in range(11)} == {0.996}


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r'MODEL.SSL.TEACHER.MOMENTUM_SCHEDULE is "linear"'):
        ema_momentum(0, 10, 0.99, "linear")
    with pytest.raises(ValueError, match=r"MODEL.SSL.TEACHER.MOMENTUM_SCHEDULE"):
        EMATeacher(nn.Linear(1, 1), nn.Linear(1, 1), 0.99, "linear")


def make_networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return student, copy.deepcopy(student).requires_grad_(False)


def make_hook(teacher: nn.Module, student: nn.Module, momentum: float = 0.9, schedule: str = "cosine") -> EMATeacher:
    hook = EMATeacher(teacher, student, momentum, schedule)
    hook.trainer = SimpleNamespace(iter=0, max_iter=STEPS, storage=EventStorage())
    return hook


def train_step(
    student: nn.Module, teacher: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer
) -> torch.Tensor:
    """One step towards the teacher's output; returns that output."""
    with torch.no_grad():
        target = teacher(x)
    loss = ((student(x) - target - 1) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return target


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_equals_update_before_the_teachers_forward(schedule: str) -> None:
    """The papers move the teacher before its forward pass; the hook moves it after the step before."""
    xs = torch.randn(STEPS, 16, 4, generator=torch.Generator().manual_seed(1))

    student, teacher = make_networks()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    expected = []
    for k in range(STEPS):
        m = ema_momentum(k, STEPS, 0.9, schedule)
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
            t.copy_(m * t + (1 - m) * s.detach())
        expected.append(train_step(student, teacher, xs[k], optimizer))
    expected_weights = [p.detach().clone() for p in student.parameters()]

    student, teacher = make_networks()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    hook = make_hook(teacher, student, schedule=schedule)
    for k in range(STEPS):
        hook.trainer.iter = k
        target = train_step(student, teacher, xs[k], optimizer)
        torch.testing.assert_close(target, expected[k], rtol=0, atol=1e-6)
        hook.after_step()
    for own, other in zip(student.parameters(), expected_weights, strict=True):
        torch.testing.assert_close(own.detach(), other, rtol=0, atol=1e-6)
    assert (expected[0] - expected[-1]).abs().max() > 1e-2, "the networks did not move: the test tests nothing"


def test_parameters_move_and_buffers_stay() -> None:
    student, teacher = make_networks()
    student(torch.randn(16, 4))
    for p in student.parameters():
        p.data.add_(1)
    buffers = {k: v.clone() for k, v in teacher.named_buffers()}
    before = {k: v.clone() for k, v in teacher.named_parameters()}
    hook = make_hook(teacher, student, momentum=0.75, schedule="constant")
    hook.after_step()
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.25)
        assert parameter.grad is None and not parameter.requires_grad
    for name, buffer in teacher.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert not torch.equal(student[1].running_mean, teacher[1].running_mean)


def test_momentum_is_logged() -> None:
    hook = make_hook(*make_networks(), momentum=0.75, schedule="constant")
    for hook.trainer.iter in range(40):
        hook.after_step()
    assert hook.trainer.storage.latest()["teacher_momentum"][0] == 0.75


def test_weights_loaded_later_are_followed() -> None:
    """Checkpoints are loaded after the hook is made."""
    student, teacher = make_networks()
    hook = make_hook(teacher, student, momentum=0.0, schedule="constant")
    torch.manual_seed(5)
    student.load_state_dict(
        {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in student.state_dict().items()}
    )
    hook.after_step()
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(t, s)


def test_last_step_leaves_the_teacher_where_it_is() -> None:
    """At step T the momentum is 1."""
    student, teacher = make_networks()
    for p in student.parameters():
        p.data.add_(1)
    before = [p.clone() for p in teacher.parameters()]
    hook = make_hook(teacher, student)
    hook.trainer.iter = STEPS - 1
    hook.after_step()
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before, strict=True))


def test_different_networks_are_refused() -> None:
    with pytest.raises(AssertionError):
        EMATeacher(nn.Linear(2, 3), nn.Linear(3, 2), 0.99, "cosine")


@pytest.mark.parametrize(("period", "also_before", "last"), [(4, {3, 4}, [2, 3, "final"]), (3, (), [2, "final", 5])])
def test_checkpoints_are_also_written_before_certain_iterations(
    tmp_path: Path, period: int, also_before: Collection[int], last: list[int | str]
) -> None:
    """The final one comes first: behind a numbered one of the same iteration, a killed run would never write it."""
    saved = []
    checkpointer = SimpleNamespace(
        save_dir=str(tmp_path),
        save=lambda name, **state: saved.append((name, state["iteration"])),
        save_to_disk=True,
        get_checkpoint_file=lambda: f"{saved[-1][0]}.pth",
        periodic_checkpoints=lambda: {},
        path_manager=None,
    )
    hook = Checkpoints(checkpointer, period, max_to_keep=2, also_before=also_before)
    hook.trainer = SimpleNamespace(iter=0, start_iter=0, max_iter=6)
    hook.before_train()
    for hook.trainer.iter in range(6):
        hook.after_step()
    names = {n: "model_final" if n == "final" else f"model_{n:07d}" for n in last}
    assert saved == [(names[n], 5 if n == "final" else n) for n in last]
    assert hook.recent_checkpoints == [f"{names[n]}.pth" for n in last if n != "final"]
