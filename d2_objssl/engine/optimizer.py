"""Optimisers: LARS of our own, SGD and AdamW of PyTorch, built from SOLVER.*."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import Tensor, nn
from torch.optim.sgd import sgd

_NORM_PART = 1 << 19  # elements
_CANCELLATION = 0.1  # of |g + wd p| against wd |p|; below it that norm is computed from the sum itself
_SMALLEST_RATIO = 1e-12  # of weights to update; beyond it, and its inverse, the momentum is not kept in its units


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled per tensor by the ratio of weight norm to update norm.

    For tensors that are not one-dimensional  u = g + wd p,  u <- eta |p| / |u| u  (factor 1 where either norm is 0);
    one-dimensional ones (biases, norm layers) get neither decay nor scaling. Then  m <- mu m + u,  p <- p - lr m.

    Source: You et al. 2017, "Large batch training of convolutional networks"; exemptions as in BYOL.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        """
        Args:
            params: parameters or parameter groups.
            lr: learning rate.
            momentum: mu.
            weight_decay: wd.
            trust_coefficient: eta.

        Raises:
            ValueError: for a negative argument.
        """
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        for name, value in defaults.items():
            if value < 0:
                raise ValueError(f"LARS: {name} is {value}; it must not be negative")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step; gradients are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            # One pass over a tensor instead of many; on GPUs it would wait for the norms of every tensor.
            fused = [p for p in params if p.device.type == "cpu" and self._is_aligned(p)]
            self._fused_step(fused, group)
            chosen = set(map(id, fused))
            self._foreach_step([p for p in params if id(p) not in chosen], group)
        return loss

    def _foreach_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update tensors of any kind, many in one call."""
        if not params:
            return
        grads = [p.grad for p in params if p.grad is not None]
        buffers = [self._momentum_buffer(p) for p in params]
        for p in params:
            self._set_buffer_scale(p, 1.0)
        torch._foreach_mul_(buffers, group["momentum"])
        vectors = [i for i, p in enumerate(params) if p.ndim == 1]
        matrices = [i for i, p in enumerate(params) if p.ndim != 1]
        if vectors:
            torch._foreach_add_([buffers[i] for i in vectors], [grads[i] for i in vectors])
        if matrices:
            updates = self._scaled_updates([params[i] for i in matrices], [grads[i] for i in matrices], group)
            torch._foreach_add_([buffers[i] for i in matrices], updates)
        torch._foreach_add_(params, buffers, alpha=-group["lr"])

    def _fused_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update aligned CPU tensors by PyTorch's fused SGD.

        With the trust ratio r, m <- mu m + r u,  p <- p - lr m  is, for the buffer b = m / r, the step of SGD
        b <- (mu r' / r) b + u,  p <- p - lr r b,  where r' is the ratio of the step before. `buffer_scale` keeps it.
        """
        vectors = [p for p in params if p.ndim == 1]
        self._sgd_step(vectors, lr=group["lr"], momentum=group["momentum"], weight_decay=0.0)
        for p in params:
            if p.ndim == 1:
                continue
            assert p.grad is not None
            ratio = _trust_ratio(p, p.grad, group["weight_decay"], group["trust_coefficient"])
            if not _SMALLEST_RATIO < ratio < 1 / _SMALLEST_RATIO:
                self._foreach_step([p], group)
                continue
            momentum = group["momentum"] * self.state[p]["buffer_scale"] / ratio
            self._sgd_step([p], lr=group["lr"] * ratio, momentum=momentum, weight_decay=group["weight_decay"])
            self.state[p]["buffer_scale"] = ratio

    def _sgd_step(self, params: list[Tensor], *, lr: float, momentum: float, weight_decay: float) -> None:
        """SGD on the parameters and their buffers, as these are."""
        sgd(
            params,
            [p.grad for p in params if p.grad is not None],
            [self._momentum_buffer(p) for p in params],
            fused=True,
            weight_decay=weight_decay,
            momentum=momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )

    def _is_aligned(self, param: Tensor) -> bool:
        """Whether parameter, gradient and buffer have their elements in one order, without gaps."""
        assert param.grad is not None
        strides = param.stride()
        same = strides == param.grad.stride() == self._momentum_buffer(param).stride()
        return same and _flat(param) is not None

    def _set_buffer_scale(self, param: Tensor, scale: float) -> None:
        """Let the momentum be `scale` times the buffer."""
        state = self.state[param]
        if state["buffer_scale"] != scale:
            state["momentum_buffer"].mul_(state["buffer_scale"] / scale)
            state["buffer_scale"] = scale

    def _momentum_buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        state.setdefault("buffer_scale", 1.0)  # a checkpoint of before there was one
        return state["momentum_buffer"]

    @staticmethod
    def _scaled_updates(params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """eta |p| / |u| u  with  u = g + wd p, without waiting for the device."""
        updates = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        param_norms = torch.stack(list(torch._foreach_norm(params)))
        update_norms = torch.stack(list(torch._foreach_norm(updates)))
        ratios = group["trust_coefficient"] * param_norms / update_norms
        ratios = torch.where((param_norms > 0) & (update_norms > 0), ratios, torch.ones_like(ratios))
        torch._foreach_mul_(updates, list(ratios.unbind()))
        return updates


def _flat(x: Tensor) -> Tensor | None:
    """The elements in the order of memory, as a view; None if there are gaps between them."""
    if x.is_contiguous():
        return x.view(-1)
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).view(-1)
    return None


def _trust_ratio(param: Tensor, grad: Tensor, weight_decay: float, trust_coefficient: float) -> float:
    """eta |p| / |g + wd p| of CPU tensors with one order of elements; 1 where either norm is 0."""
    params, grads = _flat(param), _flat(grad)
    assert params is not None and grads is not None
    param_square = update_square = 0.0
    # In parts that stay in the cache, so that memory is read once: |g + wd p|^2 = |g|^2 + 2 wd g p + wd^2 |p|^2.
    for p, g in zip(params.split(_NORM_PART), grads.split(_NORM_PART), strict=True):
        product, square = torch.dot(p, g).item(), torch.dot(p, p).item()
        param_square += square
        update_square += torch.dot(g, g).item() + weight_decay * (2 * product + weight_decay * square)
    param_norm, update_norm = math.sqrt(param_square), math.sqrt(max(update_square, 0.0))
    if update_norm < _CANCELLATION * weight_decay * param_norm:  # the sum is what rounding left of its terms
        update_norm = torch.linalg.vector_norm(grads + weight_decay * params).item()
    return trust_coefficient * param_norm / update_norm if param_norm > 0 and update_norm > 0 else 1.0


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser that SOLVER.OPTIMIZER names.

    What is not below `model.backbone` learns SOLVER.HEAD_LR_FACTOR times as fast; schedules multiply all rates alike.

    Raises:
        ValueError: for an unknown name, or for a SOLVER.HEAD_LR_FACTOR of a model without a backbone.
    """
    name, solver = cfg.SOLVER.OPTIMIZER, cfg.SOLVER
    params = _parameter_groups(cfg, model)
    common = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    optimizer: torch.optim.Optimizer
    if name == "SGD":
        optimizer = torch.optim.SGD(params, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, foreach=True, **common)
    elif name == "LARS":
        optimizer = LARS(params, momentum=solver.MOMENTUM, trust_coefficient=solver.LARS_TRUST_COEFFICIENT, **common)
    elif name == "ADAMW":
        optimizer = torch.optim.AdamW(params, betas=tuple(solver.ADAMW_BETAS), **common)
    else:
        raise ValueError(f'SOLVER.OPTIMIZER is "{name}"; known: "SGD", "LARS", "ADAMW"')
    return maybe_add_gradient_clipping(cfg, optimizer)


def _parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Detectron2's parameter groups, by learning rate and weight decay."""
    solver, bias_decay = cfg.SOLVER, cfg.SOLVER.WEIGHT_DECAY_BIAS
    factor = solver.HEAD_LR_FACTOR
    if factor != 1 and not any(name.startswith("backbone.") for name, _ in model.named_parameters()):
        raise ValueError(
            f"SOLVER.HEAD_LR_FACTOR is {factor}, but {type(model).__name__} has no backbone to tell a head from"
        )
    return get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        # Detectron2 leaves it to SGD; a group of its own for norm layers, even if their decay is the same.
        weight_decay=None if solver.OPTIMIZER == "SGD" else solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=bias_decay,
        lr_factor_func=lambda name: 1.0 if name.startswith("backbone.") else factor,
        # The biases of a Swin Transformer's attention, which Detectron2 does not count as such.
        overrides=None if bias_decay is None else {"relative_position_bias_table": {"weight_decay": bias_decay}},
    )
