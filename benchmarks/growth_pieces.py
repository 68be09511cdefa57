"""The pieces of SlotCon's losses that grow with the prototypes, one by one.

N  images    K  prototypes    D  dimension    h, w  cells of a view
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from detectron2.config import CfgNode
from stages.timing import repeat_in_turns
from torch import Tensor

from d2_objssl.geometry import align_features
from d2_objssl.modeling.methods.slotcon import active_slots, assign_slots, grouping_loss


def time_pieces(cfg: CfgNode, side: int, num_images: int, repeats: int, seed: int) -> dict[str, float]:
    """CPU time of each piece in a step, seconds: two views, forward and backward of the student, forward of the teacher.

    Args:
        cfg: SlotCon's.
        side: h = w, cells.
        num_images: N.
        repeats: runs whose median is taken, after a first one.
        seed: of the random features and prototypes.
    """
    torch.manual_seed(seed)
    slotcon, dim = cfg.MODEL.SSL.SLOTCON, cfg.MODEL.SSL.PROJECTOR.OUT_DIM
    features = torch.randn(num_images, dim, side, side, requires_grad=True)
    prototypes = torch.randn(slotcon.NUM_PROTOTYPES, dim, requires_grad=True)
    with torch.no_grad():
        slots, scores = assign_slots(features, prototypes, slotcon.TEACHER_TEMP)
    active = active_slots(scores)
    rois = torch.tensor([0.0, 0.0, 0.75, 0.75]).repeat(num_images, 1)
    flipped = torch.arange(num_images) % 2 == 0
    cells = scores.permute(0, 2, 3, 1).flatten(0, 2)
    temps = (slotcon.STUDENT_TEMP, slotcon.TEACHER_TEMP)

    def assign(x: Tensor, k: Tensor) -> Tensor:
        assigned, dots = assign_slots(x, k, slotcon.TEACHER_TEMP)
        return assigned.sum() + dots.sum()

    pieces: dict[str, Callable[[], object]] = {
        "assignment and slots": partial(_step, assign, features, prototypes),
        "scores' alignment": partial(_step, lambda x: align_features(x, rois, flipped).sum(), scores),
        "grouping loss": partial(
            _step, lambda x: grouping_loss(x, cells, torch.zeros(1), *temps), cells, teacher=False
        ),
        "choice of slots": partial(_step, lambda x: x[active].sum(), slots),
        "active slots": partial(_step, active_slots, scores, student=False),
    }
    for piece in pieces.values():
        piece()
    runs = repeat_in_turns({name: partial(_seconds, piece) for name, piece in pieces.items()}, repeats, seed)
    return {name: statistics.median(values) for name, values in runs.items()}


def _step(function: Callable[..., Tensor], *inputs: Tensor, student: bool = True, teacher: bool = True) -> None:
    """What a step makes of `function`: for two views, with gradient and without; only without where not `student`."""
    for _ in range(2):
        if student:
            function(*(x.detach().requires_grad_() for x in inputs)).backward()
        else:
            function(*inputs)
        if teacher:
            with torch.no_grad():
                function(*inputs)


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start
