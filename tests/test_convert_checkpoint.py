"""tools/convert_checkpoint.py: what it writes, that the networks are equal, that it notices when they are not."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_resnet_backbone
from PIL import Image
from tiny_slotcon import tiny_cfg, tiny_model
from torch import nn

from d2_objssl import weight_conversion
from d2_objssl.checkpoint import (
    ObjSSLCheckpointer,
    checkpoint_metadata,
    file_sha256,
    from_detectron2,
    load_checkpoint,
    to_detectron2,
    write_checkpoint,
)
from d2_objssl.config import add_objssl_config
from d2_objssl.weight_comparison import read_inputs


@pytest.fixture
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("convert_checkpoint")


def make_cfg(depth: int = 18, **resnet: Any) -> CfgNode:
    """A pretraining config."""
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "ObjectSSL"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.INPUT.FORMAT = "RGB"
    keys = {"DEPTH": depth, "NORM": "SyncBN", "STRIDE_IN_1X1": False, "RES2_OUT_CHANNELS": 64 if depth < 50 else 256}
    cfg.MODEL.RESNETS.update(CfgNode(keys | resnet))
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    return cfg


def randomize(model: nn.Module) -> nn.Module:
    """Give every parameter and statistic a value of its own, such that features neither vanish nor grow."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if value.ndim == 1:
            value.uniform_(0.5, 1.5, generator=generator)
        if name.endswith(("running_mean", "bias")):
            value.sub_(1)
    return model


@pytest.fixture(scope="module")
def pretraining_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of SlotCon with a ResNet-18, in the memory format of training."""
    cfg = make_cfg()
    backbone = randomize(build_resnet_backbone(cfg, ShapeSpec(channels=3)))
    state = {}
    for factor, branch in ((1.0, "student"), (1.1, "teacher")):
        state[f"{branch}.embedder.weight"] = torch.ones(2)
        for name, value in backbone.state_dict().items():
            scaled = value * factor if value.is_floating_point() else value
            state[f"{branch}.backbone.{name}"] = (
                scaled.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else scaled
            )
    path = tmp_path_factory.mktemp("pretraining") / "model_final.pth"
    write_checkpoint({"model": state, "d2_objssl": checkpoint_metadata(cfg), "iteration": 9}, path)
    return path


@pytest.fixture
def small_picture(tmp_path: Path) -> str:
    """A picture that deep networks are fast on."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    return str(tmp_path / "small.png")


def check_stages(output: str) -> None:
    """All four stages were compared, and no feature differs at all."""
    assert re.findall(r"^(res\d) .* 0 .* yes$", output, re.MULTILINE) == ["res2", "res3", "res4", "res5"]


def test_resnet50_of_torchvision_becomes_the_same_network(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = randomize(torchvision.models.resnet50())
    state = {f"module.encoder_q.{name}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth.tar")
    output = tmp_path / "b.pkl"
    assert tool.main([str(tmp_path / "a.pth.tar"), str(output), "--verify"]) == 0
    printed = capsys.readouterr().out
    check_stages(printed)
    assert "ResNet-50" in printed and file_sha256(output) in printed and '"encoder_q."' in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth.tar", "b.pkl"]

    content = load_checkpoint(output)
    expected = {key: value for key, value in source.state_dict().items() if not key.startswith("fc.")}
    written = {name: torch.as_tensor(value) for name, value in from_detectron2(content["model"]).items()}
    assert written.keys() == expected.keys() and all(torch.equal(written[name], expected[name]) for name in expected)
    assert content["d2_objssl"]["input_contract"] == {
        "format": "RGB",
        "stride_in_1x1": False,
        "padding": "symmetric",
        "pixel_mean": [123.675, 116.28, 103.53],
        "pixel_std": [58.395, 57.12, 57.375],
        "depth": 50,
        "num_groups": 1,
        "width_per_group": 64,
        "res2_out_channels": 256,
        "stem_out_channels": 64,
    }


def test_written_files_need_nothing_of_this_package(tool: ModuleType, tmp_path: Path, pretraining_file: Path) -> None:
    for name in ("a.pkl", "a.pth"):
        assert tool.main([str(pretraining_file), str(tmp_path / name)]) == 0
    content = pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert content["__author__"] == "d2_objssl" and content["matching_heuristics"] is True
    assert all(type(value) is np.ndarray and value.flags.c_contiguous for value in content["model"].values())
    tensors = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    assert all(value.is_contiguous() for value in tensors.values())
    assert (tmp_path / "a.pth").stat().st_size < 1.05 * sum(value.nbytes for value in tensors.values())

    model = nn.Module()  # as a detector has it
    model.backbone = nn.Module()
    model.backbone.bottom_up = build_resnet_backbone(make_cfg(NORM="BN"), ShapeSpec(channels=3))
    DetectionCheckpointer(model).load(str(tmp_path / "a.pkl"))
    loaded = {name.removeprefix("backbone.bottom_up."): value for name, value in model.state_dict().items()}
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(("branch", "taken"), [(None, "teacher"), ("student", "student")])
def test_branch_of_a_pretraining_checkpoint(
    tool: ModuleType,
    tmp_path: Path,
    pretraining_file: Path,
    capsys: pytest.CaptureFixture,
    branch: str | None,
    taken: str,
) -> None:
    arguments = [str(pretraining_file), str(tmp_path / "b.pkl"), "--verify"] + (["--branch", branch] if branch else [])
    assert tool.main(arguments) == 0
    check_stages(capsys.readouterr().out)
    content, source = load_checkpoint(tmp_path / "b.pkl"), load_checkpoint(pretraining_file)
    weight = content["model"]["res2.0.conv1.weight"]
    assert np.array_equal(weight, source["model"][f"{taken}.backbone.res2.0.conv1.weight"])
    metadata = content["d2_objssl"]
    assert (metadata["method"], metadata["export_branch"]) == ("SlotCon", taken)
    assert metadata["input_contract"] == source["d2_objssl"]["input_contract"]
    source_of = {"file": "model_final.pth", "layout": "d2_objssl", "prefix": f"{taken}.backbone."}
    source_of |= {"project": "SlotCon of this package"}
    assert metadata["source"] == source_of | {"padding": "symmetric"}


@pytest.mark.parametrize("export_branch", ["student", "teacher"])
def test_exported_branch_is_the_one_that_the_run_was_configured_for(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, export_branch: str
) -> None:
    """SlotCon is known for its teacher, DetCon and CYBORGS for their student."""
    options = ["MODEL.SSL.EXPORT_BRANCH", export_branch]
    model, cfg = tiny_model(*options), tiny_cfg(*options)
    randomize(model.student)
    ObjSSLCheckpointer(model, str(tmp_path), metadata=checkpoint_metadata(cfg)).save("model_final")
    assert tool.main([str(tmp_path / "model_final.pth"), str(tmp_path / "b.pkl"), "--verify"]) == 0
    check_stages(capsys.readouterr().out)
    content = load_checkpoint(tmp_path / "b.pkl")
    expected = getattr(model, export_branch).backbone.state_dict()
    assert content["model"].keys() == expected.keys()
    assert all(np.array_equal(content["model"][name], value) for name, value in expected.items())
    assert content["d2_objssl"]["export_branch"] == export_branch


NARROW = {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 16, "WIDTH_PER_GROUP": 4}


@pytest.mark.parametrize(
    ("depth", "resnet", "widths"),
    [
        (101, NARROW, (4, 16, 8)),
        (152, NARROW | {"WIDTH_MULTIPLIER": 2}, (8, 32, 16)),
        (200, NARROW | {"PADDING": "same"}, (4, 16, 8)),
        pytest.param(18, {"WIDTH_MULTIPLIER": 2}, (128, 128, 128), marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_deep_and_wide_resnets_of_this_package(
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    small_picture: str,
    depth: int,
    resnet: dict[str, Any],
    widths: tuple[int, ...],
) -> None:
    cfg = make_cfg(depth, **resnet)
    cfg.MODEL.BACKBONE.NAME = "build_objssl_resnet_backbone"
    state = {f"student.backbone.{k}": v for k, v in randomize(build_backbone(cfg)).state_dict().items()}
    write_checkpoint({"model": state, "d2_objssl": checkpoint_metadata(cfg)}, tmp_path / "a.pth")
    assert tool.main([str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), "--verify", "--image", small_picture]) == 0
    printed = capsys.readouterr().out
    check_stages(printed)
    assert f"ResNet-{depth}" in printed
    contract = load_checkpoint(tmp_path / "b.pth")["d2_objssl"]["input_contract"]
    assert contract == checkpoint_metadata(cfg)["input_contract"] and contract["depth"] == depth
    assert tuple(contract[k] for k in ("width_per_group", "res2_out_channels", "stem_out_channels")) == widths
    if "PADDING" not in resnet:  # there are the names, but no such network
        arguments = [str(tmp_path / "a.pth"), str(tmp_path / "c.pth"), "--to", "torchvision"]
        assert tool.main(arguments) == 0
        assert tool.main([*arguments, "--verify"]) == 2
        assert f"torchvision has no ResNet-{depth} of {widths[2]} channels in the stem" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("depth", "widths"), [(101, {"groups": 4, "width_per_group": 4}), (152, {"width_per_group": 8})]
)
@pytest.mark.slow
def test_deep_resnets_of_torchvision(
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    small_picture: str,
    depth: int,
    widths: dict[str, int],
) -> None:
    source = randomize(getattr(torchvision.models, f"resnet{depth}")(**widths))
    torch.save(source.state_dict(), tmp_path / "a.pth")
    assert tool.main([str(tmp_path / "a.pth"), str(tmp_path / "b.pkl"), "--verify", "--image", small_picture]) == 0
    printed = capsys.readouterr().out
    check_stages(printed)
    assert f"ResNet-{depth}" in printed
    contract = load_checkpoint(tmp_path / "b.pkl")["d2_objssl"]["input_contract"]
    assert (contract["depth"], contract["num_groups"]) == (depth, widths.get("groups", 1))
    assert contract["width_per_group"] == widths["width_per_group"]


@pytest.mark.parametrize("spelling", ["same", "dots", "link", "link to the folder"])
def test_the_input_is_not_overwritten(
    tool: ModuleType, tmp_path: Path, pretraining_file: Path, capsys: pytest.CaptureFixture, spelling: str
) -> None:
    (tmp_path / "runs").mkdir()
    source = tmp_path / "runs" / "a.pth"
    content = pretraining_file.read_bytes()
    source.write_bytes(content)
    (tmp_path / "link.pth").symlink_to(source)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    output = {"same": "runs/a.pth", "dots": "runs/../runs/a.pth", "link": "link.pth"}.get(spelling, "link/a.pth")
    assert tool.main([str(source), f"{tmp_path}/{output}"]) == 2
    assert "is the file INPUT" in capsys.readouterr().err
    assert source.read_bytes() == content and (tmp_path / "link.pth").is_symlink()


def test_conversion_is_reversible(
    tool: ModuleType, tmp_path: Path, pretraining_file: Path, capsys: pytest.CaptureFixture
) -> None:
    there, back = tmp_path / "there.pth", tmp_path / "back.pth"
    assert tool.main([str(pretraining_file), str(there), "--to", "torchvision", "--verify"]) == 0
    check_stages(capsys.readouterr().out)
    written = torch.load(there, weights_only=True)
    assert "matching_heuristics" not in written
    missing, unexpected = torchvision.models.resnet18().load_state_dict(written["model"], strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])

    assert tool.main([str(there), str(back), "--verify"]) == 0
    check_stages(capsys.readouterr().out)
    expected = to_detectron2(load_checkpoint(pretraining_file))
    actual = load_checkpoint(back)["model"]
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


def test_verify_notices_a_wrong_network(
    tool: ModuleType,
    tmp_path: Path,
    pretraining_file: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exchange(*args: Any, **kwargs: Any) -> dict[str, Any]:
        bare = to_detectron2(*args, **kwargs)
        a, b = "res4.0.conv1.norm.bias", "res4.0.conv2.norm.bias"
        return bare | {a: bare[b], b: bare[a]}

    monkeypatch.setattr(weight_conversion, "to_detectron2", exchange)
    assert tool.main([str(pretraining_file), str(tmp_path / "b.pkl"), "--verify"]) == 1
    assert re.findall(r"^res\d .*(yes|NO)$", capsys.readouterr().out, re.MULTILINE) == ["yes", "yes", "NO", "NO"]


def test_verify_on_a_picture(
    tool: ModuleType, tmp_path: Path, pretraining_file: Path, capsys: pytest.CaptureFixture
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    arguments = [str(pretraining_file), str(tmp_path / "b.pkl"), "--verify", "--image", str(tmp_path / "a.png")]
    assert tool.main(arguments) == 0
    printed = capsys.readouterr().out
    check_stages(printed)
    assert "(64, 10, 18)" in printed
    contract = load_checkpoint(tmp_path / "b.pkl")["d2_objssl"]["input_contract"]
    expected = (pixels.astype(np.float32) - contract["pixel_mean"]) / contract["pixel_std"]
    (image,) = read_inputs(str(tmp_path / "a.png"), contract)
    np.testing.assert_allclose(image[0].permute(1, 2, 0), expected, rtol=1e-5, atol=1e-5)


def test_networks_that_stride_elsewhere_do_not_become_torchvision(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    narrow = {"STEM_OUT_CHANNELS": 64, "RES2_OUT_CHANNELS": 256, "WIDTH_PER_GROUP": 4, "STRIDE_IN_1X1": True}
    cfg = make_cfg(50, **narrow)
    backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3)).state_dict()
    torch.save({"model": backbone, "d2_objssl": checkpoint_metadata(cfg)}, tmp_path / "a.pth")
    assert tool.main([str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), "--to", "timm"]) == 2
    assert "strides in its 1x1" in capsys.readouterr().err and not (tmp_path / "b.pth").exists()
    assert tool.main([str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), "--verify"]) == 0
    assert load_checkpoint(tmp_path / "b.pth")["d2_objssl"]["input_contract"]["stride_in_1x1"] is True


def test_contract_comes_from_a_config_file_where_the_input_has_none(tool: ModuleType, tmp_path: Path) -> None:
    torch.save(build_resnet_backbone(make_cfg(), ShapeSpec(channels=3)).state_dict(), tmp_path / "a.pth")
    (tmp_path / "a.yaml").write_text("INPUT: {FORMAT: BGR}\nMODEL: {PIXEL_STD: [1.0, 2.0, 3.0]}\n")
    arguments = [str(tmp_path / "a.pth"), str(tmp_path / "b.pth")]
    assert tool.main(arguments) == 0
    assert "format" not in load_checkpoint(tmp_path / "b.pth")["d2_objssl"]["input_contract"]
    assert tool.main([*arguments, "--config-file", str(tmp_path / "a.yaml")]) == 0
    contract = load_checkpoint(tmp_path / "b.pth")["d2_objssl"]["input_contract"]
    assert (contract["format"], contract["pixel_std"], contract["depth"]) == ("BGR", [1.0, 2.0, 3.0], 18)


@pytest.mark.parametrize(
    ("names", "arguments", "message"),
    [
        ([], [], r"a\.pth: no such file"),
        (["w"], [], "unknown layout of weights"),
        (["stem.conv1.weight", "res2.0.conv1.weight"], [], "no ResNet"),
        (["conv1.weight", "layer1.0.conv1.weight"], ["--branch", "teacher"], "teacher is asked for"),
    ],
)
def test_files_that_cannot_be_converted(
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    names: list[str],
    arguments: list[str],
    message: str,
) -> None:
    if names:
        torch.save({name: torch.ones(1) for name in names}, tmp_path / "a.pth")
    assert tool.main([str(tmp_path / "a.pth"), str(tmp_path / "b.pkl"), *arguments]) == 2
    assert re.search(f"^error: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "b.pkl").exists()


def test_output_that_cannot_be_written(
    tool: ModuleType, tmp_path: Path, pretraining_file: Path, capsys: pytest.CaptureFixture
) -> None:
    assert tool.main([str(pretraining_file), str(tmp_path / "b.bin")]) == 2
    assert "must end in .pth or .pkl" in capsys.readouterr().err
    assert tool.main([str(pretraining_file), str(tmp_path / "no" / "b.pkl")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


def test_help_has_an_example(tool: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        tool.main(["--help"])
    assert caught.value.code == 0
    assert "convert_checkpoint.py output/model_final.pth slotcon_r50.pkl --verify" in capsys.readouterr().out
