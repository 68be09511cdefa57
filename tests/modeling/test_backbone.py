"""Our ResNets against Detectron2's, TensorFlow's padding against its definition, and features of single blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import FPN, build_backbone
from detectron2.modeling.backbone.resnet import BasicBlock
from torch import Tensor, nn

from d2_objssl import add_objssl_config
from d2_objssl.modeling.backbone import DilatedBasicBlock, build_objssl_resnet_backbone, features_at, pad_same

RGB = ShapeSpec(channels=3)
NARROW = {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 16, "WIDTH_PER_GROUP": 4}
R18 = {"DEPTH": 18, "RES2_OUT_CHANNELS": 64}


def make_cfg(name: str = "build_objssl_resnet_backbone", **resnet: Any) -> CfgNode:
    """A config of a backbone; `resnet`: keys of MODEL.RESNETS."""
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = name, 0
    keys = {"NORM": "BN", "STRIDE_IN_1X1": False, "OUT_FEATURES": ["res2", "res3", "res4", "res5"]}
    for key, value in (keys | resnet).items():
        cfg.MODEL.RESNETS[key] = value
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS = ["res2", "res3", "res4", "res5"], 8
    return cfg


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "resnet",
    [
        {},
        NARROW | {"STRIDE_IN_1X1": True, "RES5_DILATION": 2, "NUM_GROUPS": 2},
        NARROW | {"DEPTH": 101, "OUT_FEATURES": ["res4"], "NORM": "FrozenBN"},
        NARROW | {"NORM": "GN", "STEM_OUT_CHANNELS": 32, "RES2_OUT_CHANNELS": 128, "WIDTH_PER_GROUP": 32},
        R18,
    ],
)
def test_without_new_settings_it_is_the_resnet_of_detectron2(resnet: dict[str, Any]) -> None:
    models = []
    for name in ("build_objssl_resnet_backbone", "build_resnet_backbone"):
        torch.manual_seed(0)
        models.append(build_backbone(make_cfg(name, **resnet)))
    own, expected = models
    assert list(own.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(own.state_dict()[name], value) for name, value in expected.state_dict().items())
    assert own.output_shape() == expected.output_shape()
    images = noise(2, 3, 32, 32)
    actual, features = own(images), expected(images)
    assert actual.keys() == features.keys() and all(torch.equal(actual[name], features[name]) for name in features)


def test_pyramid_is_the_one_of_detectron2() -> None:
    models = []
    for name in ("build_objssl_resnet_fpn_backbone", "build_resnet_fpn_backbone"):
        torch.manual_seed(0)
        models.append(build_backbone(make_cfg(name, **NARROW)))
    own, expected = models
    assert isinstance(own, FPN) and list(own.state_dict()) == list(expected.state_dict())
    images = noise(1, 3, 64, 64)
    actual, features = own(images), expected(images)
    assert list(actual) == list(features) and all(torch.equal(actual[name], features[name]) for name in features)


def count_parameters(depth: int, multiplier: int) -> int:
    """Weights and norms of a bottleneck ResNet, summed from the architecture (He et al., Table 1)."""
    stem = 64 * multiplier
    total, channels = 3 * 49 * stem + 2 * stem, stem
    for index, blocks in enumerate({50: (3, 4, 6, 3), 200: (3, 24, 36, 3)}[depth]):
        inner, outer = 64 * multiplier * 2**index, 256 * multiplier * 2**index
        total += channels * outer + 2 * outer  # the shortcut
        for _ in range(blocks):
            total += channels * inner + 9 * inner * inner + inner * outer + 4 * inner + 2 * outer
            channels = outer
    return total


@pytest.mark.parametrize(
    ("depth", "multiplier", "millions"), [(50, 1, 23.5), (50, 2, 93.9), (200, 1, 62.6), (200, 2, 250.1)]
)
def test_parameters_of_deep_and_wide_resnets(depth: int, multiplier: int, millions: float) -> None:
    with torch.device("meta"):
        model = build_backbone(make_cfg(DEPTH=depth, WIDTH_MULTIPLIER=multiplier))
    total = sum(p.numel() for p in model.parameters())
    assert total == count_parameters(depth, multiplier)
    assert round(total / 1e6, 1) == millions
    assert model.output_shape()["res5"] == ShapeSpec(channels=2048 * multiplier, stride=32)
    assert model.stem.conv1.out_channels == 64 * multiplier


@pytest.mark.parametrize("resnet", [NARROW, R18], ids=["R50", "R18"])
@pytest.mark.parametrize(("dilations", "strides"), [((1, 2), (16, 16)), ((2, 4), (8, 8))])
def test_dilated_stages_keep_the_resolution_and_the_parameters(
    resnet: dict[str, Any], dilations: tuple[int, int], strides: tuple[int, int]
) -> None:
    strided = build_backbone(make_cfg(**resnet))
    dilated = build_backbone(make_cfg(**resnet, RES4_DILATION=dilations[0], RES5_DILATION=dilations[1])).eval()
    dilated.load_state_dict(strided.state_dict())
    features = dilated(noise(1, 3, 64, 64))
    for name, stage, dilation, stride in zip(("res4", "res5"), dilated.stages[2:], dilations, strides, strict=True):
        assert dilated.output_shape()[name].stride == stride and features[name].shape[-1] == 64 // stride
        kernels = [m for m in stage.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert len(kernels) >= 3 and all(m.dilation == m.padding == (dilation, dilation) for m in kernels)
        if dilation > 1:
            assert all(m.stride == (1, 1) for m in stage.modules() if isinstance(m, nn.Conv2d))


def test_dilated_basic_block_looks_at_every_second_cell() -> None:
    """Among the cells of even rows and columns, it is the ordinary block."""
    torch.manual_seed(0)
    block, dilated = BasicBlock(4, 4, norm="BN").eval(), DilatedBasicBlock(4, 4, norm="BN", dilation=2).eval()
    dilated.load_state_dict(block.state_dict())
    x = noise(1, 4, 9, 9)
    torch.testing.assert_close(dilated(x)[..., ::2, ::2], block(x[..., ::2, ::2]))


@pytest.mark.parametrize("freeze_at", [0, 5])
def test_one_block_as_the_output(freeze_at: int) -> None:
    whole = build_backbone(make_cfg(**NARROW)).eval()
    cfg = make_cfg(**NARROW, OUT_FEATURES=["res3.2"])
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    front = build_backbone(cfg)
    front.load_state_dict({k: v for k, v in whole.state_dict().items() if k in front.state_dict()})
    if freeze_at == 0:
        front.eval()
    else:  # its statistics are fixed, too
        assert not any(p.requires_grad for p in front.parameters())
        assert any(isinstance(m, FrozenBatchNorm2d) for m in front.modules())
    images = noise(2, 3, 64, 64)
    assert front.output_shape() == {"res3.2": ShapeSpec(channels=32, stride=8)}
    assert list(front(images)) == ["res3.2"]
    torch.testing.assert_close(front(images)["res3.2"], features_at(whole, images, "res3.2"), rtol=1e-4, atol=1e-5)
    assert not any(name.startswith(("res3.3", "res4", "res5")) for name in front.state_dict())


def same_window(n: int, k: int, s: int) -> tuple[int, int]:
    """Cells that TensorFlow's 'SAME' adds before and after: its documentation, case by case."""
    total = max(k - s, 0) if n % s == 0 else max(k - n % s, 0)
    return total // 2, total - total // 2


def naive_conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """One cell at a time."""
    (top, _), (left, _) = (same_window(n, weight.shape[-1], stride) for n in x.shape[-2:])
    height, width = (math.ceil(n / stride) for n in x.shape[-2:])
    out = torch.zeros(x.shape[0], weight.shape[0], height, width, dtype=x.dtype)
    for i in range(height):
        for j in range(width):
            for a in range(weight.shape[2]):
                for b in range(weight.shape[3]):
                    row, column = i * stride + a - top, j * stride + b - left
                    if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                        out[:, :, i, j] += x[:, :, row, column] @ weight[:, :, a, b].t()
    return out


@pytest.mark.parametrize("size", [(8, 12), (9, 11), (7, 10), (1, 2)])
def test_same_padding_is_that_of_tensorflow(size: tuple[int, int]) -> None:
    x = noise(1, 2, *size).double()
    for k, s in ((7, 2), (3, 2), (3, 1), (1, 2), (2, 3)):
        weight = noise(3, 2, k, k).double()
        padded = pad_same(x, (k, k), (s, s))
        for axis, n in enumerate(size):
            assert padded.shape[2 + axis] - n == sum(same_window(n, k, s))
        torch.testing.assert_close(nn.functional.conv2d(padded, weight, stride=s), naive_conv(x, weight, s))


def test_dilated_convolutions_are_padded_by_their_reach() -> None:
    assert pad_same(torch.zeros(1, 1, 6, 7), (3, 3), (1, 2), (2, 2)).shape == (1, 1, 10, 11)


def narrow_same(**resnet: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_backbone(make_cfg(PADDING="same", **NARROW | resnet))


@pytest.mark.parametrize("size", [(20, 22), (15, 19), (16, 13)])
def test_stem_pads_with_minus_infinity(size: tuple[int, int]) -> None:
    stem = narrow_same().stem.double().eval()
    x = noise(1, 3, *size).double()
    nn.init.constant_(stem.conv1.norm.bias, 0.5)
    out = naive_conv(x, stem.conv1.weight.detach(), 2) / math.sqrt(1 + 1e-5) + 0.5
    out = out.clamp(min=0)
    (top, bottom), (left, right) = (same_window(n, 3, 2) for n in out.shape[-2:])
    out = nn.functional.pad(out, (left, right, top, bottom), value=-math.inf).unfold(2, 3, 2).unfold(3, 3, 2)
    torch.testing.assert_close(stem(x).detach(), out.amax(dim=(4, 5)))


@pytest.mark.parametrize("resnet", [{}, {"STRIDE_IN_1X1": True}, {"RES5_DILATION": 2}, R18 | {"STEM_OUT_CHANNELS": 64}])
def test_only_strided_convolutions_with_a_neighbourhood_pad_otherwise(resnet: dict[str, Any]) -> None:
    own = narrow_same(**resnet)
    torch.manual_seed(0)
    expected = build_objssl_resnet_backbone(make_cfg(**NARROW | resnet), RGB)
    assert list(own.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(own.state_dict()[name], value) for name, value in expected.state_dict().items())
    assert own.output_shape() == expected.output_shape()
    stride, dilation = not resnet.get("STRIDE_IN_1X1", False), resnet.get("RES5_DILATION", 1) > 1
    conv = "conv1" if resnet.get("DEPTH") == 18 else "conv2"
    changed = {
        name for name, layer in own.named_modules() if type(layer) is not type(dict(expected.named_modules())[name])
    }
    wanted = {f"res{i}.0.{conv}" for i in ((3, 4) if dilation else (3, 4, 5))} if stride else set()
    assert changed == {"stem", "stem.conv1"} | wanted
    # For odd sizes, both paddings of the stem's convolution and of its pooling are the same.
    odd = noise(1, 3, 61, 61)
    assert torch.equal(own.eval().stem(odd), expected.eval().stem(odd))
    even = noise(1, 3, 64, 64)
    assert own(even)["res5"].shape == expected(even)["res5"].shape
    assert not torch.allclose(own(even)["res5"], expected(even)["res5"], rtol=0.01)


def test_same_padding_has_gradients() -> None:
    model = narrow_same().double()
    x = noise(2, 3, 33, 34).double().requires_grad_()
    sum(f.square().mean() for f in model(x).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    stem = model.stem.eval()
    assert torch.autograd.gradcheck(stem, x.detach()[:1, :, :6, :7].clone().requires_grad_())


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_frozen_stages(padding: str) -> None:
    cfg = make_cfg(PADDING=padding, **NARROW)
    cfg.MODEL.BACKBONE.FREEZE_AT = 3
    model = build_backbone(cfg)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(("res4", "res5")), name
    assert isinstance(model.res3[0].conv2.norm, FrozenBatchNorm2d) and isinstance(
        model.res4[0].conv2.norm, nn.BatchNorm2d
    )


@pytest.mark.parametrize(
    ("resnet", "message"),
    [
        ({"DEPTH": 26}, "MODEL.RESNETS.DEPTH is 26.*200"),
        ({"PADDING": "SAME"}, 'MODEL.RESNETS.PADDING is "SAME"'),
        ({"WIDTH_MULTIPLIER": 0}, "MODEL.RESNETS.WIDTH_MULTIPLIER is 0"),
        ({"RES5_DILATION": 4}, r"RES4_DILATION and RES5_DILATION are \(1, 4\)"),
        ({"RES4_DILATION": 2}, r"RES4_DILATION and RES5_DILATION are \(2, 1\)"),
        ({"OUT_FEATURES": ["res3.4"]}, r"OUT_FEATURES is \['res3.4'\].*res3.3, res4.0"),
        ({"OUT_FEATURES": ["res3.2", "res4"]}, r"OUT_FEATURES is \['res3.2', 'res4'\].*one block"),
        (
            {"DEFORM_ON_PER_STAGE": [False, True, True, True]},
            "DEFORM_ON_PER_STAGE is .*True.*no deformable convolutions",
        ),
        ({"DEPTH": 34}, "MODEL.RESNETS.RES2_OUT_CHANNELS is 256; for ResNet-34 it must be 64"),
        (R18 | {"NUM_GROUPS": 32}, "NUM_GROUPS is 32; for ResNet-18"),
    ],
)
def test_settings_that_it_does_not_have_are_refused(resnet: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(make_cfg(**resnet))


@pytest.mark.parametrize("name", ["build_objssl_resnet_backbone", "build_resnet_backbone"])
def test_features_at_a_block_come_from_that_block_and_no_later_one_runs(name: str) -> None:
    model = build_backbone(make_cfg(name, **NARROW)).eval()
    outputs: dict[str, Tensor] = {}
    for key, module in model.named_modules():
        module.register_forward_hook(lambda _, __, output, key=key: outputs.update({key: output}))
    images = noise(1, 3, 64, 64)
    model(images)
    expected = dict(outputs)
    for stop in ("res2.0", "res3.2", "res5.2", "res3", "res5"):
        outputs.clear()
        assert torch.equal(features_at(model, images, stop), expected[stop])
        ran = {key for key in outputs if key.count(".") == 1 and key.startswith("res")}
        last = (
            stop if "." in stop else max(key for key in expected if key.startswith(f"{stop}.") and key.count(".") == 1)
        )
        assert max(ran) == last
    for stop in ("res6", "res3.4", "res3.02", "stem", ""):
        with pytest.raises(ValueError, match=f'BOOTSTRAP_FEATURE is "{stop}".*res3.0 to res3.3'):
            features_at(model, images, stop)
