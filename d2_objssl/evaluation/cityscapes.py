"""Detectron2's evaluators of Cityscapes, on NumPy 2.4: cityscapesscripts 2.3 calls functions that are gone from it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from detectron2.evaluation import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator


class CityscapesMaskEvaluator(CityscapesInstanceEvaluator):
    """AP and AP50 of instance masks by Cityscapes' own protocol."""

    def evaluate(self) -> Any:
        with _older_numpy("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling"):
            return super().evaluate()


class CityscapesLabelEvaluator(CityscapesSemSegEvaluator):
    """IoU of semantic labels by Cityscapes' own protocol."""

    def evaluate(self) -> Any:
        with _older_numpy("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling"):
            return super().evaluate()


def require_cityscapesscripts(dataset_name: str) -> None:
    """Raise an ImportError that says what to install, where cityscapesscripts is absent."""
    if importlib.util.find_spec("cityscapesscripts") is None:
        raise ImportError(
            f'evaluating "{dataset_name}" (Cityscapes) needs cityscapesscripts: pip install cityscapesscripts'
        )


class _OlderNumPy:
    """NumPy, with the two functions of before 2.4 that cityscapesscripts needs."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def in1d(elements: Any, test_elements: Any, **kwargs: Any) -> np.ndarray:
        return np.isin(elements, test_elements, **kwargs).ravel()

    @staticmethod
    def count_nonzero(array: Any) -> int:
        """As a plain integer: the counts are written as JSON."""
        return int(np.count_nonzero(array))


@contextmanager
def _older_numpy(module_name: str) -> Iterator[None]:
    """Let `np` be `_OlderNumPy` in one module of cityscapesscripts."""
    module: Any = importlib.import_module(module_name)
    original = module.np
    module.np = _OlderNumPy()
    try:
        yield
    finally:
        module.np = original
