"""Projection and prediction heads."""

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from d2_objssl.modeling.heads import MLP


def make(norm: str = "BN", **kwargs) -> MLP:
    torch.manual_seed(0)
    return MLP(6, **{"num_fc": 3, "fc_dim": 10, "out_dim": 4, "norm": norm, **kwargs})


def convolutions(mlp: MLP, activation: type[nn.Module]) -> nn.Sequential:
    """The same head as the papers write it: 1x1 convolutions on (N, C, h, w) float64."""
    layers: list[nn.Module] = []
    for name, layer in mlp.layers.named_children():
        if name.startswith("fc"):
            conv = nn.Conv2d(layer.in_features, layer.out_features, 1, dtype=torch.float64)
            conv.weight.data.copy_(layer.weight.data[:, :, None, None])
            conv.bias.data.copy_(layer.bias.data)
            layers.append(conv)
        elif name.startswith("norm"):
            norm = nn.BatchNorm2d(layer.num_features, affine=layer.affine, dtype=torch.float64)
            norm.load_state_dict(layer.state_dict())
            layers.append(norm)
        else:
            layers.append(activation())
    return nn.Sequential(*layers)


@pytest.mark.parametrize(("activation", "module"), [("gelu", nn.GELU), ("relu", nn.ReLU)])
@pytest.mark.parametrize("last_norm", [False, True])
def test_equals_convolutions_1x1(activation: str, module: type[nn.Module], last_norm: bool) -> None:
    mlp = make(activation=activation, last_norm=last_norm).double()
    for parameter in mlp.parameters():  # the initial biases are zero
        nn.init.normal_(parameter)
    reference = convolutions(mlp, module)
    inputs = [torch.randn(3, 6, 5, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    for _ in range(2):  # twice, so that running statistics differ from their initial values
        out = mlp(inputs[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        expected = reference(inputs[1])
        torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for own, other in zip(mlp.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own.grad.flatten(), other.grad.flatten(), rtol=1e-9, atol=1e-9)
    for own, other in zip(mlp.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(own, other)
    mlp.eval(), reference.eval()
    x = torch.randn(2, 6, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), reference(x))


def test_naive_sync_bn_in_one_process_equals_bn() -> None:
    bn, naive = make("BN"), make("naiveSyncBN")
    naive.load_state_dict(bn.state_dict())
    x = torch.randn(8, 6)
    torch.testing.assert_close(naive(x), bn(x))
    torch.testing.assert_close(naive.layers.norm1.running_var, bn.layers.norm1.running_var)


@pytest.mark.parametrize("norm", ["BN", "naiveSyncBN", ""])
@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_rows(norm: str, rows: int) -> None:
    """One row has no variance, and none no mean: the running statistics stand in, and stay."""
    mlp = make(norm)
    mlp(3 + 2 * torch.randn(16, 6))
    before = {k: v.clone() for k, v in mlp.named_buffers()}
    x = torch.randn(rows, 6, requires_grad=True)
    out = mlp(x)
    assert out.shape == (rows, 4) and out.isfinite().all()
    out.sum().backward()
    for name, parameter in mlp.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if rows == 0:
            assert not parameter.grad.any(), name
    for name, buffer in mlp.named_buffers():
        assert torch.equal(buffer, before[name]), name
    mlp.eval()
    torch.testing.assert_close(mlp(x), out)


@pytest.mark.parametrize("rows", [0, 3])
def test_sync_bn_shares_one_data_type(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gathers float32 statistics of bfloat16 rows; what it gathers where there are none has the data type of these."""
    mlp, seen = make("SyncBN"), []
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for norm in (mlp.layers.norm1, mlp.layers.norm2):
        monkeypatch.setattr(norm, "forward", lambda x: seen.append(x.dtype) or x)
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp(torch.zeros(rows, 6)).dtype is torch.bfloat16
    assert seen == [torch.float32 if rows == 0 else torch.bfloat16] * 2


def test_initialisation() -> None:
    torch.manual_seed(0)
    mlp = MLP(256, num_fc=3, fc_dim=512, out_dim=256, norm="BN")
    for name in ("fc1", "fc2", "fc3"):
        layer = getattr(mlp.layers, name)
        assert layer.weight.mean().abs() < 3 * 0.02 / layer.weight.numel() ** 0.5
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.01)
        assert not layer.bias.any()
    assert torch.equal(mlp.layers.norm1.weight, torch.ones(512)) and not mlp.layers.norm1.bias.any()


def test_layers() -> None:
    assert list(dict(make().layers.named_children())) == [
        "fc1", "norm1", "act1", "fc2", "norm2", "act2", "fc3",
    ]  # fmt: skip
    assert list(dict(make(num_fc=1).layers.named_children())) == ["fc1"]
    last = make(num_fc=2, last_norm=True).layers.norm2
    assert last.weight is None and last.bias is None
    naive = make("naiveSyncBN", num_fc=1, last_norm=True).layers.norm1
    assert not any(p.requires_grad for p in naive.parameters())
    assert isinstance(make("SyncBN").layers.norm1, nn.SyncBatchNorm)
    assert make(num_fc=1)(torch.randn(2, 3, 5, 6)).shape == (2, 3, 5, 4)


def head_cfg(**values: object) -> CfgNode:
    node = {"NUM_FC": 2, "FC_DIM": 7, "OUT_DIM": 3, "NORM": "", "ACTIVATION": "relu"}
    return CfgNode({**node, "LAST_NORM": False, "LAST_BIAS": True, **values})


def test_from_config() -> None:
    mlp = MLP.from_config(head_cfg(), in_dim=5)
    assert [tuple(p.shape) for p in mlp.parameters()] == [(7, 5), (7,), (3, 7), (3,)]
    assert isinstance(mlp.layers.act1, nn.ReLU)
    assert list(dict(mlp.layers.named_children())) == ["fc1", "norm1", "act1", "fc2"]


def test_last_bias_is_that_of_the_last_layer_alone() -> None:
    mlp = MLP.from_config(head_cfg(NUM_FC=3, LAST_BIAS=False), in_dim=5)
    assert [tuple(p.shape) for p in mlp.parameters()] == [(7, 5), (7,), (7, 7), (7,), (3, 7)]
    assert not mlp(torch.zeros(4, 5)).any()  # the other biases are zero at first, and ReLU keeps it
    single = make(num_fc=1, last_bias=False)
    x = torch.randn(4, 6)
    torch.testing.assert_close(single(x), x @ single.layers.fc1.weight.T)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"norm": "LN"}, 'NORM of a projection head is "LN"'),
        ({"activation": "tanh"}, 'ACTIVATION of a projection head is "tanh"'),
        ({"num_fc": 0}, "NUM_FC of a projection head is 0"),
    ],
)
def test_unknown_settings_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**kwargs)
