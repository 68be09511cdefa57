"""Swin Transformers: features of Detectron2 and torchvision, outputs, stochastic depth, freezing, pretraining."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import SwinTransformer, build_backbone, build_model
from tiny_runs import assert_identical, final_checkpoint, finetune_cfg, train
from tiny_semcl import register_pairs, semcl_batch, semcl_cfg, semcl_run_cfg, write_labelled
from tiny_swin import ARCH, SWIN_OPTS, randomize, source_state, swin_cfg
from torch import Tensor, nn

from d2_objssl.engine.optimizer import build_optimizer
from d2_objssl.modeling.swin import SwinBackbone
from d2_objssl.swin_sources import TorchvisionSwin
from d2_objssl.weight_names_swin import swin_to_detectron2

STAGES = ("res2", "res3", "res4", "res5")
PRETRAIN_OPTS = ["MODEL.BACKBONE.NAME", "build_swin_backbone", *SWIN_OPTS, "MODEL.SWIN.OUT_FEATURES", ("res5",)]


def noise(*size: int, n: int = 2) -> Tensor:
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------ features


@pytest.mark.parametrize("size", [(160, 96), (75, 109)])
def test_maps_larger_than_a_window_give_detectron2s_features(size: tuple[int, int]) -> None:
    ours = randomize(build_backbone(swin_cfg()))
    theirs = SwinTransformer(**ARCH, drop_path_rate=0.0).eval()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        features, expected = ours(noise(*size)), theirs(noise(*size))
    assert list(features) == list(STAGES)
    for stage, name in zip(STAGES, expected, strict=True):
        assert torch.equal(features[stage], expected[name]), stage


@pytest.mark.parametrize("size", [(64, 64), (28, 28), (96, 96), (100, 140)])
def test_features_are_those_of_torchvision(size: tuple[int, int]) -> None:
    """Maps of one window or of several, padded or not: at 64 pixels res5 is one window, at 28 it is padded to one."""
    state = source_state("torchvision")
    ours = build_backbone(swin_cfg()).eval()
    ours.load_state_dict(swin_to_detectron2(state, "torchvision"), strict=False)
    theirs = TorchvisionSwin(state, ARCH).eval()
    for name in ("norm0", "norm1", "norm2"):
        setattr(ours, name, nn.Identity())
    with torch.no_grad():
        features, expected = ours.double()(noise(*size).double()), theirs.double()(noise(*size).double())
    for stage in STAGES:
        torch.testing.assert_close(features[stage], expected[stage], rtol=1e-9, atol=1e-9)


def test_one_window_is_not_split_as_detectron2_does() -> None:
    ours = randomize(build_backbone(swin_cfg()))
    theirs = SwinTransformer(**ARCH, drop_path_rate=0.0).eval()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        before, features, expected = ours(noise(96, 96)), ours(noise(64, 64)), theirs(noise(64, 64))
        after = ours(noise(96, 96))
    assert torch.equal(features["res4"], expected["p2"])
    assert (features["res5"] - expected["p3"]).abs().max() > 0.1
    assert torch.equal(before["res5"], after["res5"]), "the shifts are those of each input"


@pytest.mark.parametrize("size", [(64, 64), (75, 109)])
def test_outputs_have_the_declared_channels_and_strides(size: tuple[int, int]) -> None:
    backbone = build_backbone(swin_cfg("MODEL.SWIN.OUT_FEATURES", ["res3", "res5"]))
    assert backbone.size_divisibility == 32
    features = backbone(noise(*size))
    assert {k: (s.channels, s.stride) for k, s in backbone.output_shape().items()} == {
        "res3": (16, 8),
        "res5": (64, 32),
    }
    for name, shape in backbone.output_shape().items():
        assert features[name].shape == (2, shape.channels, *(-(-n // shape.stride) for n in size))
    assert [name for name, _ in backbone.named_children() if name.startswith("norm")] == ["norm1", "norm3"]


def test_feature_pyramid() -> None:
    backbone = build_backbone(swin_cfg(name="build_swin_fpn_backbone"))
    assert backbone.size_divisibility == 32 and list(backbone.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
    assert [tuple(x.shape[1:]) for x in backbone(noise(64, 96)).values()] == [
        (8, 16, 24), (8, 8, 12), (8, 4, 6), (8, 2, 3), (8, 1, 2),
    ]  # fmt: skip


def test_default_config_is_swin_t() -> None:
    cfg = swin_cfg("MODEL.SWIN.EMBED_DIM", 96, "MODEL.SWIN.DEPTHS", (2, 2, 6, 2), "MODEL.SWIN.WINDOW_SIZE", 7)
    cfg.merge_from_list(["MODEL.SWIN.NUM_HEADS", (3, 6, 12, 24), "MODEL.SWIN.OUT_FEATURES", ("res5",)])
    assert sum(p.numel() for p in build_backbone(cfg).parameters()) == 27_519_354


# ----------------------------------------------------------------------------------------------- stochastic depth


def test_stochastic_depth_grows_linearly_and_follows_torchs_generator() -> None:
    backbone = randomize(build_backbone(swin_cfg("MODEL.SWIN.DROP_PATH_RATE", 0.6)))
    paths = [block.drop_path for layer in backbone.layers for block in layer.blocks]
    assert isinstance(paths[0], nn.Identity) and all(p.mode == "row" for p in paths[1:])
    assert [p.p for p in paths[1:]] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    results = []
    for training, seed in ((False, 0), (False, 1), (True, 0), (True, 0), (True, 1)):
        torch.manual_seed(seed)
        results.append(backbone.train(training)(noise(64, 64))["res5"])
    assert torch.equal(results[0], results[1]) and torch.equal(results[2], results[3])
    assert not torch.equal(results[2], results[4]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("freeze_at", range(6))
def test_frozen_stages_keep_their_weights_and_are_always_complete(freeze_at: int) -> None:
    opts = ["MODEL.BACKBONE.FREEZE_AT", freeze_at, "MODEL.SWIN.DROP_PATH_RATE", 0.5]
    backbone = randomize(build_backbone(swin_cfg(*opts))).train()
    learning: dict[str, set[bool]] = {}
    for name, p in backbone.named_parameters():
        part = re.match(r"patch_embed|layers\.\d|norm\d", name)
        learning.setdefault(part[0] if part else name, set()).add(p.requires_grad)
    parts = [["patch_embed"], *([f"layers.{i}", f"norm{i}"] for i in range(4))]
    assert learning == {name: {i >= freeze_at} for i, names in enumerate(parts) for name in names}
    torch.manual_seed(0)
    first, second = backbone(noise(64, 64, n=16)), backbone(noise(64, 64, n=16))
    equal = [torch.equal(first[stage], second[stage]) for stage in STAGES]
    # The one block of res2 is never left out.
    assert equal == [i < max(freeze_at - 1, 1) for i in range(4)]


# -------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.SWIN.DEPTHS", (2, 2, 6)], r"MODEL\.SWIN\.DEPTHS is \(2, 2, 6\); it must be four positive"),
        (["MODEL.SWIN.NUM_HEADS", (1, 2, 0, 8)], r"MODEL\.SWIN\.NUM_HEADS is \(1, 2, 0, 8\)"),
        (["MODEL.SWIN.NUM_HEADS", (3, 6, 12, 24)], r"MODEL\.SWIN\.EMBED_DIM is 8; NUM_HEADS \(3, 6, 12, 24\) must"),
        (["MODEL.SWIN.WINDOW_SIZE", 1], r"MODEL\.SWIN\.WINDOW_SIZE is 1; it must be at least 2"),
        (["MODEL.SWIN.DROP_PATH_RATE", 1.0], r"MODEL\.SWIN\.DROP_PATH_RATE is 1\.0"),
        (["MODEL.SWIN.OUT_FEATURES", ("p3",)], r"MODEL\.SWIN\.OUT_FEATURES is \['p3'\]; .*'res5'"),
        (["MODEL.SWIN.OUT_FEATURES", ()], r"MODEL\.SWIN\.OUT_FEATURES is \[\]"),
        (["MODEL.BACKBONE.FREEZE_AT", 6], r"MODEL\.BACKBONE\.FREEZE_AT is 6; it must be 0 to 5"),
    ],
)
def test_wrong_settings_name_their_key(opts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(swin_cfg(*opts))


# --------------------------------------------------------------------------------------------------- pretraining


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return build_model(semcl_cfg(*PRETRAIN_OPTS, config="configs/pretrain/Base-SemCL-Swin.yaml")).train()


def test_every_parameter_of_the_student_learns(model: nn.Module) -> None:
    """Data-parallel training would wait for the ones that do not."""
    loss = model(semcl_batch())["loss_pair"]
    loss.backward()
    without = [n for n, p in model.student.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert torch.isfinite(loss) and without == []
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())


def test_memory_format_does_not_change_features(model: nn.Module) -> None:
    backbone = copy.deepcopy(model.student.backbone).eval()
    images = noise(64, 64)
    with torch.no_grad():
        last = backbone(images.contiguous(memory_format=torch.channels_last))["res5"]
        first = backbone.to(memory_format=torch.contiguous_format)(images)["res5"]
        with torch.autocast("cpu", torch.bfloat16):
            coarse = backbone(images)["res5"]
    torch.testing.assert_close(last, first, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(coarse.float(), first, rtol=0.1, atol=0.1)


def test_a_copy_computes_and_learns_on_its_own(model: nn.Module) -> None:
    """The teacher is a copy of the student."""
    source = copy.deepcopy(model.student.backbone).eval()
    twin = copy.deepcopy(source)
    images = noise(64, 64)
    with torch.no_grad():
        expected = source(images)["res5"]
        for p in twin.parameters():
            p.add_(1)
        assert torch.equal(source(images)["res5"], expected) and not torch.equal(twin(images)["res5"], expected)


def test_resumed_run_with_stochastic_depth_equals_the_uninterrupted_one(tmp_path: Path, catalog: None) -> None:
    register_pairs("tiny_pairs", write_labelled(tmp_path / "data"))
    opts = [*PRETRAIN_OPTS, "MODEL.SWIN.DROP_PATH_RATE", 0.5, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2]
    whole = train(semcl_run_cfg(tmp_path / "whole", *opts))
    first = train(semcl_run_cfg(tmp_path / "parts", *opts), kill_before=3)
    second = train(semcl_run_cfg(tmp_path / "parts", *opts), resume=True, seed=12345)
    assert list(second) == [2, 3] and {**first, **second} == whole
    assert_identical(final_checkpoint(tmp_path / "parts"), final_checkpoint(tmp_path / "whole"))


@pytest.mark.parametrize(("bias_decay", "expected"), [(None, 0.05), (0.0, 0.0)])
def test_biases_of_the_attention_decay_as_biases(bias_decay: float | None, expected: float) -> None:
    cfg = swin_cfg("SOLVER.OPTIMIZER", "ADAMW", "SOLVER.WEIGHT_DECAY", 0.05)
    cfg.SOLVER.WEIGHT_DECAY_BIAS = bias_decay
    backbone = SwinBackbone(**ARCH)
    groups = build_optimizer(cfg, backbone).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    attention = backbone.layers[0].blocks[0].attn
    assert decay[id(attention.relative_position_bias_table)] == decay[id(attention.qkv.bias)] == expected
    assert decay[id(attention.qkv.weight)] == 0.05


def test_detector_trains(tmp_path: Path) -> None:
    opts = ["MODEL.BACKBONE.NAME", "build_swin_fpn_backbone", *SWIN_OPTS, "MODEL.SWIN.DROP_PATH_RATE", 0.2]
    opts += ["SOLVER.OPTIMIZER", "ADAMW", "SOLVER.BASE_LR", 1e-4, "SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 1]
    losses = train(finetune_cfg(tmp_path, *opts))
    assert list(losses) == [0, 1] and all(0 < x["total_loss"] < 20 for x in losses.values())
    state = final_checkpoint(tmp_path)["model"]
    assert not torch.equal(state["backbone.bottom_up.norm0.weight"], torch.ones(8)), "it learns, from its neutral start"
