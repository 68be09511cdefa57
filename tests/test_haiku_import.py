"""Checkpoints of haiku: read without running them, renamed, computed alike, and kept away from other paddings."""

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
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling import ResNet, build_backbone, build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn

from d2_objssl import weight_conversion
from d2_objssl.checkpoint import (
    CheckpointError,
    ObjSSLCheckpointer,
    backbone_prefix,
    checkpoint_metadata,
    detect_layout,
    input_contract,
    load_checkpoint,
    to_detectron2,
    unwrap_state_dict,
    write_checkpoint,
)
from d2_objssl.config import add_objssl_config
from d2_objssl.haiku_resnet import HaikuResNet, window_positions
from d2_objssl.modeling.backbone import SamePaddedStem, use_same_padding

STAGES = ("res2", "res3", "res4", "res5")
SIZES = [(64, 64), (75, 93), (66, 61)]
NARROW = {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 16, "WIDTH_PER_GROUP": 4}


def make_cfg(name: str = "build_objssl_resnet_backbone", padding: str = "same", **resnet: Any) -> CfgNode:
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.DEVICE = name, 0, "cpu"
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    keys = {"NORM": "BN", "STRIDE_IN_1X1": False, "PADDING": padding, "OUT_FEATURES": list(STAGES)}
    for key, value in (keys | NARROW | resnet).items():
        cfg.MODEL.RESNETS[key] = value
    return cfg


def make_network(blocks: tuple[int, ...] = (3, 4, 6, 3), *, bottleneck: bool = True) -> tuple[dict, dict]:
    """Random parameters and states as haiku nests them: module -> leaf -> array, 4 to 128 channels (basic: 64 to 512)."""
    rng = np.random.default_rng(0)
    params: dict[str, dict[str, np.ndarray]] = {}
    state: dict[str, dict[str, np.ndarray]] = {}

    def conv_norm(conv: str, norm: str, size: int, inputs: int, outputs: int) -> int:
        deviation = (size * size * inputs) ** -0.5
        params[conv] = {"w": rng.normal(0, deviation, (size, size, inputs, outputs)).astype(np.float32)}
        vectors = rng.uniform(0.5, 1.5, (6, 1, 1, 1, outputs)).astype(np.float32)
        params[norm] = {"scale": vectors[0], "offset": vectors[1] - 1}
        for key, average, hidden in (("mean", vectors[2] - 1, vectors[3]), ("var", vectors[4], vectors[5])):
            state[f"{norm}/~/{key}_ema"] = {"counter": np.int32(9), "average": average, "hidden": hidden}
        return outputs

    root = "res_net50/~"
    channels = conv_norm(f"{root}/initial_conv", f"{root}/initial_batchnorm", 7, 3, 8 if bottleneck else 64)
    for group, num_blocks in enumerate(blocks):
        inner, outer = (4 * 2**group, 16 * 2**group) if bottleneck else (64 * 2**group, 64 * 2**group)
        for block in range(num_blocks):
            name, start = f"{root}/block_group_{group}/~/block_{block}/~", channels
            for i, size in enumerate((1, 3, 1) if bottleneck else (3, 3)):
                outputs = outer if i == 2 else inner
                channels = conv_norm(f"{name}/conv_{i}", f"{name}/batchnorm_{i}", size, channels, outputs)
            if start != outer:
                conv_norm(f"{name}/shortcut_conv", f"{name}/shortcut_batchnorm", 1, start, outer)
    params["projector/linear"] = {"w": np.ones((2, 2), np.float32)}
    return params, state


def save(path: Path, params: dict, state: dict) -> Path:
    """As DetCon's files are: numpy.save of a dict; or .npz of flat names."""
    if path.suffix == ".npy":
        np.save(path, {"params": params, "state": state})  # type: ignore[arg-type]
    else:
        trees = {"params": params, "state": state}
        flat = {
            f"{t}/{m}/{leaf}": v
            for t, tree in trees.items()
            for m, leaves in tree.items()
            for leaf, v in leaves.items()
        }
        np.savez(path, **flat)
    return path


def noise(*size: int) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).double()


def relative_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[float]:
    return [((actual[s] - expected[s]).abs().max() / expected[s].abs().max()).item() for s in STAGES]


# Reading


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_file_is_read_and_recognised(tmp_path: Path, suffix: str) -> None:
    params, state = make_network()
    checkpoint = load_checkpoint(save(tmp_path / f"a{suffix}", params, state))
    assert detect_layout(checkpoint) == "haiku" and backbone_prefix(checkpoint) == "params/"
    converted = to_detectron2(checkpoint)
    assert set(converted) == {n for n in build_backbone(make_cfg()).state_dict() if "num_batches" not in n}
    weight = params["res_net50/~/block_group_1/~/block_0/~/conv_1"]["w"]
    assert np.array_equal(converted["res3.0.conv2.weight"], weight.transpose(3, 2, 0, 1))
    name = "res_net50/~/block_group_3/~/block_0/~/shortcut_batchnorm"
    norm = {"weight": params[name]["scale"], "bias": params[name]["offset"]}
    norm |= {
        "running_mean": state[f"{name}/~/mean_ema"]["average"],
        "running_var": state[f"{name}/~/var_ema"]["average"],
    }
    for leaf, value in norm.items():
        assert np.array_equal(converted[f"res5.0.shortcut.norm.{leaf}"], value[0, 0, 0])
    assert np.array_equal(converted["stem.conv1.norm.bias"], params["res_net50/~/initial_batchnorm"]["offset"][0, 0, 0])


def in_module(monkeypatch: pytest.MonkeyPatch, module: str, name: str, value: Any) -> None:
    """Let `value` be pickled as `module.name`."""
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    setattr(sys.modules[module], name, value)
    value.__module__, value.__qualname__, value.__name__ = module, name, name


@pytest.mark.parametrize(
    "function", ["jax._src.array._reconstruct_array", "jax._src.device_array.reconstruct_device_array"]
)
def test_arrays_of_jax_and_mappings_of_haiku_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def reconstruct(*args: Any) -> None:
        raise AssertionError("the file was run")

    class JaxArray:
        """Pickles as jax.Array does: the three parts of a NumPy array, and what JAX knows about it."""

        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        def __reduce__(self) -> tuple[Any, ...]:
            return reconstruct, (*self.array.__reduce__(), {"weak_type": False, "named_shape": {}})

    class FlatMapping(dict):
        """Pickles as haiku's mappings do."""

        def __reduce__(self) -> tuple[Any, ...]:
            return FlatMapping, (dict(self),)

    in_module(monkeypatch, *function.rsplit(".", 1), reconstruct)
    in_module(monkeypatch, "haiku._src.data_structures", "FlatMapping", FlatMapping)
    params, state = make_network((1, 1, 1, 1))
    trees = [
        FlatMapping(
            {m: FlatMapping({k: JaxArray(np.asarray(v)) for k, v in leaves.items()}) for m, leaves in tree.items()}
        )
        for tree in (params, state)
    ]
    converted = to_detectron2(load_checkpoint(save(tmp_path / "a.npy", *trees)))
    expected = to_detectron2(load_checkpoint(save(tmp_path / "b.npy", params, state)))
    assert converted.keys() == expected.keys()
    assert all(type(v) is np.ndarray and np.array_equal(v, expected[k]) for k, v in converted.items())


class Call:
    """Calls a function with arguments when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.parts = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


def test_code_in_the_pickle_of_an_npy_file_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reconstruct(*_: Any) -> None: ...

    in_module(monkeypatch, "jax._src.array", "_reconstruct_array", reconstruct)
    harm = Call(os.mkdir, str(tmp_path / "made"))
    contents = [
        {"params": {"a": {"w": harm}}},
        harm,
        {"w": Call(reconstruct, os.mkdir, (str(tmp_path / "made"),), None)},
    ]
    for content in contents:
        np.save(tmp_path / "a.npy", np.array(content, dtype=object))
        with pytest.raises(CheckpointError, match=r"a\.npy: it refers to (posix|nt)\.mkdir"):
            load_checkpoint(tmp_path / "a.npy")
    for content in ({"w": Call(reconstruct, bytes, (), None)}, {"w": np.array([None, {}])}):
        np.save(tmp_path / "a.npy", np.array(content, dtype=object))
        with pytest.raises(CheckpointError, match=r"JAX array|array of objects"):
            load_checkpoint(tmp_path / "a.npy")
    assert not (tmp_path / "made").exists()


def test_plain_bytes_do_not_become_object_pointers(tmp_path: Path) -> None:
    """With NumPy's own functions, reading such an array crashes the process."""

    class Forged:
        def __reduce__(self) -> tuple[Any, ...]:
            array = np.zeros(1)
            function, args, _ = array.__reduce__()
            return function, args, (1, (), np.dtype(object), False, b"\x01" * 8)

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"w": Forged()}))
    with pytest.raises(CheckpointError, match="array of objects"):
        load_checkpoint(tmp_path / "a.pkl")


def test_damaged_npy_files_are_reported(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", *make_network((1, 1, 1, 1)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"a\.npy: cannot be read.*\.npy of a dict"):
        load_checkpoint(path)


# Names


def test_branches_of_a_file_with_both_networks() -> None:
    params, state = make_network((1, 1, 1, 1))
    other = {m: {leaf: v + 1 for leaf, v in leaves.items()} for m, leaves in params.items()}
    both = {"online_params": params, "online_state": state, "target_params": other, "target_state": state}
    assert backbone_prefix(both) == "online_params/"
    student, teacher = to_detectron2(both), to_detectron2(both, branch="teacher")
    assert np.array_equal(student["stem.conv1.weight"] + 1, teacher["stem.conv1.weight"])
    assert student.keys() == teacher.keys() and "stem.conv1.norm.running_mean" in student
    assert to_detectron2({"target_params": other, "target_state": state}).keys() == teacher.keys()
    with pytest.raises(ValueError, match="teacher is asked for"):
        to_detectron2({"params": params, "state": state}, branch="teacher")


def test_networks_that_cannot_be_converted_are_reported() -> None:
    params, state = make_network((1, 1, 1, 1))
    with pytest.raises(ValueError, match="behind 'params/', but no statistics"):
        to_detectron2({"params": params})
    for name in ("final_batchnorm", "block_group_0/~/block_0/~/se_conv"):
        more = params | {f"res_net50/~/{name}": {"scale": np.ones((1, 1, 1, 2))}}
        with pytest.raises(ValueError, match=f'"{name.replace("/~", "")}/scale" has no name in Detectron2'):
            to_detectron2({"params": more, "state": state})
    with pytest.raises(ValueError, match="no weights"):
        unwrap_state_dict({"params": {"mlp/linear": {"w": np.ones(2)}}})


# Features


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["R50", "R18"])
def test_same_padded_backbone_computes_what_haiku_does(kind: str, size: tuple[int, int]) -> None:
    params, state = make_network() if kind == "R50" else make_network((2, 2, 2, 2), bottleneck=False)
    tree = {"params": params, "state": state}
    r18 = {"DEPTH": 18, "RES2_OUT_CHANNELS": 64, "STEM_OUT_CHANNELS": 64}
    cfg = make_cfg(**({} if kind == "R50" else r18))
    model = build_backbone(cfg).double().eval()
    incompatible = model.load_state_dict({k: torch.as_tensor(v) for k, v in to_detectron2(tree).items()}, strict=False)
    assert not incompatible.unexpected_keys and all("num_batches" in name for name in incompatible.missing_keys)
    reference = HaikuResNet(unwrap_state_dict(tree), "params/")
    with torch.no_grad():
        assert max(relative_errors(model(noise(*size)), reference(noise(*size)))) < 1e-11


def test_windows_of_the_reference_are_those_of_tensorflow() -> None:
    assert window_positions(4, 3, 2).tolist() == [[0, 1, 2], [2, 3, 4]]
    assert window_positions(5, 3, 2).tolist() == [[-1, 0, 1], [1, 2, 3], [3, 4, 5]]
    assert window_positions(8, 7, 2)[[0, -1]].tolist() == [[-2, -1, 0, 1, 2, 3, 4], [4, 5, 6, 7, 8, 9, 10]]
    assert window_positions(5, 1, 2).tolist() == [[0], [2], [4]]


def one_block_per_stage(arrays: dict[str, Tensor]) -> ResNet:
    """The same-padded ResNet of one bottleneck block of 8 channels a stage, each with a projection, as Detectron2's."""
    stages, channels = [], 64
    for stride in (1, 2, 2, 2):
        block = BottleneckBlock(channels, 8, bottleneck_channels=2, stride=stride)
        # Detectron2 leaves the projection out where the number of channels stays.
        block.shortcut = Conv2d(channels, 8, kernel_size=1, stride=stride, bias=False, norm=get_norm("BN", 8))
        use_same_padding(block)
        stages.append([block])
        channels = 8
    model = ResNet(SamePaddedStem(), stages, out_features=list(STAGES))
    incompatible = model.load_state_dict(arrays, strict=False)
    assert not incompatible.unexpected_keys and all("num_batches" in name for name in incompatible.missing_keys)
    return model.double().eval()


@pytest.mark.parametrize("parity", ["even", "odd"])
def test_features_that_haiku_itself_computed(reference_values: Callable[[str], Path], parity: str) -> None:
    content = load_checkpoint(reference_values("detcon_18_haiku_resnet_tiny"))
    assert detect_layout(content) == "haiku"
    model = one_block_per_stage({k: torch.as_tensor(v) for k, v in to_detectron2(content).items()})
    reference = HaikuResNet(unwrap_state_dict(content), backbone_prefix(content))
    images = torch.as_tensor(content[f"image_nhwc_{parity}"]).permute(0, 3, 1, 2).double()
    expected = {s: torch.as_tensor(content[f"{s}_nhwc_{parity}"]).permute(0, 3, 1, 2) for s in STAGES}
    with torch.no_grad():
        assert max(relative_errors(model(images), expected)) < 1e-12
        assert max(relative_errors(reference(images), expected)) < 1e-12


# Loading and converting


@pytest.fixture(scope="module")
def haiku_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("haiku") / "resnet50.npy", *make_network())


@pytest.fixture
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("convert_checkpoint")


def load(model: nn.Module, path: Path, cfg: CfgNode) -> None:
    ObjSSLCheckpointer(model, metadata=checkpoint_metadata(cfg)).resume_or_load(str(path), resume=False)


def test_weights_of_a_detector_may_be_a_haiku_file(haiku_file: Path) -> None:
    cfg = make_cfg("build_objssl_resnet_fpn_backbone")
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS = list(STAGES), 8
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    model = build_model(cfg)
    load(model, haiku_file, cfg)
    loaded = model.backbone.bottom_up.state_dict()
    for name, value in to_detectron2(load_checkpoint(haiku_file)).items():
        assert np.array_equal(loaded[name], value), name


def test_other_padding_is_refused_before_the_weights_are_touched(haiku_file: Path, tmp_path: Path) -> None:
    cfg = make_cfg("build_resnet_backbone", "symmetric")
    with pytest.raises(ValueError) as caught:
        load(build_backbone(cfg), haiku_file, cfg)
    message = str(caught.value)
    assert "MODEL.RESNETS.PADDING is symmetric, the checkpoint was trained on same" in message
    assert "build_objssl_resnet_fpn_backbone" in message and "--padding symmetric" in message
    # Nor do networks that were trained with symmetric padding get the other one.
    bare = build_backbone(cfg).state_dict()
    contract = input_contract(cfg)
    without_padding = {key: value for key, value in contract.items() if key != "padding"}
    for stored in (contract, without_padding):
        write_checkpoint({"model": bare, "d2_objssl": {"input_contract": stored}}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match="PADDING is same, the checkpoint was trained on symmetric"):
            load(build_backbone(make_cfg()), tmp_path / "a.pth", make_cfg())
        load(build_backbone(cfg), tmp_path / "a.pth", cfg)


def test_settings_that_the_backbone_leaves_aside_are_refused() -> None:
    cfg = make_cfg("build_resnet_backbone", "same")
    with pytest.raises(ValueError, match=r'PADDING "same", which .* build_resnet_backbone leaves'):
        input_contract(cfg)
    with pytest.raises(ValueError, match="WIDTH_MULTIPLIER is 2"):
        input_contract(make_cfg("build_resnet_backbone", "symmetric", WIDTH_MULTIPLIER=2))
    wide = input_contract(make_cfg(WIDTH_MULTIPLIER=2))
    assert (wide["stem_out_channels"], wide["res2_out_channels"], wide["width_per_group"]) == (16, 32, 8)
    explicit = make_cfg(**{key: 2 * value for key, value in NARROW.items()})
    assert input_contract(explicit) == wide


def equal_column(printed: str) -> list[str]:
    return re.findall(r"^res\d .*(yes|NO)$", printed, re.MULTILINE)


def test_conversion_is_exact_with_same_padding(
    tool: ModuleType, haiku_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert tool.main([str(haiku_file), str(tmp_path / "b.pkl"), "--verify"]) == 0
    printed = capsys.readouterr().out
    assert equal_column(printed) == ["yes"] * 8  # on an even and an odd size
    assert 'haiku names behind "params/"' in printed and "MODEL.RESNETS.PADDING same" in printed
    metadata = load_checkpoint(tmp_path / "b.pkl")["d2_objssl"]
    contract = metadata["input_contract"]
    assert (contract["padding"], contract["format"], contract["stride_in_1x1"]) == ("same", "RGB", False)
    assert contract["pixel_std"] == [58.395, 57.12, 57.375] and metadata["source"]["layout"] == "haiku"
    # The converted file is a source like any other.
    assert tool.main([str(tmp_path / "b.pkl"), str(tmp_path / "c.pth"), "--verify"]) == 0
    assert load_checkpoint(tmp_path / "c.pth")["d2_objssl"]["input_contract"] == contract
    cfg = make_cfg("build_resnet_backbone", "symmetric")
    with pytest.raises(ValueError, match="PADDING is symmetric"):
        load(build_backbone(cfg), tmp_path / "c.pth", cfg)


def test_conversion_to_the_usual_padding_warns_and_measures(
    tool: ModuleType, haiku_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "b.pkl"
    for source in (haiku_file, tmp_path / "same.pkl"):
        assert tool.main([str(source), str(output), "--padding", "symmetric", "--verify"]) == 1
        printed = capsys.readouterr().out
        assert "warning: trained with same padding; with symmetric its features are off by" in printed
        assert equal_column(printed) == ["NO"] * 4
        errors = [float(row.split()[-2]) for row in printed.splitlines() if row.startswith("res")]
        assert all(0.01 < error < 2 for error in errors)
        assert tool.main([str(haiku_file), str(tmp_path / "same.pkl")]) == 0
        capsys.readouterr()
    cfg = make_cfg("build_resnet_backbone", "symmetric")
    model = build_backbone(cfg)
    load(model, output, cfg)
    expected = to_detectron2(load_checkpoint(haiku_file))
    assert all(np.array_equal(model.state_dict()[name], value) for name, value in expected.items())


def test_conversion_to_torchvision_needs_symmetric_padding(
    tool: ModuleType, haiku_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [str(haiku_file), str(tmp_path / "b.pth"), "--to", "torchvision"]
    assert tool.main(arguments) == 2
    assert "pads as TensorFlow does" in capsys.readouterr().err and not (tmp_path / "b.pth").exists()
    assert tool.main([*arguments, "--padding", "symmetric"]) == 0
    assert "layer4.2.bn3.running_var" in load_checkpoint(tmp_path / "b.pth")["model"]


def test_statistics_of_pixels_come_from_a_config(tool: ModuleType, haiku_file: Path, tmp_path: Path) -> None:
    """Files trained on COCO take pixels in [0, 1]; what haiku's networks compute stays as it is."""
    (tmp_path / "a.yaml").write_text("MODEL: {PIXEL_MEAN: [0.0, 0.0, 0.0], PIXEL_STD: [255.0, 255.0, 255.0]}\n")
    arguments = [str(haiku_file), str(tmp_path / "b.pkl"), "--verify", "--config-file", str(tmp_path / "a.yaml")]
    assert tool.main(arguments) == 0
    contract = load_checkpoint(tmp_path / "b.pkl")["d2_objssl"]["input_contract"]
    assert (contract["pixel_std"], contract["format"], contract["padding"]) == ([255.0] * 3, "RGB", "same")
    assert contract["stride_in_1x1"] is False


def test_verification_notices_statistics_that_are_not_corrected(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moving average `hidden` starts at zero."""
    params, state = make_network()
    path = save(tmp_path / "a.npy", params, state)
    mixed_up = {m: collections.OrderedDict(leaves, average=leaves["hidden"]) for m, leaves in state.items()}
    wrong = to_detectron2({"params": params, "state": mixed_up})
    monkeypatch.setattr(weight_conversion, "to_detectron2", lambda *_, **__: wrong)
    assert tool.main([str(path), str(tmp_path / "b.pkl"), "--verify"]) == 1
    assert equal_column(capsys.readouterr().out) == ["NO"] * 8
