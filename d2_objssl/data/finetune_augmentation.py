"""Augmentations of fine-tuning that Detectron2 does not build from its own keys, by INPUT.AUGMENTATION."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from fvcore.common.registry import Registry

AUGMENTATION_REGISTRY = Registry("AUGMENTATION")
AUGMENTATION_REGISTRY.__doc__ = """
Augmentations of fine-tuning. A registered function is called as `function(cfg, is_train)` and returns the arguments of
`DatasetMapper` that it replaces: {"augmentations": list of Augmentation or Transform, ...}.
"""


def build_augmentation(cfg: CfgNode, is_train: bool) -> dict[str, Any]:
    """Arguments of `DatasetMapper` by INPUT.AUGMENTATION.

    Raises:
        ValueError: for an unknown INPUT.AUGMENTATION.
    """
    name = cfg.INPUT.AUGMENTATION
    if name not in AUGMENTATION_REGISTRY:
        known = ["detectron2", *sorted(key for key, _ in AUGMENTATION_REGISTRY)]
        raise ValueError(f'INPUT.AUGMENTATION is "{name}"; known: {known}')
    return AUGMENTATION_REGISTRY.get(name)(cfg, is_train)
