"""SemCL's losses against naive loops, the criterion in one and in two processes, and one training step.

N pairs, G pairs of all processes, V = 3 views, D dimensions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.utils import comm
from multiprocess import run_in_processes
from tiny_semcl import semcl_batch, semcl_cfg, semcl_model
from torch import Tensor

from d2_objssl.engine import ema_momentum
from d2_objssl.modeling.heads import MLP
from d2_objssl.modeling.methods.registry import SSL_METHOD_REGISTRY
from d2_objssl.modeling.methods.semcl import SemCLCriterion, paired_info_nce, paired_logits, unpaired_info_nce
from d2_objssl.structures import RegionEmbeddings

N, G, V, D = 3, 6, 3, 4
EXACT = {"rtol": 1e-11, "atol": 1e-12}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32


def randn(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_(grad)


def paired_oracle(queries: Tensor, keys: Tensor, negatives: Tensor, temp: float) -> Tensor:
    """Eq. 3 for one member with the pairs of views (0, 1), (1, 2), (2, 0): the mean over images of the sum of terms."""
    terms = []
    for n in range(len(queries)):
        for t, j in ((0, 1), (1, 2), (2, 0)):
            positive = torch.exp(oracles.cosine(queries[n, t], keys[n, j]) / temp)
            others = [torch.exp(oracles.cosine(queries[n, t], negatives[n, i]) / temp) for i in range(V)]
            terms.append(-torch.log(positive / (oracles.total(others) + positive)))
    return oracles.total(terms) / len(queries)


def unpaired_oracle(queries: Tensor, keys: Tensor, rank_offset: int, temp: float) -> Tensor:
    pairs = ((0, 1), (1, 2), (2, 0))
    return oracles.total([oracles.image_nce(queries[:, t], keys[:, j], rank_offset, temp) for t, j in pairs])


def assert_same(ours: Tensor, oracle: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(ours, oracle, **EXACT)
    own = torch.autograd.grad(ours, inputs, retain_graph=True)
    torch.testing.assert_close(own, torch.autograd.grad(oracle, inputs, retain_graph=True), **EXACT)


# ------------------------------------------------------------------------------------------------ pure functions


def test_paired_info_nce() -> None:
    anchors, others = randn(N, V, D, grad=True), randn(N, V, D, seed=1, grad=True)
    keys = randn(N, V, D, seed=2), randn(N, V, D, seed=3)
    expected = paired_oracle(anchors, keys[0], keys[1], 0.3) + paired_oracle(others, keys[1], keys[0], 0.3)
    assert_same(paired_info_nce(anchors, others, *keys, 0.3), expected, anchors, others)
    assert torch.autograd.gradcheck(lambda a, b: paired_info_nce(a, b, *keys, 0.3), (anchors, others))


def test_paired_info_nce_looks_at_no_other_image() -> None:
    """The number of negatives does not depend on the batch: a batch gives the mean over its images."""
    tensors = [randn(N, V, D, seed=s) for s in range(4)]
    each = [paired_info_nce(*(x[n : n + 1] for x in tensors), 0.2) for n in range(N)]
    torch.testing.assert_close(paired_info_nce(*tensors, 0.2), torch.stack(each).mean(), **EXACT)


def test_paired_info_nce_of_telling_and_confused_networks() -> None:
    object_, surroundings = torch.eye(2, dtype=torch.float64)[:, None, None].expand(2, N, V, 2)
    perfect = paired_info_nce(object_, surroundings, object_, surroundings, 0.01)
    assert perfect.item() == pytest.approx(0, abs=1e-12)
    confused = paired_info_nce(object_, object_, object_, object_, 0.2)
    assert confused.item() == pytest.approx(6 * np.log(4)), "four equal logits in each of six terms"


@pytest.mark.parametrize("rank_offset", [0, 3])
def test_unpaired_info_nce(rank_offset: int) -> None:
    queries, keys = randn(N, V, D, grad=True), randn(G, V, D, seed=1)
    assert_same(
        unpaired_info_nce(queries, keys, rank_offset, 0.3), unpaired_oracle(queries, keys, rank_offset, 0.3), queries
    )
    assert torch.autograd.gradcheck(lambda q: unpaired_info_nce(q, keys, rank_offset, 0.3), queries)


def test_paired_logits_put_the_positive_first() -> None:
    queries, keys, negatives = (randn(N, V, D, seed=s) for s in range(3))
    logits = paired_logits(queries, keys, negatives, 0.5)
    assert logits.shape == (N, V, 1 + V)
    for v in range(V):
        assert logits[1, v, 0].item() == pytest.approx(oracles.cosine(queries[1, v], keys[1, (v + 1) % V]).item() / 0.5)
        for i in range(V):
            expected = oracles.cosine(queries[1, v], negatives[1, i]).item() / 0.5
            assert logits[1, v, 1 + i].item() == pytest.approx(expected)


def test_losses_of_the_released_code(reference_values: Callable[[str], Path]) -> None:
    arrays = np.load(reference_values("semcl_15_paired_infonce"))
    names = ("q_anchor", "q_nanchor", "k_anchor", "k_nanchor")
    qa, qn, ka, kn = (torch.from_numpy(arrays[k]).double() for k in names)
    qa, qn = qa.requires_grad_(), qn.requires_grad_()
    temp = float(arrays["temperature"])
    losses = {
        "paired": paired_info_nce(qa, qn, ka, kn, temp),
        "mocov3": unpaired_info_nce(qa, ka, 0, temp) + unpaired_info_nce(qn, kn, 0, temp),
    }
    for name, loss in losses.items():
        value = arrays[f"official_{name}_loss"].item()
        assert loss.item() == pytest.approx(value, rel=1e-9)
        gradients = torch.autograd.grad(loss, (qa, qn))
        for gradient, query in zip(gradients, names[:2], strict=True):
            expected = torch.from_numpy(arrays[f"official_{name}_grad_{query}"])
            torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def test_momentum_of_the_released_code(reference_values: Callable[[str], Path]) -> None:
    """There the cosine is one of whole epochs, here of the run; the formula is the same."""
    arrays = np.load(reference_values("semcl_16_schedules"))
    total = int(arrays["epochs"]) * int(arrays["iters_per_epoch"])
    ours = [ema_momentum(k, total, float(arrays["moco_m"])) for k in range(len(arrays["momentum"]))]
    np.testing.assert_allclose(ours, arrays["momentum"], rtol=1e-12)


# ------------------------------------------------------------------------------------------------ criterion


def make_criterion(paired: bool = True, norm: str = "") -> SemCLCriterion:
    torch.manual_seed(0)
    predictor = MLP(D, num_fc=2, fc_dim=6, out_dim=D, norm=norm, activation="gelu")
    for p in predictor.parameters():  # the initial weights are small
        p.data *= 10
    return SemCLCriterion(predictor=predictor, temp=0.3, paired=paired)


def embed(x: Tensor) -> RegionEmbeddings:
    """(N, D) projections; for features, their outer product with a constant map."""
    ids = torch.zeros(len(x), 1, dtype=torch.int64)
    features = x[:, :, None, None].expand(-1, -1, 2, 2)
    return RegionEmbeddings(z=x[:, None], ids=ids, valid=ids == 0, features=features)


def embeddings(z: Tensor) -> list[RegionEmbeddings]:
    """(n, 6, D) -> those of six views."""
    return [embed(x) for x in z.unbind(1)]


@pytest.mark.parametrize("paired", [True, False])
def test_criterion_equals_oracle(paired: bool) -> None:
    criterion = make_criterion(paired)
    z, keys = randn(N, 6, D).float().requires_grad_(), randn(N, 6, D, seed=1).float()
    losses = criterion(embeddings(z), embeddings(keys), [])
    assert set(losses) == {"loss_pair"}
    q = copy.deepcopy(criterion.predictor).double()(z.double())
    k = keys.double()
    if paired:
        expected = paired_oracle(q[:, :3], k[:, :3], k[:, 3:], 0.3) + paired_oracle(q[:, 3:], k[:, 3:], k[:, :3], 0.3)
    else:
        expected = unpaired_oracle(q[:, :3], k[:, :3], 0, 0.3) + unpaired_oracle(q[:, 3:], k[:, 3:], 0, 0.3)
    torch.testing.assert_close(losses["loss_pair"].double(), expected, **CLOSE)
    gradients = [torch.autograd.grad(x, z, retain_graph=True) for x in (losses["loss_pair"], expected)]
    torch.testing.assert_close(*gradients, **CLOSE)


def test_each_view_is_normalised_by_itself() -> None:
    """Batch norm of the predictor: adding a constant to one view changes nothing."""
    criterion = make_criterion(norm="BN")
    z, keys = randn(N, 6, D).float(), randn(N, 6, D, seed=1).float()
    loss = criterion(embeddings(z), embeddings(keys), [])["loss_pair"]
    z[:, 4] += 7.0
    torch.testing.assert_close(criterion(embeddings(z), embeddings(keys), [])["loss_pair"], loss, rtol=1e-3, atol=1e-4)


def test_metrics_tell_the_share_of_positives_picked() -> None:
    criterion = make_criterion()
    criterion.predictor = torch.nn.Identity()
    object_, surroundings = torch.eye(D)[:2]
    keys = torch.stack([object_] * 3 + [surroundings] * 3).expand(N, 6, D)
    z = keys.clone()
    z[0, 1] = surroundings  # one anchor looks like its surroundings
    criterion(embeddings(z), embeddings(keys), [])
    metrics = criterion.metrics
    assert metrics["anchor_accuracy"].item() == pytest.approx(1 - 1 / (3 * N))
    assert metrics["not_anchor_accuracy"].item() == 1
    assert metrics["feature_std"] > 0.1
    criterion(embeddings(torch.ones(N, 6, D)), embeddings(keys), [])
    assert criterion.metrics["feature_std"].item() == pytest.approx(0, abs=1e-6)


def criterion_step(paired: bool) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of this process' half of G pairs."""
    criterion = make_criterion(paired)
    half = slice(comm.get_rank() * N, (comm.get_rank() + 1) * N) if comm.get_world_size() > 1 else slice(0, G)
    z, keys = randn(G, 6, D).float()[half], randn(G, 6, D, seed=1).float()[half]
    loss = criterion(embeddings(z), embeddings(keys), [])["loss_pair"]
    return loss.detach(), [g.detach() for g in torch.autograd.grad(loss, list(criterion.predictor.parameters()))]


@pytest.mark.parametrize("paired", [True, False])
def test_two_processes_equal_one(paired: bool) -> None:
    """The mean over processes, as DDP makes it; unpaired negatives come from both."""
    loss, gradients = criterion_step(paired)
    results = run_in_processes(criterion_step, paired)
    torch.testing.assert_close(torch.stack([r[0] for r in results]).mean(), loss, **CLOSE)
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(torch.stack([r[1][i] for r in results]).mean(0), gradient, **CLOSE)


# ------------------------------------------------------------------------------------------------ whole model


@pytest.mark.parametrize("loss", ["paired", "unpaired"])
def test_one_training_step(loss: str) -> None:
    model = semcl_model("MODEL.SSL.SEMCL.LOSS", loss)
    losses = model(semcl_batch())
    assert set(losses) == {"loss_pair"} and losses["loss_pair"].isfinite() and losses["loss_pair"].shape == ()
    losses["loss_pair"].backward()
    for name, parameter in model.named_parameters():
        if name.startswith("teacher."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model.get_parameter("student.backbone.stem.conv1.weight").grad.any()


def test_the_loss_falls() -> None:
    model = semcl_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.003)
    values = []
    for _ in range(12):
        loss = model(semcl_batch())["loss_pair"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.85 * values[0]


def test_mixed_precision_step() -> None:
    model = semcl_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(semcl_batch())["loss_pair"]
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.SSL.SEMCL.LOSS", "both"], 'MODEL.SSL.SEMCL.LOSS is "both"'),
        (["MODEL.SSL.SEMCL.TEMP", 0.0], "MODEL.SSL.SEMCL.TEMP is 0.0"),
        (["MODEL.SSL.PREDICTOR.OUT_DIM", 8], "MODEL.SSL.PREDICTOR.OUT_DIM is 8, MODEL.SSL.PROJECTOR.OUT_DIM 16"),
        (["INPUT.PAIRS.SOURCE", "none"], 'INPUT.PAIRS.SOURCE is "none", but SemCL works on pairs'),
        (["INPUT.SSL.NUM_VIEWS", 3], "INPUT.SSL.NUM_VIEWS is 3, but SemCL works on 6 views"),
    ],
)
def test_settings_that_do_not_fit_are_refused(opts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        semcl_model(*opts)


def test_heads_are_those_of_moco_v3() -> None:
    method = SSL_METHOD_REGISTRY.get("SemCL")(semcl_cfg(), {"res5": ShapeSpec(channels=24, stride=32)})
    assert method.num_views == 6 and method.sample is None
    projector, predictor = method.embedder.projector.layers, method.criterion.predictor.layers
    assert list(projector._modules) == ["fc1", "norm1", "act1", "fc2", "norm2"]
    assert list(predictor._modules) == ["fc1", "norm1", "act1", "fc2"]
    assert not projector.norm2.affine and projector.norm1.affine
    assert projector.fc2.bias is None and predictor.fc2.bias is None
    assert projector.fc1.in_features == 24

    swin = ["MODEL.SSL.PROJECTOR.NUM_FC", 3, "MODEL.SSL.PREDICTOR.LAST_NORM", True]
    method = SSL_METHOD_REGISTRY.get("SemCL")(semcl_cfg(*swin), {"res5": ShapeSpec(channels=24, stride=32)})
    assert list(method.embedder.projector.layers._modules)[-2:] == ["fc3", "norm3"]
    assert list(method.criterion.predictor.layers._modules)[-1] == "norm2"
    assert not method.criterion.predictor.layers.norm2.affine


def test_no_region_map_is_predicted() -> None:
    model = semcl_model().eval()
    with pytest.raises(ValueError, match="no region map to predict"):
        model([{"image": torch.zeros(3, 64, 64)}])
