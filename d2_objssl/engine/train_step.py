"""One step of training: autocast, accumulation, and a guard against losses and gradients that are not finite."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import nn

from ..data.collation import split_batch
from .schedule import uses_norm

logger = logging.getLogger(__name__)


def amp_dtype(cfg: CfgNode) -> torch.dtype | None:
    """Autocast's data type by SOLVER.AMP; None without AMP.

    Raises:
        ValueError: for an unknown SOLVER.AMP.DTYPE.
    """
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    if cfg.SOLVER.AMP.DTYPE not in known:
        raise ValueError(f'SOLVER.AMP.DTYPE is "{cfg.SOLVER.AMP.DTYPE}"; known: {sorted(known)}')
    dtype = known[cfg.SOLVER.AMP.DTYPE]
    if uses_norm(cfg, "naiveSyncBN"):
        logger.warning("AMP is off: naiveSyncBN would compute its variance in half precision.")
        return None
    if dtype is torch.float16 and not cfg.MODEL.DEVICE.startswith("cuda"):
        logger.warning('SOLVER.AMP.DTYPE "float16" is meant for GPUs; on %s bfloat16 is used.', cfg.MODEL.DEVICE)
        return torch.bfloat16
    return dtype


# float16 gradients that overflow at a smaller scale than this do so at every scale: the network computes NaN.
_SMALLEST_SCALE = 2.0**-13


class TrainStep(SimpleTrainer):
    """A training step under autocast, guarded against losses and gradients that are not finite.

    Neither reaches the weights. Losses and the norm of the gradient are read together, between backward pass and optimiser:
    the one place of a step where this class waits for the device. In float16 a gradient that overflows is expected: the
    scaler skips the optimiser's step and halves its scale, and the run stops when that does not help. Then the teacher
    stays, too (`hooks.EMATeacher`), but the iteration is counted: the schedules of learning rate and teacher momentum are
    functions of the iteration, as a resumed run needs them.

    Attributes:
        step_skipped: whether the optimiser left the weights as they were in the last iteration.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        *,
        device_type: str,
        dtype: torch.dtype | None,
        output_dir: str,
        accumulation_steps: int = 1,
    ) -> None:
        """
        Args:
            model, data_loader, optimizer: as in `SimpleTrainer`.
            device_type: "cuda" or "cpu".
            dtype: autocast's data type; None: no autocast. float16 comes with a gradient scaler.
            output_dir: where the batch with a loss that is not finite is saved.
            accumulation_steps: parts of a batch that go through the model one after the other; a step has their mean
                gradient.
        """
        super().__init__(model, data_loader, optimizer)
        self.device_type = device_type
        self.dtype = dtype
        self.output_dir = output_dir
        self.accumulation_steps = accumulation_steps
        self.grad_scaler = torch.amp.GradScaler(device_type, enabled=dtype is torch.float16)
        self.step_skipped = False

    def run_step(self) -> None:
        """Forward and backward for every part of the batch, then one step."""
        assert self.model.training, "the model was left in eval mode"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()
        loss_dict: dict[str, torch.Tensor] = {}
        parts = split_batch(data, self.accumulation_steps)
        for i, part in enumerate(parts, start=1):
            # The processes exchange gradients once a step, with the last part.
            without_exchange = getattr(self.model, "no_sync", nullcontext)
            with nullcontext() if i == len(parts) else without_exchange():
                for name, loss in self._backward(part, 1 / len(parts)).items():
                    loss_dict[name] = loss_dict.get(name, 0) + loss
        self.after_backward()
        self.grad_scaler.unscale_(self.optimizer)
        *losses, norm = read_scalars([*loss_dict.values(), gradient_norm(self.model)])
        loss_dict = dict(zip(loss_dict, losses, strict=True))
        self.step_skipped = not math.isfinite(norm)
        loss_is_finite = all(torch.isfinite(loss) for loss in losses)
        # By the gradient that they share, all processes ask each other or none does.
        everywhere = all(comm.all_gather(loss_is_finite)) if self.step_skipped else True
        if not loss_is_finite:
            raise self._not_finite("loss", str({k: v.item() for k, v in loss_dict.items()}), data)
        if not everywhere:
            raise self._not_finite("loss of another process", "see that one's message", data)
        if self.step_skipped and not self.grad_scaler.is_enabled():
            raise self._not_finite("gradient", _nonfinite_gradients(self.model), data)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        # Waits for all processes: behind the guard, by which either none has stopped or all have, and while GPUs are busy.
        self._write_metrics(loss_dict, data_time)
        if self.step_skipped:
            self._check_scale(data)

    def _backward(self, data: Any, weight: float) -> dict[str, torch.Tensor]:
        """Add the gradient of `weight` times the losses, and return these, weighted, without gradient."""
        try:
            with torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None):
                loss_dict = self.model(data)
                losses = sum(loss_dict.values())
        except FloatingPointError as error:  # Detectron2's RPN finds NaN before there is a loss
            raise self._not_finite("loss", str(error), data) from error
        self.grad_scaler.scale(losses * weight).backward()
        return {name: loss.detach() * weight for name, loss in loss_dict.items()}

    def _check_scale(self, data: Any) -> None:
        """Say that a step was skipped; stop where a smaller scale of the gradients does not help."""
        scale = self.grad_scaler.get_scale()
        if scale < _SMALLEST_SCALE:
            raise self._not_finite(f"gradient, even if scaled by {scale:g},", _nonfinite_gradients(self.model), data)
        logger.info("Iteration %d: float16 gradients overflow, no step; their scale becomes %g", self.iter, scale)

    def _not_finite(self, what: str, found: str, data: Any) -> FloatingPointError:
        """Save the batch, and make the error that names the iteration, what was found, the file, the last checkpoint."""
        path = os.path.join(self.output_dir, f"nonfinite_batch_{self.iter:07d}_rank{comm.get_rank()}.pth")
        saved = f"is saved as {path}"
        try:
            torch.save(_plain(data), path)
        except (OSError, RuntimeError) as error:  # a full disk: torch.save makes either of it
            reason = str(error).partition("\n")[0]  # PyTorch's C++ stack follows
            saved = f"could not be saved as {path} ({type(error).__name__}: {reason})"
        last = os.path.join(self.output_dir, "last_checkpoint")
        checkpoint = "none was written yet"
        if os.path.isfile(last):
            with open(last) as f:
                checkpoint = os.path.join(self.output_dir, f.read().strip())
        return FloatingPointError(
            f"The {what} became infinite or NaN at iteration {self.iter}: {found}. The batch {saved}; "
            f"last good checkpoint: {checkpoint}. Try a smaller SOLVER.BASE_LR, a longer warm-up, or "
            'SOLVER.AMP.DTYPE "bfloat16".'
        )

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and gradient scaler."""
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state_dict)
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def read_scalars(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Bring scalars of one device, of any floating data type, to the CPU together, as float64."""
    return list(torch.stack([v.detach().double() for v in values]).cpu().unbind())


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """Norm of the gradient of all parameters that have one, a scalar on their device; 0 where none has."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=next(model.parameters()).device)
    return torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(gradients))))


def _nonfinite_gradients(model: nn.Module) -> str:
    names = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"of {', '.join(names[:3]) or 'all parameters together'}{more}"


def _plain(data: Any) -> Any:
    """A batch as tensors and plain containers, which load without unpickling code."""
    if isinstance(data, (torch.Tensor, str, int, float, bool, type(None))):
        return data
    if isinstance(data, np.ndarray) and data.dtype.kind in "biuf":
        return torch.from_numpy(data)
    if isinstance(data, dict):
        return {k: _plain(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(v) for v in data]
    if hasattr(data, "get_fields"):  # detectron2.structures.Instances
        return {k: _plain(v) for k, v in data.get_fields().items()}
    if hasattr(data, "__dict__"):
        return {k: _plain(v) for k, v in vars(data).items()}
    return repr(data)
