"""The models that several stages measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detectron2.modeling import build_model

from d2_objssl.engine import resolve_norms, setup_cfg
from d2_objssl.modeling.meta_arch import ObjectSSL

SLOTCON_CONFIG = Path(__file__).resolve().parents[2] / "configs/pretrain/slotcon_R_50_800ep_coco.yaml"


def build_slotcon(*overrides: Any) -> ObjectSSL:
    """The model of the paper's COCO config, with random weights, in training mode."""
    cfg = resolve_norms(setup_cfg(str(SLOTCON_CONFIG), ["MODEL.DEVICE", "cpu", *map(str, overrides)]))
    model = build_model(cfg)
    assert isinstance(model, ObjectSSL)
    return model.train()
