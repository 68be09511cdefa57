"""Optimisers: LARS of our own, SGD and AdamW of PyTorch, built from SOLVER.*."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import Tensor, nn


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
            grads = [p.grad for p in params if p.grad is not None]
            buffers = [self._momentum_buffer(p) for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            vectors = [i for i, p in enumerate(params) if p.ndim == 1]
            matrices = [i for i, p in enumerate(params) if p.ndim != 1]
            if vectors:
                torch._foreach_add_([buffers[i] for i in vectors], [grads[i] for i in vectors])
            if matrices:
                updates = self._scaled_updates([params[i] for i in matrices], [grads[i] for i in matrices], group)
                torch._foreach_add_([buffers[i] for i in matrices], updates)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])
        return loss

    def _momentum_buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
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


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser that SOLVER.OPTIMIZER names.

    Raises:
        ValueError: for an unknown name.
    """
    name = cfg.SOLVER.OPTIMIZER
    if name == "SGD":
        return build_sgd(cfg, model)
    bias_decay = cfg.SOLVER.WEIGHT_DECAY_BIAS
    params = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=bias_decay,
        # The biases of a Swin Transformer's attention, which Detectron2 does not count as such.
        overrides=None if bias_decay is None else {"relative_position_bias_table": {"weight_decay": bias_decay}},
    )
    optimizer: torch.optim.Optimizer
    if name == "LARS":
        optimizer = LARS(
            params,
            lr=cfg.SOLVER.BASE_LR,
            momentum=cfg.SOLVER.MOMENTUM,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            trust_coefficient=cfg.SOLVER.LARS_TRUST_COEFFICIENT,
        )
    elif name == "ADAMW":
        optimizer = torch.optim.AdamW(
            params, lr=cfg.SOLVER.BASE_LR, betas=tuple(cfg.SOLVER.ADAMW_BETAS), weight_decay=cfg.SOLVER.WEIGHT_DECAY
        )
    else:
        raise ValueError(f'SOLVER.OPTIMIZER is "{name}"; known: "SGD", "LARS", "ADAMW"')
    return maybe_add_gradient_clipping(cfg, optimizer)
