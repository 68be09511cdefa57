"""mIoU of label maps whose labels are checked."""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.evaluation import SemSegEvaluator

from ..data.ground_truth import find_unknown_labels, read_label_map


class CheckedSemSegEvaluator(SemSegEvaluator):
    """Detectron2's `SemSegEvaluator`, which would count a label that is no class for other classes, without a word.

    Its confusion matrix is indexed by (predicted class) * (classes + 1) + label, so that a larger label is one of the next
    class. Its reading of label maps fails on NumPy 2.
    """

    def __init__(self, dataset_name: str, **kwargs: Any) -> None:
        """
        Args:
            dataset_name: name in the catalogs; the metadata have `stuff_classes` and `ignore_label`.
            **kwargs: arguments of `SemSegEvaluator`.
        """
        super().__init__(dataset_name, sem_seg_loading_fn=self._load_labels, **kwargs)

    def _load_labels(self, file_name: str, dtype: Any = int) -> np.ndarray:
        """(H, W) labels.

        Raises:
            OSError: naming the file, if it is missing or damaged.
            ValueError: naming the file, if it does not hold one integer a pixel, or a label that is no class.
        """
        labels = read_label_map(file_name)
        if unknown := find_unknown_labels(labels, self._num_classes, self._ignore_label):
            raise ValueError(
                f'{file_name} has the label(s) {unknown}; those of "{self._dataset_name}" are 0 to '
                f"{self._num_classes - 1}, and {self._ignore_label}, which is ignored"
            )
        return labels.astype(dtype)
