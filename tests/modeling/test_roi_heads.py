"""Res5ROIHeadsExtraNorm: MoCo's C4 head, and what pretrained weights fill of it."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import build_resnet_backbone
from torch import nn

from d2_objssl import add_objssl_config
from d2_objssl.checkpoint import ObjSSLCheckpointer, backbone_keys, checkpoint_metadata


def make_cfg(**resnets: Any) -> CfgNode:
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    narrow = {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 16, "WIDTH_PER_GROUP": 4, "STRIDE_IN_1X1": False}
    cfg.MODEL.RESNETS.update(CfgNode({"NORM": "BN", "OUT_FEATURES": ["res4"], **narrow, **resnets}))
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeadsExtraNorm"
    cfg.MODEL.WEIGHTS = ""
    return cfg


def pretrained_resnet() -> dict[str, torch.Tensor]:
    """Bare names of a whole ResNet whose every value is random."""
    resnet = build_resnet_backbone(make_cfg(OUT_FEATURES=["res5"]), ShapeSpec(channels=3))
    for value in resnet.state_dict().values():
        if value.is_floating_point():
            nn.init.uniform_(value)
    return resnet.state_dict()


def write_weights(folder: Path, kind: str, weights: dict[str, torch.Tensor]) -> Path:
    """A converted file, or a checkpoint of pretraining whose student's weights are others than the teacher's."""
    if kind == "converted":
        path = folder / "converted.pkl"
        path.write_bytes(
            pickle.dumps({"model": {k: v.numpy() for k, v in weights.items()}, "matching_heuristics": True})
        )
        return path
    student = {f"student.backbone.{k}": v + 1 for k, v in weights.items()}
    teacher = {f"teacher.backbone.{k}": v for k, v in weights.items()}
    contract = checkpoint_metadata(make_cfg())
    torch.save({"model": student | teacher, "d2_objssl": contract | {"export_branch": "teacher"}}, folder / "raw.pth")
    return folder / "raw.pth"


@pytest.mark.parametrize("kind", ["converted", "raw"])
def test_pretrained_res5_arrives_in_the_head(kind: str, tmp_path: Path) -> None:
    cfg, weights = make_cfg(), pretrained_resnet()
    model = build_model(cfg)
    extra = copy.deepcopy(model.roi_heads.res5.norm.state_dict())
    path = write_weights(tmp_path, kind, weights)
    ObjSSLCheckpointer(model, metadata=checkpoint_metadata(cfg)).resume_or_load(str(path), resume=False)
    after = model.state_dict()
    places = {k: f"roi_heads.{k}" if k.startswith("res5.") else f"backbone.{k}" for k in weights}
    assert sum(place.startswith("roi_heads.res5.") for place in places.values()) > 50
    for name, place in places.items():
        assert torch.equal(after[place], weights[name]), place
    assert all(torch.equal(v, extra[k]) for k, v in model.roi_heads.res5.norm.state_dict().items()), "it starts anew"
    assert not any(".res5.norm." in name for name in backbone_keys(model))


@pytest.mark.parametrize("kind", ["converted", "raw"])
def test_a_file_without_res5_is_refused(kind: str, tmp_path: Path) -> None:
    cfg = make_cfg()
    weights = {k: v for k, v in pretrained_resnet().items() if not k.startswith("res5.")}
    path = write_weights(tmp_path, kind, weights)
    with pytest.raises(ValueError, match=r"(?s)only \d+ of \d+ parameters.*roi_heads\.res5"):
        ObjSSLCheckpointer(build_model(cfg)).resume_or_load(str(path), resume=False)


def test_features_are_normalised_behind_res5() -> None:
    heads = build_model(make_cfg()).roi_heads
    assert [name for name, _ in heads.res5.named_children()] == ["0", "1", "2", "norm"]
    out = heads.res5(torch.randn(4, 64, 6, 6))
    assert out.shape == (4, 128, 3, 3)
    means, variances = out.mean(dim=(0, 2, 3)), out.var(dim=(0, 2, 3), unbiased=False)
    torch.testing.assert_close(means, torch.zeros(128), atol=1e-5, rtol=0)
    torch.testing.assert_close(variances, torch.ones(128), atol=1e-2, rtol=0)


@pytest.mark.parametrize(("key", "value"), [("PADDING", "same"), ("WIDTH_MULTIPLIER", 2), ("DEPTH", 18)])
def test_networks_that_the_head_cannot_continue_are_refused(key: str, value: Any) -> None:
    cfg = make_cfg(**{key: value})
    cfg.MODEL.BACKBONE.NAME = "build_objssl_resnet_backbone"
    if key == "DEPTH":
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    with pytest.raises(ValueError, match=rf"{key}.*{value}.*Res5ROIHeadsExtraNorm"):
        build_model(cfg)
