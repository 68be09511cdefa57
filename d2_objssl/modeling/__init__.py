"""Meta-architecture, heads and methods."""

from . import backbone, methods, roi_heads, sem_seg_head, sliding_window, swin  # noqa: F401  (they fill the registries)
from .classifier import ImageClassifier
from .depth import DepthEstimator
from .meta_arch import ObjectSSL

__all__ = ["DepthEstimator", "ImageClassifier", "ObjectSSL"]
