"""A warning when pretraining has collapsed: the loss may go on falling while the network learns nothing.

It looks at the metrics that the criterion of a method leaves in the event storage every few iterations, and so costs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn

logger = logging.getLogger(__name__)

_ONE_DIRECTION = (
    "all embeddings point in one direction. Compare learning rate, batch and weight decay with the config of the paper, "
    'lengthen the warm-up (SOLVER.WARMUP_ITERS or WARMUP_EPOCHS), and see that no NORM below MODEL.SSL is ""'
)
# Metric, key below MODEL.SSL.COLLAPSE whose value it must not be below (MIN_...) or above (MAX_...), and what it means if it is.
_MEANINGS = (
    ("feature_std", "MIN_FEATURE_STD", _ONE_DIRECTION),
    ("cell_std", "MIN_FEATURE_STD", _ONE_DIRECTION),
    (
        "active_slots",
        "MIN_ACTIVE_SLOTS",
        "nearly all cells of a view belong to one prototype. Look at MODEL.SSL.SLOTCON.TEACHER_TEMP and CENTER_MOMENTUM, at "
        "the learning rate, and whether the images show more than one thing",
    ),
    (
        "dead_prototypes",
        "MAX_DEAD_PROTOTYPES",
        "hardly any prototype wins a cell. Lower MODEL.SSL.SLOTCON.NUM_PROTOTYPES, or look at CENTER_MOMENTUM and the "
        "temperatures",
    ),
    (
        "positive_pairs",
        "MIN_POSITIVE_PAIRS",
        "the two views of an image hardly ever share a region or a slot, so nothing pulls them together. Raise "
        "INPUT.SSL.MIN_OVERLAP or CROP_SCALE, or use larger regions",
    ),
    (
        "images_without_region",
        "MAX_WITHOUT_REGION",
        "most views have no region, and count as one. Look at the region maps (tools/visualize.py, or "
        "tools/generate_masks.py --preview) and at INPUT.REGIONS",
    ),
    (
        "cluster_entropy",
        "MIN_CLUSTER_ENTROPY",
        "one cluster has nearly all cells. Lower MODEL.SSL.CYBORGS.VMF_WEIGHT or VMF_KAPPA, or the learning rate",
    ),
)


@dataclass(frozen=True)
class Limit:
    """Where a metric shows that nothing is learnt.

    Attributes:
        metric: its name in the event storage.
        key: of MODEL.SSL.COLLAPSE; "MIN_...": smaller values are bad, else larger ones.
        bound: in the unit of the metric.
        meaning: what a bad value says, and what to do.
    """

    metric: str
    key: str
    bound: float
    meaning: str

    def is_bad(self, value: float) -> bool:
        """Whether the value is on the wrong side."""
        return value < self.bound if self.key.startswith("MIN_") else value > self.bound


class CollapseMonitor(HookBase):
    """Warns, once a metric, when it has been beyond its limit for some time.

    It counts from the start of the process: a resumed run may warn again.
    """

    def __init__(self, limits: Sequence[Limit], *, period: int, start: int = 0) -> None:
        """
        Args:
            limits: of metrics; those that a method does not have are not looked at.
            period: iterations from the first bad value on, with no good one in between, before the warning.
            start: values of earlier iterations do not count.
        """
        self._limits = limits
        self._period = period
        self._start = start
        self._bad_since: dict[str, int] = {}
        self._warned: set[str] = set()

    def after_step(self) -> None:
        """Look at the metrics that were written in this iteration."""
        now = self.trainer.iter
        if now < self._start:
            return
        latest = self.trainer.storage.latest()
        for limit in self._limits:
            value, written = latest.get(limit.metric, (0.0, -1))
            if written != now or limit.metric in self._warned:
                continue
            if not limit.is_bad(value):
                self._bad_since.pop(limit.metric, None)
            elif now - self._bad_since.setdefault(limit.metric, now) >= self._period:
                self._warn(limit, value)

    def _warn(self, limit: Limit, value: float) -> None:
        self._warned.add(limit.metric)
        logger.warning(
            'Pretraining seems to have collapsed. "%s" is %.3g, and beyond its limit %g (MODEL.SSL.COLLAPSE.%s) since '
            "iteration %d: %s. This is said once.",
            limit.metric,
            value,
            limit.bound,
            limit.key,
            self._bad_since[limit.metric],
            limit.meaning,
        )


def build_collapse_monitor(cfg: CfgNode, model: nn.Module, images_per_process: int) -> CollapseMonitor | None:
    """Build the monitor of MODEL.SSL.COLLAPSE; None where it is switched off.

    Args:
        cfg: MODEL.SSL.COLLAPSE and SOLVER.WARMUP_ITERS are read.
        model: an `ObjectSSL`.
        images_per_process: N, of which "images_without_region" is a part.
    """
    collapse = cfg.MODEL.SSL.COLLAPSE
    if collapse.PERIOD <= 0:
        return None
    prototypes = getattr(model, "prototypes", None)
    # What keys give as a share, metrics count.
    totals = {
        "images_without_region": images_per_process,
        "dead_prototypes": 0 if prototypes is None else len(prototypes),
    }
    limits = [Limit(metric, key, collapse[key] * totals.get(metric, 1), text) for metric, key, text in _MEANINGS]
    return CollapseMonitor(limits, period=collapse.PERIOD, start=cfg.SOLVER.WARMUP_ITERS)
