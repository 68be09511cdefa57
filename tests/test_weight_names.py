"""Names of weights: which network of a state dict is found, and what its keys become."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone

from d2_objssl.checkpoint import backbone_prefix, detect_layout, from_detectron2, infer_resnet, to_detectron2


def resnet_names(depth: int, **kwargs: Any) -> dict[str, torch.Tensor]:
    """State dict of a torchvision ResNet without memory."""
    with torch.device("meta"):
        return getattr(torchvision.models, f"resnet{depth}")(**kwargs).state_dict()


WRAPPERS = r"^(module\.|model\.|_orig_mod\.)+"


def two_keys(prefix: str, value: float = 0.0) -> dict[str, torch.Tensor]:
    """The shortest state dict that counts as a torchvision ResNet."""
    return {f"{prefix}{name}": torch.tensor(value) for name in ("conv1.weight", "layer1.0.conv1.weight", "bn1.bias")}


@pytest.mark.parametrize("depth", [18, 50, 101])
@pytest.mark.parametrize("layout", ["torchvision", "timm"])
def test_conversion_to_detectron2_and_back_is_the_identity(depth: int, layout: str) -> None:
    original = {name: value for name, value in resnet_names(depth).items() if not name.startswith("fc.")}
    converted = to_detectron2(resnet_names(depth), layout)
    cfg = get_cfg()
    cfg.MODEL.RESNETS.update(CfgNode({"DEPTH": depth, "NORM": "BN", "RES2_OUT_CHANNELS": 64 if depth < 50 else 256}))
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    with torch.device("meta"):
        expected = build_resnet_backbone(cfg, ShapeSpec(channels=3)).state_dict()
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in expected.items()}
    back = from_detectron2(converted, layout)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in original.items()}
    again = to_detectron2(back)
    assert list(again) == list(converted) and all(again[name] is converted[name] for name in again)


@pytest.mark.parametrize(
    ("prefixes", "extra", "branch", "expected"),
    [
        ([""], "fc.weight", None, ""),
        (["module."], None, None, ""),
        (["encoder_q.", "encoder_k."], "queue", None, "encoder_q."),  # MoCo v1, v2
        (["module.encoder_q.", "module.encoder_k."], "module.queue", None, "encoder_q."),
        (["module.encoder_q.", "module.encoder_k."], "module.queue", "teacher", "encoder_k."),
        (["module.encoder_q.", "module.encoder_k."], "module.grouping_q.x", None, "encoder_k."),  # SlotCon
        (["module.encoder_q.", "module.encoder_k."], "module.grouping_q.x", "student", "encoder_q."),
        (["module.encoder_k."], None, None, "encoder_k."),
        (["encoder_k.", "encoder."], None, None, "encoder."),  # PixPro
        (["module.base_encoder.", "module.momentum_encoder."], None, None, "base_encoder."),  # MoCo v3
        (["base_encoder.", "momentum_encoder."], None, "teacher", "momentum_encoder."),
        (["momentum_encoder."], None, None, "momentum_encoder."),
        (["backbone."], "head.weight", None, "backbone."),
        (["net."], "projector.weight", None, "net."),
        (["net.", "online_encoder.net.", "target_encoder.net."], None, None, "net."),
        (["encoder."], "projector.weight", None, "encoder."),
        (["online_network.", "target_network."], None, None, "online_network."),
        (["model.student.backbone.", "model.teacher.backbone."], None, None, "teacher.backbone."),
        (["_orig_mod.module."], None, None, ""),
        (["somebody.elses."], "fc.weight", None, "somebody.elses."),
    ],
)
def test_network_is_found_behind_any_known_prefix(
    prefixes: list[str], extra: str | None, branch: str | None, expected: str
) -> None:
    state = {k: v for i, prefix in enumerate(prefixes) for k, v in two_keys(prefix, float(i)).items()}
    state |= {extra: torch.zeros(1)} if extra else {}
    assert detect_layout(state) == "torchvision"
    assert backbone_prefix(state, branch=branch) == expected
    converted = to_detectron2(state, "auto", branch=branch)
    assert sorted(converted) == ["res2.0.conv1.weight", "stem.conv1.norm.bias", "stem.conv1.weight"]
    (chosen,) = (i for i, prefix in enumerate(prefixes) if re.sub(WRAPPERS, "", prefix) == expected)
    assert {v.item() for v in converted.values()} == {float(chosen)}


@pytest.mark.parametrize(
    ("state", "kwargs", "message"),
    [
        ({"head.weight": 1, "tail.bias": 1}, {}, r"unknown layout.*2 keys: head.weight, tail.bias.*d2_objssl"),
        ({}, {}, "no weights"),
        ({"epoch": None, "args": None}, {}, "no weights.*epoch, args"),
        (two_keys("a.") | two_keys("b."), {}, r"several networks.*'a\.', 'b\.'"),
        (two_keys(""), {"branch": "teacher"}, "teacher is asked for"),
        (two_keys("momentum_encoder."), {"branch": "student"}, "student is asked for"),
        (two_keys(""), {"branch": "mean"}, 'branch is "mean"'),
        (two_keys(""), {"layout": "keras"}, 'layout is "keras"'),
        (two_keys(""), {"layout": "detectron2"}, "no detectron2 names"),
        (two_keys("") | {"layer1.0.se.fc1.weight": 1}, {}, "layer1.0.se.fc1.weight.*no name"),
    ],
)
def test_names_that_cannot_be_converted_are_reported(state: dict, kwargs: dict, message: str) -> None:
    state = {name: value if value is None else torch.as_tensor(value) for name, value in state.items()}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        to_detectron2(state, **kwargs)


def test_from_detectron2_refuses_what_torchvision_has_no_name_for() -> None:
    state = {k: torch.zeros(1) for k in ("stem.conv1.weight", "res2.0.conv1.weight")}
    for name in ("res3.0.conv2_offset.weight", "stem.conv2.weight"):
        with pytest.raises(ValueError, match=name):
            from_detectron2(state | {name: torch.zeros(1)})
    with pytest.raises(ValueError, match="keras"):
        from_detectron2(state, "keras")


def test_branch_of_a_pretraining_checkpoint() -> None:
    student, teacher = torch.zeros(1), torch.ones(1)
    state = {"student.backbone.res2.0.conv1.weight": student, "student.embedder.weight": student}
    both = state | {"teacher.backbone.res2.0.conv1.weight": teacher, "criterion.center": student}
    assert detect_layout(both) == detect_layout({"model": both}) == "d2_objssl"
    name = "res2.0.conv1.weight"
    assert to_detectron2(both) == {name: teacher}
    assert to_detectron2(state) == {name: student}
    assert to_detectron2(both, branch="student") == {name: student}
    assert to_detectron2({"model": both, "d2_objssl": {"export_branch": "student"}}) == {name: student}
    assert to_detectron2({"model": state, "d2_objssl": {"export_branch": "teacher"}}) == {name: student}
    with pytest.raises(ValueError, match="teacher is asked for"):
        to_detectron2(state, branch="teacher")
    pyramid = {"student.backbone.bottom_up.stem.conv1.weight": student, "student.backbone.fpn_output2.weight": teacher}
    assert to_detectron2(pyramid) == {"stem.conv1.weight": student}


@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.bottom_up.", "module.backbone.bottom_up."])
def test_detectron2_backbones_lose_their_prefix_and_their_neighbours(prefix: str) -> None:
    inner = ["stem.conv1.weight", "res2.0.conv1.weight", "res2.0.conv1.norm.num_batches_tracked"]
    outer = ["backbone.fpn_lateral2.weight", "proposal_generator.rpn_head.conv.weight", "stem.fc.weight"]
    state = {f"{prefix}{name}": np.float32(i) for i, name in enumerate(inner)}
    wrapper = "module." if prefix.startswith("module.") else ""
    state |= {f"{wrapper}{name}": np.float32(9) for name in outer if prefix or name != "stem.fc.weight"}
    assert detect_layout(state) == "detectron2"
    assert to_detectron2(state) == {name: np.float32(i) for i, name in enumerate(inner)}


@pytest.mark.parametrize(
    ("depth", "kwargs", "expected"),
    [
        (18, {}, (18, 1, 64, 64, 64)),
        (34, {}, (34, 1, 64, 64, 64)),
        (50, {}, (50, 1, 64, 256, 64)),
        (50, {"groups": 32, "width_per_group": 4}, (50, 32, 4, 256, 64)),
        (101, {"groups": 32, "width_per_group": 8}, (101, 32, 8, 256, 64)),
        (152, {"width_per_group": 128}, (152, 1, 128, 256, 64)),
    ],
)
def test_architecture_is_read_off_the_shapes(depth: int, kwargs: dict, expected: tuple[int, ...]) -> None:
    bare = to_detectron2(resnet_names(depth, **kwargs))
    assert tuple(infer_resnet(bare).values()) == expected
    with pytest.raises(ValueError, match="no ResNet"):
        infer_resnet({name: value for name, value in bare.items() if not name.startswith("res5")})
