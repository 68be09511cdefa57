"""Files of other projects: recognised by their keys, converted to the same network, and written for other packages."""

from __future__ import annotations

import collections
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone
from released_layouts import LAYOUTS, bare, below, keys
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from d2_objssl.checkpoint import CheckpointError, detect_layout, load_checkpoint, to_detectron2
from d2_objssl.weight_conversion import (
    Conversion,
    describe,
    mmdetection_config,
    read_conversion,
    write_conversion,
)
from d2_objssl.weight_names import find_network, left_out_names


class NarrowResNet50(ResNet):
    """torchvision's ResNet-50 with 8 channels in the stem and 4 to 128 in its stages."""

    def __init__(self) -> None:
        with torch.device("meta"):
            super().__init__(Bottleneck, [3, 4, 6, 3])
        self.inplanes = 8
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(8)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            self._make_layer(Bottleneck, 4 * 2**i, blocks, stride=1 if i == 0 else 2)
            for i, blocks in enumerate((3, 4, 6, 3))
        )
        self.fc = nn.Linear(128, 3)

    def stages(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return [x := layer(x) for layer in (self.layer1, self.layer2, self.layer3, self.layer4)]


def make_network(seed: int) -> NarrowResNet50:
    """Every parameter and statistic has a value of its own."""
    torch.manual_seed(seed)
    net = NarrowResNet50()
    for name, value in net.state_dict().items():
        if value.ndim == 1:
            value.uniform_(0.5, 1.5)
        if name.endswith(("running_mean", "bias")):
            value.sub_(1)
    return net.double().eval()


@pytest.fixture(scope="module")
def networks() -> dict[str, NarrowResNet50]:
    return {"student": make_network(0), "teacher": make_network(1)}


@pytest.fixture(scope="module")
def target() -> nn.Module:
    """Detectron2's network for the same widths."""
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    resnets = {"DEPTH": 50, "NORM": "BN", "STRIDE_IN_1X1": False, "OUT_FEATURES": ["res2", "res3", "res4", "res5"]}
    for key, value in (resnets | {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 16, "WIDTH_PER_GROUP": 4}).items():
        cfg.MODEL.RESNETS[key] = value
    return build_resnet_backbone(cfg, ShapeSpec(channels=3)).double().eval()


def save(content: dict[str, Any], path: Path) -> None:
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(content, path)
    else:
        torch.save(content, path)


# Recognised and converted


@pytest.mark.parametrize("name", LAYOUTS)
def test_file_of_a_project_becomes_the_same_network(
    tmp_path: Path, networks: dict[str, NarrowResNet50], target: nn.Module, name: str
) -> None:
    layout = LAYOUTS[name]
    path = tmp_path / f"file{layout.suffix}"
    save(layout.content(networks["student"].state_dict(), networks["teacher"].state_dict()), path)
    content = load_checkpoint(path)
    network = find_network(content)
    assert (network.project, network.branch) == (layout.project, layout.branch)
    assert not left_out_names(content, detect_layout(content))[1]
    pixels = torch.randn(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for branch in ("student", "teacher") if layout.branch else (None,):
        target.load_state_dict(to_detectron2(content, branch=branch))
        with torch.no_grad():
            expected, actual = networks[branch or "student"].stages(pixels), list(target(pixels).values())
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    taken = to_detectron2(content)["stem.conv1.weight"]
    assert torch.equal(taken, networks[layout.branch or "student"].conv1.weight)


def test_lone_network_may_only_be_asked_for_by_its_own_branch(networks: dict[str, NarrowResNet50]) -> None:
    state = networks["student"].state_dict()
    assert find_network(below("module.encoder_k.", state)).branch == "teacher"
    assert find_network(below("backbone.", state), branch="student").branch is None
    for prefix, branch in (("encoder_k.", "student"), ("base_encoder.", "teacher"), ("backbone.", "teacher")):
        with pytest.raises(ValueError, match=f"the {branch} is asked for.*{prefix}"):
            to_detectron2(below(prefix, state), branch=branch)


def test_what_a_conversion_leaves_out_is_counted(networks: dict[str, NarrowResNet50]) -> None:
    student, teacher = (networks[branch].state_dict() for branch in ("student", "teacher"))
    content = LAYOUTS["MoCo v1 or v2"].content(student, teacher)
    content["state_dict"] |= keys("module.attention.q.weight", "module.encoder_q.se.weight")
    known, unknown = left_out_names(content, "torchvision")
    assert known == {"encoder_k": len(bare(teacher)) + 2, "fc": 2, "queue": 1, "queue_ptr": 1}
    assert unknown == {"attention": 1, "se": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (keys("trunk.0.weight", "tail.bias"), r"first of 2 keys: trunk.0.weight, tail.bias.*sequential.*SlotCon.*DINO"),
        (below("a.", keys("conv1.weight", "layer1.0.conv1.weight")), "no ResNet-18"),
        ({"student": {"epoch": 1}}, "no weights"),
    ],
)
def test_unknown_layout_is_reported_with_the_file(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"(?s)a\.pth: .*{message}"):
        read_conversion(str(tmp_path / "a.pth"))


# BYOL in JAX


def in_module(monkeypatch: pytest.MonkeyPatch, module: str, cls: Any) -> Any:
    """Let a class be pickled as one of `module`, which is gone when the file is read."""
    for i in range(1, len(parts := module.split(".")) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    setattr(sys.modules[module], cls.__name__, cls)
    cls.__module__ = module
    return cls


def byol_file(monkeypatch: pytest.MonkeyPatch, path: Path, trees: list[Any], momentum: Any = None) -> Path:
    """A pickle as DeepMind's byol/utils/checkpointing.py writes it."""
    fields = ["online_params", "target_params", "online_state", "target_state", "opt_state"]
    make_state = in_module(
        monkeypatch,
        "byol.byol_experiment",
        collections.namedtuple("_ByolExperimentState", fields),  # type: ignore[misc]
    )
    lars = in_module(monkeypatch, "byol.utils.optimizers", collections.namedtuple("ScaleByLarsState", ["mu"]))
    empty = in_module(monkeypatch, "optax._src.transform", collections.namedtuple("ScaleState", []))
    state = make_state(*trees, [lars(momentum), empty()])
    path.write_bytes(pickle.dumps({"experiment_state": state, "step": 9, "rng": np.zeros(2, np.uint32)}, protocol=2))
    for module in [name for name in sys.modules if name.split(".")[0] in ("byol", "optax")]:
        monkeypatch.delitem(sys.modules, module)
    return path


def haiku_trees(net: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and states of a network, as haiku's ResNet50 names them."""
    params: dict[str, Any] = {"projector/linear": {"w": np.ones((2, 2), np.float32)}}
    state: dict[str, Any] = {}
    for name, value in to_detectron2(net.state_dict()).items():
        array = value.float().numpy()
        *block, conv, leaf = re.fullmatch(r"(?:stem|res(\d)\.(\d+))\.(conv\d|shortcut)\.(.*)", name).groups()  # type: ignore
        kind, key = ("batchnorm", leaf.removeprefix("norm.")) if leaf.startswith("norm") else ("conv", "w")
        module = f"shortcut_{kind}" if conv == "shortcut" else f"{kind}_{int(conv[4]) - 1}"
        part = f"block_group_{int(block[0]) - 2}/~/block_{block[1]}/~/{module}" if block[0] else f"initial_{kind}"
        if key == "w":
            params[f"res_net50/~/{part}"] = {"w": array.transpose(2, 3, 1, 0)}
        elif key in ("weight", "bias"):
            leaves = params.setdefault(f"res_net50/~/{part}", {})
            leaves[{"weight": "scale", "bias": "offset"}[key]] = array.reshape(1, 1, 1, -1)
        elif key != "num_batches_tracked":
            average = {"average": array.reshape(1, 1, 1, -1), "hidden": 0 * array}
            state[f"res_net50/~/{part}/~/{key.removeprefix('running_')}_ema"] = average
    return params, state


def test_byol_of_deepmind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, networks: dict[str, NarrowResNet50]) -> None:
    (online, online_state), (other, other_state) = (haiku_trees(networks[b]) for b in ("student", "teacher"))
    content = load_checkpoint(byol_file(monkeypatch, tmp_path / "a.pkl", [online, other, online_state, other_state]))
    assert detect_layout(content) == "haiku"
    assert find_network(content) == ("online_params/", "student", "DetCon or BYOL in JAX")
    assert left_out_names(content, "haiku") == ({"projector": 1, "target_params": 1}, {})
    for branch, net in networks.items():
        converted = to_detectron2(content, branch=branch)
        expected = to_detectron2(net.state_dict())
        assert converted.keys() == {name for name in expected if not name.endswith("num_batches_tracked")}
        assert all(np.array_equal(converted[name], expected[name].float()) for name in converted)


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.parts = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


def test_code_in_a_file_of_byol_is_refused_and_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    harm = Call(os.mkdir, str(tmp_path / "made"))
    for trees, momentum in (([harm, {}, {}, {}], None), ([{}] * 4, harm)):
        path = byol_file(monkeypatch, tmp_path / "a.pkl", trees, momentum)
        with pytest.raises(CheckpointError, match=r"a\.pkl: it refers to (posix|nt)\.mkdir"):
            load_checkpoint(path)

    class HarmState:
        """Not one of optax's, but it is called like them."""

        def __init__(self, *args: Any) -> None:
            os.mkdir(tmp_path / "made")

    HarmState.__qualname__ = "HarmState"
    called = Call(in_module(monkeypatch, "optax._src", HarmState), "x")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"w": np.ones(1), "state": called}))
    assert load_checkpoint(tmp_path / "b.pkl")["state"] == ()
    assert not (tmp_path / "made").exists()


# Written for other packages


def convert(tmp_path: Path, content: dict[str, Any], target: str, **kwargs: Any) -> tuple[Conversion, Path]:
    torch.save(content, tmp_path / "source.pth")
    conversion = read_conversion(str(tmp_path / "source.pth"), target=target, **kwargs)
    write_conversion(conversion, str(tmp_path / "written.pth"))
    return conversion, tmp_path / "written.pth"


CONTRACT = {
    "format": "RGB",
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
    "stride_in_1x1": False,
}


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_way_to_a_package_and_back_is_exact(tmp_path: Path, networks: dict[str, NarrowResNet50], package: str) -> None:
    ours = to_detectron2(networks["student"].state_dict())
    _, path = convert(tmp_path, {"model": ours, "d2_objssl": {"input_contract": CONTRACT}}, package)
    written = load_checkpoint(path)["model"]
    assert written.keys() == bare(networks["student"].state_dict()).keys()
    conversion, path = convert(tmp_path, load_checkpoint(path), "detectron2")
    back = load_checkpoint(path)["model"]
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)
    assert conversion.contract.items() >= CONTRACT.items()


def test_mmdetection_file_has_the_keys_of_its_resnet_and_comes_back(tmp_path: Path) -> None:
    """mmdetection's ResNet has the keys of torchvision's; its loader takes "state_dict", and only warns of others."""
    resnet = torchvision.models.resnet18()
    content = {"model": to_detectron2(resnet.state_dict()), "d2_objssl": {"input_contract": CONTRACT}}
    conversion, path = convert(tmp_path, content, "mmdetection")
    written = torch.load(path, weights_only=True)["state_dict"]
    assert resnet.load_state_dict(written, strict=False) == (["fc.weight", "fc.bias"], [])
    back = to_detectron2(load_checkpoint(path))
    assert back.keys() == content["model"].keys()
    assert all(torch.equal(back[name], value) for name, value in content["model"].items())
    printed = describe(conversion, str(path))
    assert f"checkpoint={str(path)!r}" in printed and "style='pytorch'" in printed and "bgr_to_rgb=True" in printed
    with pytest.raises(ValueError, match=r"a\.pkl: mmdetection reads files of torch\.save"):
        write_conversion(conversion, str(tmp_path / "a.pkl"))


def test_mmdetection_config_says_what_the_contract_says() -> None:
    contract = {"format": "BGR", "pixel_mean": [103.53, 116.28, 123.675], "pixel_std": [1.0] * 3, "stride_in_1x1": True}
    text = mmdetection_config(contract | {"depth": 101, "num_groups": 32, "width_per_group": 8}, "b.pth")
    values: dict[str, Any] = {}
    exec(text, values)  # it is Python
    assert values["backbone"] == {
        **{"type": "ResNeXt", "depth": 101, "groups": 32, "base_width": 8, "style": "caffe"},
        "init_cfg": {"type": "Pretrained", "checkpoint": "b.pth"},
    }
    statistics = {"mean": [103.53, 116.28, 123.675], "std": [1.0] * 3}
    assert values["data_preprocessor"] == statistics | {"bgr_to_rgb": False}
    assert values["img_norm_cfg"] == statistics | {"to_rgb": False}


@pytest.mark.slow
def test_strides_in_the_1x1_become_mmdetections_style_caffe(
    load_tool: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    state = to_detectron2(torchvision.models.resnet50().state_dict())
    torch.save(
        {"model": state, "d2_objssl": {"input_contract": CONTRACT | {"stride_in_1x1": True}}}, tmp_path / "a.pth"
    )
    arguments = [str(tmp_path / name) for name in ("a.pth", "b.pth")] + ["--to", "mmdetection", "--verify"]
    assert load_tool("convert_checkpoint").main(arguments) == 0
    printed = capsys.readouterr().out
    assert "style='caffe'" in printed and printed.count(" yes") == 4


@pytest.mark.parametrize(
    ("changes", "target", "message"),
    [
        ({"stride_in_1x1": True}, "timm", "strides in its 1x1"),
        ({"stride_in_1x1": None}, "torchvision", r"--config-file \(MODEL.RESNETS.STRIDE_IN_1X1"),
        ({"stride_in_1x1": None}, "mmdetection", r"--config-file \(MODEL.RESNETS.STRIDE_IN_1X1"),
        ({"pixel_mean": None}, "mmdetection", "does not tell its pixel_mean"),
        ({"padding": "same"}, "mmdetection", "--padding symmetric"),
        ({}, "mmdetection", "no ResNet-50 of these widths"),
    ],
)
def test_what_a_package_computes_otherwise_is_refused(
    tmp_path: Path, networks: dict[str, NarrowResNet50], changes: dict[str, Any], target: str, message: str
) -> None:
    contract = {key: value for key, value in (CONTRACT | changes).items() if value is not None}
    content = {"model": to_detectron2(networks["student"].state_dict()), "d2_objssl": {"input_contract": contract}}
    with pytest.raises(ValueError, match=rf"source\.pth.*{message}"):
        convert(tmp_path, content, target)
