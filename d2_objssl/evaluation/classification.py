"""Top-1 and top-5 accuracy of a classifier."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from typing import Any

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

logger = logging.getLogger(__name__)


def rank_of_label(scores: Tensor, label: int) -> int:
    """How many other classes score at least as high as the true one; so ties, and scores that are NaN, do not count as right.

    Args:
        scores: (C,) float.
        label: the true class.
    """
    return int((~(scores < scores[label])).sum()) - 1


class ClassificationEvaluator(DatasetEvaluator):
    """Top-1 accuracy, and top-5 where there are more than 5 classes, in percent, over the images of all processes."""

    def __init__(self) -> None:
        self._ranks: dict[Hashable, int] = {}
        self._num_classes = 0

    def reset(self) -> None:
        """Forget all images."""
        self._ranks.clear()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Tensor]]) -> None:
        """Take up images ("image_id", "label") and what the model said of them ("scores")."""
        for image, output in zip(inputs, outputs, strict=True):
            self._num_classes = len(output["scores"])
            self._ranks[image["image_id"]] = rank_of_label(output["scores"], image["label"])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """{"classification": {"top1", "top5"}} in the main process; {} in the others.

        Each image counts once, whichever process, or however many, had it.

        Raises:
            ValueError: if there was no image.
        """
        gathered = comm.gather((self._ranks, self._num_classes))
        if not comm.is_main_process():
            return {}
        ranks = {image: rank for own, _ in gathered for image, rank in own.items()}
        if not ranks:
            raise ValueError("DATASETS.TEST has no image to evaluate")
        most = max(num_classes for _, num_classes in gathered)
        ks = (1, 5) if most > 5 else (1,)
        results = {f"top{k}": 100 * sum(rank < k for rank in ranks.values()) / len(ranks) for k in ks}
        logger.info("%d images of %d classes: %s", len(ranks), most, results)
        return {"classification": results}
