"""What a pretraining method has to supply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from detectron2.engine import HookBase
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ...structures import ViewBatch
from ...visualization import draw_views

SSL_METHOD_REGISTRY = Registry("SSL_METHOD")
SSL_METHOD_REGISTRY.__doc__ = """
Registry of pretraining methods, chosen by MODEL.SSL.METHOD. A builder takes `(cfg, input_shape)`, `input_shape` being
the backbone's `dict[str, ShapeSpec]`, and returns an :class:`SSLMethod`.
"""


class SSLMethod(NamedTuple):
    """The parts that a paper adds to `ObjectSSL`.

    Attributes:
        embedder: module `(features: dict[str, Tensor], view: ViewBatch, regions) -> RegionEmbeddings`. Copied into the
            teacher.
        criterion: module `(student, teacher, views) -> dict[str, Tensor]` of weighted "loss_*" scalars; the first two
            are lists of RegionEmbeddings, one per view. Never copied: predictor and centre live here. Its attribute
            `metrics` (dict of scalar tensors) is logged.
        sample: `(views) -> list`, what the embedder gets as `regions` for each view; None passes None.
        num_views: number of views the method works on.
        separate_teacher_regions: the teacher gets regions of its own from a second call of `sample`.
        idle_parameters: there are steps in which some of the student's parameters take no part: they have no gradient then.
        build_hooks: `(trainer) -> list[HookBase]`, hooks of the method, run after the teacher's update and before
            checkpoints are written; None: there are none.
        draw: `(views, not normalised) -> (3, H, W)` uint8 picture of what training sees.
    """

    embedder: nn.Module
    criterion: nn.Module
    sample: Callable[[list[ViewBatch]], list[Any]] | None = None
    num_views: int = 2
    separate_teacher_regions: bool = False
    idle_parameters: bool = False
    build_hooks: Callable[[Any], list[HookBase]] | None = None
    draw: Callable[[list[ViewBatch]], Tensor] = draw_views
