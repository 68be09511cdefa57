"""LARS and the teacher's moving average as loops over the tensors, which is how they are usually published."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from d2_objssl.engine.hooks import EMATeacher

_LR, _MOMENTUM, _DECAY, _TRUST, _TEACHER_MOMENTUM = 0.1, 0.9, 1e-5, 0.001, 0.99


class PlainLARS:
    """LARS as a loop over the tensors, as its published implementations are."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        """One step."""
        for p, buffer in zip(self.params, self.buffers, strict=True):
            assert p.grad is not None
            update: Tensor = p.grad
            if p.ndim > 1:
                update = update.add(p, alpha=_DECAY)
                param_norm, update_norm = torch.norm(p), torch.norm(update)
                one = torch.ones_like(param_norm)
                ratio = torch.where(
                    param_norm > 0.0, torch.where(update_norm > 0, _TRUST * param_norm / update_norm, one), one
                )
                update = update.mul(ratio)
            buffer.mul_(_MOMENTUM).add_(update)
            p.add_(buffer, alpha=-_LR)


@torch.no_grad()
def move_plainly(teacher: nn.Module, student: nn.Module) -> None:
    """The moving average as a loop over the tensors, as its published implementations are."""
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.data = t.data * _TEACHER_MOMENTUM + s.data * (1.0 - _TEACHER_MOMENTUM)


def teacher_hook(teacher: nn.Module, student: nn.Module) -> Callable[[], None]:
    """The move of the teacher as the trainer makes it."""
    hook = EMATeacher(teacher, student, _TEACHER_MOMENTUM, "constant")
    hook.trainer = SimpleNamespace(iter=0, max_iter=1)  # type: ignore[assignment]
    return hook.after_step
