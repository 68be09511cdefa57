"""Less memory for larger batches: activations of a backbone's blocks are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from detectron2.layers import CNNBlockBase
from detectron2.modeling import Backbone
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.modules.batchnorm import _BatchNorm


def checkpoint_blocks(backbone: Backbone) -> None:
    """Keep only the inputs of the residual blocks of a ResNet, in place; names of parameters and buffers stay.

    Results, gradients and running statistics are those of before. Costs one more forward pass of the blocks.

    Raises:
        ValueError: if the backbone has no residual blocks.
    """
    if not any(_is_residual(module) for module in backbone.modules()):
        raise ValueError(
            f"MODEL.SSL.CHECKPOINT_ACTIVATIONS is True, but {type(backbone).__name__} has no residual blocks of a ResNet"
        )
    apply_activation_checkpointing(backbone, checkpoint_wrapper_fn=_wrap, check_fn=_is_residual)


def _is_residual(module: nn.Module) -> bool:
    return isinstance(module, CNNBlockBase) and hasattr(module, "shortcut")


def _wrap(block: nn.Module) -> nn.Module:
    return checkpoint_wrapper(block, context_fn=partial(_contexts, block))


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What surrounds the first and the second forward pass of a block."""
    return nullcontext(), _frozen_statistics(block)


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Let batch-norm layers see a batch for the second time without counting it again."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
    tracked = [m.num_batches_tracked for m in norms if m.num_batches_tracked is not None]
    counts = [count.clone() for count in tracked]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for now, count in zip(tracked, counts, strict=True):
            now.copy_(count)
