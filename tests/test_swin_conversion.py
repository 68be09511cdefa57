"""Weights of Swin Transformers: names of every package, the same features, what a run loads and what it refuses."""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import FPN, SwinTransformer, build_backbone, build_model
from tiny_runs import finetune_cfg
from tiny_semcl import semcl_cfg, semcl_model
from tiny_swin import ARCH, SWIN_OPTS, microsofts, randomize, source_state, swin_cfg
from torch import Tensor, nn

from d2_objssl.checkpoint import (
    CheckpointError,
    ObjSSLCheckpointer,
    backbone_keys,
    backbone_prefix,
    checkpoint_metadata,
    detect_layout,
    from_detectron2,
    input_contract,
    load_checkpoint,
    to_detectron2,
    write_checkpoint,
)
from d2_objssl.weight_conversion import Conversion
from d2_objssl.weight_names_swin import infer_swin

PACKAGES = ["torchvision", "timm", "timm features", "swin"]
PRETRAIN_OPTS = ["MODEL.BACKBONE.NAME", "build_swin_backbone", *SWIN_OPTS, "MODEL.SWIN.OUT_FEATURES", ("res5",)]
DETECTOR_OPTS = [
    *("MODEL.BACKBONE.NAME", "build_swin_fpn_backbone", *SWIN_OPTS),
    *("MODEL.BACKBONE.FREEZE_AT", 0, "INPUT.FORMAT", "RGB", "MODEL.FPN.OUT_CHANNELS", 8),
]  # fmt: skip


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("convert_checkpoint")


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    generator = torch.Generator().manual_seed(0)
    torchvision.io.write_png(torch.randint(0, 256, (3, 40, 70), generator=generator, dtype=torch.uint8), str(path))
    return str(path)


def bare_state() -> dict[str, Tensor]:
    """A network with Detectron2's names and all four outputs."""
    return randomize(build_backbone(swin_cfg())).state_dict()


def wrap(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def load(model: nn.Module, path: Path, cfg: Any = None, **kwargs: Any) -> None:
    metadata = None if cfg is None else checkpoint_metadata(cfg)
    ObjSSLCheckpointer(model, metadata=metadata).load(str(path), checkpointables=[], **kwargs)


def assert_holds(model: nn.Module, bare: dict[str, Tensor]) -> None:
    """The backbone has the weights `bare`; what these do not have is as at the start."""
    for name, value in model.state_dict().items():
        if name in bare:
            assert torch.equal(value, bare[name]), name
        elif not name.endswith("relative_position_index"):
            assert re.fullmatch(r"norm[012]\.(weight|bias)", name)
            assert torch.equal(value, torch.full_like(value, name.endswith("weight"))), name


# --------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("prefix", ["", "module.base_encoder.", "somebody.elses."])
def test_every_weight_gets_the_name_and_shape_of_detectron2(package: str, prefix: str) -> None:
    state = wrap(source_state(package), prefix)
    assert detect_layout(state) == package.split()[0]
    assert backbone_prefix(state) == prefix.removeprefix("module.")
    converted = to_detectron2(state)
    expected = {k: v.shape for k, v in bare_state().items() if not re.match(r"norm[012]\.|.*_index", k)}
    if package == "timm features":
        expected = {k: shape for k, shape in expected.items() if not k.startswith("norm")}
    assert {k: v.shape for k, v in converted.items()} == expected
    assert all(any(value is v for v in state.values()) for value in converted.values())


@pytest.mark.parametrize("layout", ["torchvision", "timm"])
def test_way_there_and_back_is_the_identity(layout: str) -> None:
    state = source_state(layout)
    back = from_detectron2(to_detectron2(state, layout), layout)
    kept = {k: v for k, v in state.items() if not k.startswith("head.") and not k.endswith("_index")}
    assert back.keys() == kept.keys() and all(back[name] is kept[name] for name in kept)
    assert detect_layout(back) == layout


def test_layout_timm_fits_all_that_timm_ever_wrote() -> None:
    new, old = source_state("timm"), source_state("swin")
    assert to_detectron2(new, "timm").keys() == to_detectron2(old, "timm").keys() == to_detectron2(old, "swin").keys()
    resnet = torchvision.models.resnet18().state_dict()
    assert to_detectron2(resnet, "timm").keys() == to_detectron2(resnet, "torchvision").keys()


def test_detectron2s_and_microsofts_names_differ_by_the_last_normalisation() -> None:
    bare = bare_state()
    assert detect_layout(bare) == detect_layout(wrap(bare, "backbone.bottom_up.")) == "detectron2"
    microsoft = {k.replace("norm3.", "norm."): v for k, v in bare.items() if not re.match(r"norm[012]\.", k)}
    assert detect_layout(microsoft) == "swin"
    pretraining = {k: v for k, v in wrap(bare, "student.backbone.").items() if not re.search(r"\.norm[012]\.", k)}
    assert detect_layout(pretraining) == "d2_objssl"
    assert detect_layout(wrap(microsoft, "student.backbone.")) == "swin"  # DINO's prefixes


def test_networks_of_a_moco_file(tmp_path: Path) -> None:
    """SemCL's own files: a student with its projector as classifier, a teacher, a predictor."""
    student = source_state("torchvision")
    teacher = {name: value + 1 for name, value in student.items()}
    state = wrap(student, "module.base_encoder.") | wrap(teacher, "module.momentum_encoder.")
    state["module.predictor.0.weight"] = torch.ones(2)
    for branch, expected in ((None, student), ("student", student), ("teacher", teacher)):
        converted = to_detectron2({"state_dict": state}, branch=branch)
        assert torch.equal(converted["norm3.weight"], expected["norm.weight"])


@pytest.mark.parametrize(
    ("extra", "layout", "message"),
    [
        ("absolute_pos_embed", "swin", "absolute_pos_embed.*no name in Detectron2"),
        ("layers.0.blocks.0.attn.logit_scale.weight", "swin", "logit_scale.*another kind of network"),
        ("features.1.0.se.weight", "torchvision", r"features\.1\.0\.se\.weight.*no name"),
    ],
)
def test_names_that_cannot_be_converted_are_reported(extra: str, layout: str, message: str) -> None:
    state = source_state(layout) | {extra: torch.ones(1)}
    with pytest.raises(ValueError, match=message):
        to_detectron2(state)
    for target in ("torchvision", "timm"):
        with pytest.raises(ValueError, match=rf"layers\.0\.other\.weight.*no name in {target}"):
            from_detectron2(bare_state() | {"layers.0.other.weight": torch.ones(1)}, target)


def test_version_2_is_another_network() -> None:
    arch = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": [2, 2]}
    block = torchvision.models.swin_transformer.SwinTransformerBlockV2
    net = torchvision.models.swin_transformer.SwinTransformer(patch_size=[4, 4], block=block, **arch)
    with pytest.raises(ValueError, match="unknown layout"):
        detect_layout(net.state_dict())


def test_architecture_is_read_off_the_shapes() -> None:
    bare = bare_state()
    assert infer_swin(bare) == ARCH
    with pytest.raises(ValueError, match=r"there is no layers\.3\.blocks\.0"):
        infer_swin({name: value for name, value in bare.items() if not name.startswith("layers.3")})
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    with pytest.raises(ValueError, match="square windows: 15 relative"):
        infer_swin(bare | {table: torch.zeros(15, 1)})


# -------------------------------------------------------------------------------------------------------- the tool


def check_stages(output: str) -> None:
    """All four stages were compared, and are equal."""
    assert re.findall(r"^(res\d) .* yes$", output, re.MULTILINE) == ["res2", "res3", "res4", "res5"], output


@pytest.mark.parametrize("package", ["torchvision", "timm", "swin"])
def test_tool_converts_and_compares(
    tool: ModuleType, tmp_path: Path, picture: str, package: str, capsys: pytest.CaptureFixture
) -> None:
    torch.save({"model": source_state(package)}, tmp_path / "a.pth")
    output = tmp_path / "a.pkl"
    assert tool.main([str(tmp_path / "a.pth"), str(output), "--verify", "--image", picture]) == 0
    printed = capsys.readouterr().out
    check_stages(printed)
    assert "Swin Transformer of 8 channels and 1-2-2-2 blocks" in printed and f"{package} names" in printed
    content = load_checkpoint(output)
    assert len(content["model"]) == len(to_detectron2(source_state(package)))
    statistics = {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.395, 57.12, 57.375]}
    assert content["d2_objssl"]["input_contract"] == {"format": "RGB", **statistics, **ARCH}


@pytest.mark.parametrize("target", ["torchvision", "timm"])
def test_tool_exports_a_detector(tool: ModuleType, tmp_path: Path, target: str, capsys: pytest.CaptureFixture) -> None:
    if target == "timm":
        pytest.importorskip("timm")
    state = wrap(bare_state(), "backbone.bottom_up.") | {"roi_heads.box_head.fc1.weight": torch.ones(2)}
    torch.save({"model": state}, tmp_path / "a.pth")
    assert tool.main([str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), "--to", target, "--verify"]) == 0
    check_stages(capsys.readouterr().out)
    written = load_checkpoint(tmp_path / "b.pth")["model"]
    assert detect_layout(written) == target
    strangers = source_state(target)
    assert {k for k in strangers if k not in written} == {
        k for k in strangers if k.startswith("head.") or k.endswith("relative_position_index")
    }


def test_tool_exports_a_pretraining_run(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = semcl_model(*PRETRAIN_OPTS)
    metadata = checkpoint_metadata(semcl_cfg(*PRETRAIN_OPTS))
    write_checkpoint({"model": model.state_dict(), "d2_objssl": metadata}, tmp_path / "a.pth")
    for target in ("detectron2", "torchvision"):
        assert tool.main([str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), "--to", target, "--verify"]) == 0
        check_stages(capsys.readouterr().out)
        assert load_checkpoint(tmp_path / "b.pth")["d2_objssl"]["export_branch"] == "student"


def test_tool_notices_other_weights(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The comparison fails if the four quarters of a merged cell were taken in another order."""
    torch.save(source_state("torchvision"), tmp_path / "a.pth")
    write = tool.write_conversion

    def swap_quarters(conversion: Conversion, path: str) -> int:
        weight = conversion.backbone["layers.2.downsample.reduction.weight"]
        swapped = torch.cat([weight.chunk(4, dim=1)[i] for i in (0, 2, 1, 3)], dim=1)
        backbone = {**conversion.backbone, "layers.2.downsample.reduction.weight": swapped}
        return write(dataclasses.replace(conversion, backbone=backbone), path)

    monkeypatch.setattr(tool, "write_conversion", swap_quarters)
    assert tool.main([str(tmp_path / "a.pth"), str(tmp_path / "b.pkl"), "--verify"]) == 1
    verdicts = re.findall(r"^(res\d) .* (yes|NO)$", capsys.readouterr().out, re.MULTILINE)
    assert verdicts == [("res2", "yes"), ("res3", "yes"), ("res4", "yes"), ("res5", "NO")]


def test_tool_without_timm(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    bare = bare_state()
    torch.save(
        {k.replace("norm3.", "norm."): v for k, v in bare.items() if not re.match(r"norm[012]\.", k)},
        tmp_path / "a.pth",
    )
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models", None)
    paths = [str(tmp_path / "a.pth"), str(tmp_path / "b.pkl")]
    for options in (["--verify"], ["--verify", "--to", "timm"]):
        assert tool.main([*paths, *options]) == 2
        assert "needs the package timm (pip install timm)" in capsys.readouterr().err
        assert not (tmp_path / "b.pkl").exists()
    assert tool.main(paths) == 0 and tool.main([*paths, "--to", "torchvision"]) == 0


def test_tool_knows_no_padding_of_swin_transformers(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save(source_state("torchvision"), tmp_path / "a.pth")
    assert tool.main([str(tmp_path / "a.pth"), str(tmp_path / "b.pkl"), "--padding", "same"]) == 2
    assert "--padding is for ResNets" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("package", ["torchvision", "timm", "swin", "detectron2"])
def test_pretraining_starts_from_a_file_of_any_package(tmp_path: Path, package: str, caplog: Any) -> None:
    """Student and teacher both; Microsoft's classification files as they are."""
    state = bare_state() if package == "detectron2" else source_state(package)
    torch.save({"model": state}, tmp_path / "a.pth")
    model = semcl_model(*PRETRAIN_OPTS)
    with caplog.at_level(logging.INFO):
        load(model, tmp_path / "a.pth", semcl_cfg(*PRETRAIN_OPTS))
    bare = to_detectron2(state)
    for branch in (model.student, model.teacher):
        assert_holds(branch.backbone, bare)
        assert torch.equal(branch.backbone.norm3.weight, bare["norm3.weight"])
    num = 2 * len(backbone_keys(model.student))
    assert f"{num} of {num} parameters and statistics of the backbone were loaded" in caplog.text


@pytest.mark.parametrize("package", ["torchvision", "swin", "detectron2", "pretraining"])
def test_detector_starts_from_a_file_of_any_package(tmp_path: Path, package: str) -> None:
    if package == "pretraining":
        source = semcl_model(*PRETRAIN_OPTS)
        randomize(source)
        content: dict[str, Any] = {"model": source.state_dict(), "d2_objssl": {"export_branch": "student"}}
        bare = source.student.backbone.state_dict()
    else:
        state = bare_state() if package == "detectron2" else source_state(package)
        content, bare = {"model": state}, to_detectron2(state)
    torch.save(content, tmp_path / "a.pth")
    cfg = finetune_cfg(tmp_path / "run", *DETECTOR_OPTS)
    model = build_model(cfg)
    load(model, tmp_path / "a.pth", cfg)
    assert_holds(model.backbone.bottom_up, bare)


def test_detectron2_itself_loads_what_the_tool_writes(tool: ModuleType, tmp_path: Path) -> None:
    torch.save(source_state("torchvision"), tmp_path / "a.pth")
    assert tool.main([str(tmp_path / "a.pth"), str(tmp_path / "a.pkl")]) == 0
    fpn = FPN(SwinTransformer(**ARCH, drop_path_rate=0.0), ["p0", "p1", "p2", "p3"], 8)
    model = nn.ModuleDict({"backbone": fpn})
    DetectionCheckpointer(model).load(str(tmp_path / "a.pkl"))
    assert_holds(fpn.bottom_up, to_detectron2(source_state("torchvision")))


def test_bare_backbone_takes_microsofts_normalisation(tmp_path: Path) -> None:
    """The stems have the same names: the file must not be taken for one of Detectron2."""
    torch.save({"model": microsofts(source_state("timm"))}, tmp_path / "a.pth")
    model = build_backbone(swin_cfg())
    load(model, tmp_path / "a.pth")
    assert_holds(model, to_detectron2(source_state("timm")))


def test_norms_of_outputs_need_no_loading_except_the_last() -> None:
    for model in (build_model(finetune_cfg(Path("x"), *DETECTOR_OPTS)), build_backbone(swin_cfg())):
        norms = [
            name for name in backbone_keys(model) if re.search(r"(^|\.)norm\d\.\w+$", name) and "layers" not in name
        ]
        assert [name.rpartition("norm")[2] for name in norms] == ["3.weight", "3.bias"]


def test_file_without_the_last_normalisation_is_refused(tmp_path: Path) -> None:
    state = {name: value for name, value in source_state("torchvision").items() if not name.startswith("norm.")}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"(?s)only (\d+) of \d+ parameters .*norm3"):
        load(semcl_model(*PRETRAIN_OPTS), tmp_path / "a.pth")


def test_file_of_another_kind_of_network_is_refused(tmp_path: Path) -> None:
    torch.save(source_state("torchvision"), tmp_path / "swin.pth")
    with pytest.raises(ValueError, match=r"No name matches|another kind of network"):
        load(semcl_model(), tmp_path / "swin.pth")
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"No name matches|another kind of network"):
        load(semcl_model(*PRETRAIN_OPTS), tmp_path / "resnet.pth")
    torch.save(source_state("torchvision") | {"features.1.0.se.weight": torch.ones(1)}, tmp_path / "se.pth")
    with pytest.raises(CheckpointError, match=r"se\.pth: .*se\.weight"):
        load(semcl_model(*PRETRAIN_OPTS), tmp_path / "se.pth")


@pytest.mark.parametrize(
    ("opts", "line"),
    [
        (["MODEL.SWIN.WINDOW_SIZE", 3], "MODEL.SWIN.WINDOW_SIZE is 3, the checkpoint was trained on 2"),
        (["MODEL.SWIN.DEPTHS", (2, 2, 2, 2)], "MODEL.SWIN.DEPTHS is [2, 2, 2, 2], the checkpoint was trained on [1, 2"),
        (["MODEL.SWIN.NUM_HEADS", (2, 2, 4, 8)], "MODEL.SWIN.NUM_HEADS is [2, 2, 4, 8], the checkpoint"),
        (["INPUT.FORMAT", "BGR"], "INPUT.FORMAT is BGR, the checkpoint was trained on RGB"),
    ],
)
def test_config_must_be_the_checkpoints(tmp_path: Path, opts: list[Any], line: str) -> None:
    cfg = swin_cfg()
    assert {key: input_contract(cfg)[key] for key in ARCH} == ARCH
    write_checkpoint({"model": bare_state(), "d2_objssl": checkpoint_metadata(cfg)}, tmp_path / "a.pth")
    other = swin_cfg(*opts)
    with pytest.raises(ValueError, match=re.escape(line)):
        load(build_backbone(other), tmp_path / "a.pth", other)
    load(build_backbone(swin_cfg()), tmp_path / "a.pth", swin_cfg())


def test_moco_v3_resnet_fills_both_branches(tmp_path: Path) -> None:
    """With the classifier's place taken by the projector, and a predictor besides."""
    source = randomize(semcl_model().student.backbone).state_dict()
    student = from_detectron2(source) | {"fc.0.weight": torch.ones(4, 4), "fc.1.running_mean": torch.ones(4)}
    state = wrap(student, "module.base_encoder.")
    state |= {name.replace("base", "momentum"): value + 1 for name, value in state.items()}
    state |= {"module.predictor.0.weight": torch.ones(4, 4)}
    torch.save({"epoch": 300, "arch": "resnet50", "state_dict": state}, tmp_path / "r-50-300ep.pth.tar")
    model = semcl_model(seed=1)
    load(model, tmp_path / "r-50-300ep.pth.tar", semcl_cfg())
    for branch in (model.student, model.teacher):
        for name, value in branch.backbone.state_dict().items():
            assert torch.equal(value, source[name]), name
