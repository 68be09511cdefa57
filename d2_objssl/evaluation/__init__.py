"""Evaluators."""

from .build import build_evaluator
from .coco import FastCOCOEvaluator
from .lvis import FastLVISEvaluator

__all__ = ["FastCOCOEvaluator", "FastLVISEvaluator", "build_evaluator"]
