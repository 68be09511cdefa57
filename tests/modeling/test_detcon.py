"""DetCon's loss against naive loops, what it reduces to, and one training step of every variant.

N images, G images of all processes, M regions of a view, D dimensions.
"""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from detectron2.layers import ShapeSpec
from tiny_detcon import DETCON_S, quadrants, tiny_detcon, tiny_detcon_cfg, tiny_region_batch
from torch import Tensor

from d2_objssl.modeling.heads import MLP
from d2_objssl.modeling.methods import detcon
from d2_objssl.modeling.methods.detcon import DetConCriterion, DetConEmbedder, detcon_nce
from d2_objssl.modeling.methods.registry import SSL_METHOD_REGISTRY
from d2_objssl.modeling.region_pool import RegionSampler, masked_average_pool
from d2_objssl.structures import RegionEmbeddings, Regions, ViewBatch

N, G, M, D = 3, 5, 4, 3
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def randn(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_(grad)


def random_ids(seed: int) -> list[Tensor]:
    """Ids of both views, with repeats; the last image has no region in common."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 4, (N, M), generator=generator) for _ in range(2)]
    ids[1][-1] += 10
    return ids


# ------------------------------------------------------------------------------------------------ detcon_nce


@pytest.mark.parametrize("local_negatives", [True, False])
@pytest.mark.parametrize("same_ids", [True, False])
@pytest.mark.parametrize("rank_offset", [0, 2])
@pytest.mark.parametrize("max_logits", [None, 1])
def test_detcon_nce(
    local_negatives: bool, same_ids: bool, rank_offset: int, max_logits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or block by block, with targets of the same regions or of others."""
    if max_logits is not None:
        monkeypatch.setattr(detcon, "_MAX_LOGITS", max_logits)
    preds = [randn(N, M, D, seed=v, grad=True) for v in (1, 2)]
    targets = [randn(G, M, D, seed=v, grad=True) for v in (3, 4)]
    ids = random_ids(0)
    target_ids = ids if same_ids else random_ids(1)
    ours = detcon_nce(*preds, *targets, *ids, *target_ids, rank_offset, 0.3, local_negatives)
    expected = oracles.detcon_nce(preds, targets, ids, target_ids, rank_offset, 0.3, local_negatives)
    torch.testing.assert_close(ours, expected, **EXACT)
    inputs = [*preds, *targets]
    torch.testing.assert_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs), **EXACT)


@pytest.mark.parametrize("max_logits", [2**20, 1])
def test_gradient_of_detcon_nce(max_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detcon, "_MAX_LOGITS", max_logits)
    inputs = [
        *(randn(2, 2, 2, seed=v, grad=True) for v in (1, 2)),
        *(randn(3, 2, 2, seed=v, grad=True) for v in (3, 4)),
    ]
    ids = [torch.tensor([[0, 0], [1, 2]]), torch.tensor([[0, 1], [2, 2]])]
    assert torch.autograd.gradcheck(lambda *x: detcon_nce(*x, *ids, *ids, 1, 0.3), inputs)


def test_distinct_regions_give_the_papers_equations() -> None:
    """Eq. 1-3 as they are written, where every region of a view is drawn once."""
    preds, targets = ([randn(N, M, D, seed=s + v) for v in (0, 1)] for s in (1, 3))
    ids = [torch.stack([torch.randperm(M, generator=torch.Generator().manual_seed(9 * b + v)) for b in range(N)])
           for v in (0, 1)]  # fmt: skip
    terms = []
    for own, other in ((0, 1), (1, 0)):
        for b in range(N):
            for m in range(M):
                v = preds[own][b, m]
                same = [ids[view][b].tolist().index(ids[own][b, m]) for view in (0, 1)]
                positive = torch.exp(oracles.cosine(v, targets[other][b, same[other]]) / 0.1)
                negatives = [
                    torch.exp(oracles.cosine(v, targets[view][g, u]) / 0.1)
                    for view in (0, 1) for g in range(N) for u in range(M) if (g, u) != (b, same[view])
                ]  # fmt: skip
                terms.append(-torch.log(positive / (positive + oracles.total(negatives))))
    expected = oracles.total(terms) / (N * M)
    torch.testing.assert_close(detcon_nce(*preds, *targets, *ids, *ids), expected, **EXACT)


@pytest.mark.parametrize("local_negatives", [True, False])
@pytest.mark.parametrize("n", [1, N])
def test_without_a_common_region_the_loss_is_zero(n: int, local_negatives: bool) -> None:
    """Of a single image, without local negatives, there is nothing at all to compare with."""
    preds = [randn(n, M, D, seed=v).float().requires_grad_() for v in (1, 2)]
    ids = [torch.zeros(n, M, dtype=torch.int64), torch.ones(n, M, dtype=torch.int64)]
    loss = detcon_nce(*preds, *preds, *ids, *ids, local_negatives=local_negatives)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, preds):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_alike_targets_in_float32() -> None:
    """What is left out must not take precision from the rest."""
    preds, ids = [randn(N, M, D, seed=v).float() for v in (1, 2)], random_ids(0)
    targets = [torch.ones(N, M, D) for _ in range(2)]
    loss = detcon_nce(*preds, *targets, *ids, *ids)
    expected = oracles.detcon_nce([p.double() for p in preds], [t.double() for t in targets], ids, ids, 0, 0.1, True)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------ one global region


def test_one_global_region_is_simclr() -> None:
    """The sum of two means over N, where SimCLR takes one mean over 2 N."""
    z = [randn(N, 1, D, seed=v, grad=True) for v in (1, 2)]
    ids = [torch.zeros(N, 1, dtype=torch.int64)] * 2
    loss, expected = detcon_nce(*z, *z, *ids, *ids), 2 * oracles.nt_xent(z[0][:, 0], z[1][:, 0], 0.1)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z), **EXACT)


@pytest.mark.parametrize("copies", [2, 16])
def test_copies_of_the_global_region_teach_the_same(copies: int) -> None:
    """Table 4 a: loss -> (loss + 2 log copies) / copies, so that the gradient keeps its direction."""
    z = [randn(N, 1, D, seed=v, grad=True) for v in (1, 2)]
    ids = [torch.zeros(N, 1, dtype=torch.int64)] * 2
    once = detcon_nce(*z, *z, *ids, *ids)
    repeated, more_ids = [x.expand(N, copies, D) for x in z], [i.expand(N, copies) for i in ids]
    often = detcon_nce(*repeated, *repeated, *more_ids, *more_ids)
    torch.testing.assert_close(often, (once + 2 * torch.log(torch.tensor(float(copies)).double())) / copies, **EXACT)
    gradients = torch.autograd.grad(often, z), torch.autograd.grad(once, z)
    torch.testing.assert_close(gradients[0], tuple(g / copies for g in gradients[1]), **EXACT)


def test_detcon_s_model_of_global_regions_is_simclr() -> None:
    model = tiny_detcon(*DETCON_S, "MODEL.SSL.DETCON.NUM_REGIONS", 1, "INPUT.REGIONS.SOURCE", "global")
    kept: list[RegionEmbeddings] = []
    model.student.register_forward_hook(lambda module, args, output: kept.append(output))
    loss = model(tiny_region_batch(region_map=quadrants(num_ids=1)))["loss_detcon"]
    assert [k.z.shape for k in kept] == [(4, 1, 16)] * 2
    torch.testing.assert_close(
        loss.double(), 2 * oracles.nt_xent(kept[0].z[:, 0].double(), kept[1].z[:, 0].double(), 0.1), rtol=1e-5, atol=0
    )


# ------------------------------------------------------------------------------------------------ modules


def test_embedder() -> None:
    torch.manual_seed(0)
    features = {"fine": torch.randn(2, 3, 4, 4), "coarse": torch.randn(2, 2, 2, 2), "unused": torch.randn(2, 9, 1, 1)}
    projector = MLP(5, num_fc=2, fc_dim=8, out_dim=D, norm="BN")
    weights = torch.rand(2, M, 4, 4)
    weights[1, 2] = 0
    regions = Regions(ids=torch.arange(2 * M).view(2, M), weights=weights)
    view = ViewBatch(torch.zeros(2, 3, 8, 8), torch.zeros(2, 4), torch.zeros(2).bool())
    args: dict[str, Any] = {"in_features": ["fine", "coarse"], "grid_feature": "fine", "projector": projector}
    out = DetConEmbedder(**args, keep_features=True)(features, view, regions)
    repeated = features["coarse"].repeat_interleave(2, 2).repeat_interleave(2, 3)
    fused = torch.cat([features["fine"], repeated], dim=1)
    assert out.features is not None and torch.equal(out.features, fused)
    torch.testing.assert_close(out.z, projector(masked_average_pool(fused, weights)))
    assert torch.equal(out.ids, regions.ids)
    assert out.valid.tolist() == [[True] * M, [True, True, False, True]]
    assert DetConEmbedder(**args)(features, view, regions).features is None


def embeddings(z: Tensor, ids: Tensor) -> RegionEmbeddings:
    return RegionEmbeddings(z=z, ids=ids, valid=torch.ones_like(ids, dtype=torch.bool))


def views(count: int = 2, overlapping: bool = False) -> list[ViewBatch]:
    boxes = torch.zeros(N, 4)
    return [ViewBatch(torch.zeros(N, 3, 2, 2), boxes, torch.zeros(N).bool(), overlapping=overlapping)] * count


@pytest.mark.parametrize("local_negatives", [True, False])
def test_criterion_of_detcon_b(local_negatives: bool) -> None:
    torch.manual_seed(0)
    predictor = MLP(D, num_fc=1, fc_dim=0, out_dim=D)
    criterion = DetConCriterion(predictor=predictor, temp=0.2, max_region_ids=20, local_negatives=local_negatives)
    z, targets = ([randn(N, M, D, seed=s + v).float().requires_grad_() for v in (0, 1)] for s in (1, 3))
    ids, target_ids = random_ids(0), random_ids(1)
    student, teacher = ([embeddings(x, i) for x, i in zip(*p, strict=True)] for p in ((z, ids), (targets, target_ids)))
    losses = criterion(student, teacher, views())
    assert set(losses) == {"loss_detcon"}
    expected = oracles.detcon_nce(
        [predictor(x).double() for x in z], [t.double() for t in targets], ids, target_ids, 0, 0.2, local_negatives
    )
    torch.testing.assert_close(losses["loss_detcon"].double(), expected, rtol=1e-5, atol=1e-6)
    losses["loss_detcon"].backward()
    assert all(x.grad is not None and x.grad.any() for x in [*z, predictor.layers.fc1.weight])
    assert all(t.grad is None for t in targets)


@pytest.mark.parametrize("num_views", [1, 2])
def test_criterion_of_detcon_s(num_views: int) -> None:
    """Targets get a gradient, too; of one view the first half of its regions is contrasted with the second."""
    criterion = DetConCriterion(predictor=None, temp=0.2, max_region_ids=20)
    z, ids = [randn(N, M, D, seed=v).float().requires_grad_() for v in (1, 2)], random_ids(0)
    if num_views == 1:
        student = [embeddings(torch.cat(z, dim=1), torch.cat(ids, dim=1))]
    else:
        student = [embeddings(x, i) for x, i in zip(z, ids, strict=True)]
    loss = criterion(student, student, views(num_views))["loss_detcon"]
    reference = [x.detach().double().requires_grad_() for x in z]
    expected = oracles.detcon_nce(reference, reference, ids, ids, 0, 0.2, True)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for own, other in zip(torch.autograd.grad(loss, z), torch.autograd.grad(expected, reference), strict=True):
        torch.testing.assert_close(own.double(), other, rtol=1e-4, atol=1e-6)


def test_metrics() -> None:
    criterion = DetConCriterion(predictor=None, temp=0.1, max_region_ids=8)
    ids = [torch.tensor([[0, 0, 0, 1], [8, 8, 8, 8]]), torch.tensor([[1, 2, 0, 3], [8, 8, 8, 8]])]
    collapsed = [embeddings(torch.ones(2, 4, D), i) for i in ids]
    criterion(collapsed, collapsed, views())
    metrics = {k: v.item() for k, v in criterion.metrics.items()}
    assert metrics == pytest.approx(
        {"regions_per_view": (2 + 1 + 4 + 1) / 4, "positive_pairs": (2 + 1) / 2, "images_without_region": 1,
         "feature_std": 0}, abs=1e-6,
    )  # fmt: skip
    spread = [embeddings(randn(2, 4, D, seed=v), i) for v, i in enumerate(ids)]
    criterion(spread, spread, views(overlapping=True))
    assert criterion.metrics["images_without_region"] == 0  # of overlapping regions it is the id 16
    assert criterion.metrics["feature_std"] > 0.5


# ------------------------------------------------------------------------------------------------ models


ONE_VIEW = ["MODEL.SSL.DETCON.NUM_VIEWS", 1, "INPUT.SSL.NUM_VIEWS", 1]
SAMPLE = ["MODEL.SSL.DETCON.POOLING", "sample"]


@pytest.mark.parametrize(
    ("opts", "num_views"),
    [
        ([], 2),
        ([*SAMPLE, "MODEL.SSL.DETCON.LOCAL_NEGATIVES", False], 2),
        (ONE_VIEW, 1),
        (DETCON_S, 2),
        ([*DETCON_S, *SAMPLE, *ONE_VIEW], 1),
    ],
)
def test_one_step(opts: list[Any], num_views: int) -> None:
    """The student learns, in float32 and bfloat16 alike; the teacher does not."""
    model = tiny_detcon(*opts)
    batch = tiny_region_batch(num_views=num_views)
    losses = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses.append(model(batch)["loss_detcon"])
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.2)
    losses[1].backward()
    for name, parameter in model.named_parameters():
        if name.startswith("teacher."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model.student.embedder.projector.layers.fc1.weight.grad.any()
    assert (model.teacher is None) == ("DetConS" in opts) == (model.criterion.predictor is None)


def test_student_and_teacher_see_the_same_regions() -> None:
    model = tiny_detcon()
    seen: dict[str, list[Regions]] = {"student": [], "teacher": []}
    for name, regions in seen.items():
        module = getattr(model, name)
        module.register_forward_pre_hook(lambda module, args, regions=regions: regions.append(args[1]))
    model(tiny_region_batch())
    for own, other in zip(seen["student"], seen["teacher"], strict=True):
        assert own is other
    assert not torch.equal(seen["student"][0].ids, seen["student"][1].ids)
    assert seen["student"][0].weights.shape == (4, 4, 4, 4)


def test_overlapping_regions() -> None:
    """Bit r of a pixel is region r; images without any are one region."""
    bits = (quadrants() > 0).int() + 2 * (quadrants() > 1).int()
    model = tiny_detcon()
    model(tiny_region_batch(region_map=bits, overlapping=True))
    assert model.criterion.metrics["regions_per_view"] <= 2
    assert model.criterion.metrics["images_without_region"] == 0
    assert model(tiny_region_batch(region_map=0 * bits, overlapping=True))["loss_detcon"].isfinite()
    assert model.criterion.metrics["images_without_region"] == 4


def test_views_without_region_maps_name_the_key() -> None:
    batch = tiny_region_batch()
    for image in batch:
        for view in image["views"]:
            view["region_map"] = None
    with pytest.raises(ValueError, match=r"INPUT\.REGIONS\.SOURCE"):
        tiny_detcon()(batch)


# ------------------------------------------------------------------------------------------------ builders

SHAPES = {"res4": ShapeSpec(channels=6, stride=16), "res5": ShapeSpec(channels=10, stride=32)}


def build(*opts: Any) -> Any:
    cfg = tiny_detcon_cfg(*opts)
    return SSL_METHOD_REGISTRY.get(cfg.MODEL.SSL.METHOD)(cfg, SHAPES)


def test_builders() -> None:
    b, s = build("MODEL.SSL.DETCON.TEMP", 0.3), build(*DETCON_S, *SAMPLE, "MODEL.SSL.GRID_FEATURE", "")
    assert b.num_views == s.num_views == 2
    assert b.sample == RegionSampler(num_regions=4, max_region_ids=16, stride=16)
    assert s.sample == RegionSampler(num_regions=4, max_region_ids=16, stride=32, single_cells=True)
    assert b.embedder.projector.layers.fc1.in_features == 16 and b.embedder.projector.layers.fc2.bias is None
    assert s.embedder.grid_feature == "res5" and not s.embedder.keep_features
    assert b.criterion.temp == 0.3 and b.criterion.predictor.layers.fc2.bias is None
    assert s.criterion.predictor is None
    assert (b.criterion.local_negatives, b.criterion.global_negatives) == (True, True)
    changed = build("MODEL.SSL.DETCON.LOCAL_NEGATIVES", False, "MODEL.SSL.DETCON.GLOBAL_NEGATIVES", False).criterion
    assert (changed.local_negatives, changed.global_negatives) == (False, False)


def test_one_view_draws_both_sides_at_once(caplog: pytest.LogCaptureFixture) -> None:
    method = build(*ONE_VIEW)
    assert (method.num_views, method.sample.num_regions) == (1, 8)
    build(*DETCON_S, *SAMPLE, *ONE_VIEW)
    assert not caplog.records
    build(*DETCON_S, *ONE_VIEW)
    assert "same vector" in caplog.text and "POOLING" in caplog.text


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.SSL.TEACHER.ENABLED", False], "MODEL.SSL.TEACHER.ENABLED is False; DetConB needs True"),
        (["MODEL.SSL.METHOD", "DetConS"], "MODEL.SSL.TEACHER.ENABLED is True; DetConS needs False"),
        (["MODEL.SSL.EXPORT_BRANCH", "teacher"], 'MODEL.SSL.EXPORT_BRANCH is "teacher"'),
        (["MODEL.SSL.PREDICTOR.OUT_DIM", 8], "MODEL.SSL.PREDICTOR.OUT_DIM is 8"),
        (["MODEL.SSL.DETCON.NUM_VIEWS", 3], "MODEL.SSL.DETCON.NUM_VIEWS is 3"),
        (["MODEL.SSL.DETCON.POOLING", "max"], "MODEL.SSL.DETCON.POOLING is 'max'"),
        (["MODEL.SSL.DETCON.NUM_REGIONS", 0], "MODEL.SSL.DETCON.NUM_REGIONS is 0"),
        (["INPUT.REGIONS.SOURCE", "none"], 'INPUT.REGIONS.SOURCE is "none"'),
        (["INPUT.REGIONS.SOURCE", "bootstrap"], 'INPUT.REGIONS.SOURCE is "bootstrap"'),
    ],
)
def test_contradictions_are_refused(opts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(*opts)
