"""Evaluators."""

from .build import build_evaluator
from .coco import FastCOCOEvaluator

__all__ = ["FastCOCOEvaluator", "build_evaluator"]
