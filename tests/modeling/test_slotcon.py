"""SlotCon's losses against naive loops, at their edges, and one training step of every variant.

N images, K prototypes, D dimensions, h, w cells.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from detectron2.layers import ShapeSpec
from tiny_slotcon import tiny_batch, tiny_cfg, tiny_model
from torch import Tensor, nn

from d2_objssl.data import collate_views
from d2_objssl.modeling.heads import MLP
from d2_objssl.modeling.methods.registry import SSL_METHOD_REGISTRY
from d2_objssl.modeling.methods.slotcon import (
    SlotConCriterion,
    active_slots,
    assign_slots,
    compact_slot_nce,
    grouping_loss,
    image_nce,
    slot_nce,
    slot_regression,
    update_center,
)
from d2_objssl.structures import RegionEmbeddings, ViewBatch

N, K, D, H, W = 3, 5, 4, 2, 3
EXACT = {"rtol": 1e-11, "atol": 1e-12}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32


def randn(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_(grad)


def random_active(n: int, seed: int) -> Tensor:
    return torch.rand(n, K, generator=torch.Generator().manual_seed(seed)) < 0.6


def assert_same(ours: Tensor, oracle: Tensor, *inputs: Tensor) -> None:
    """Equal values, and equal gradients with respect to `inputs`."""
    torch.testing.assert_close(ours, oracle, **EXACT)
    weights = randn(*ours.shape, seed=99)
    own = torch.autograd.grad((ours * weights).sum(), inputs, retain_graph=True)
    other = torch.autograd.grad((oracle * weights).sum(), inputs, retain_graph=True)
    torch.testing.assert_close(own, other, **EXACT)


# ------------------------------------------------------------------------------------------------ pure functions


def test_assign_slots() -> None:
    features, prototypes = randn(N, D, H, W, grad=True), randn(K, D, seed=1, grad=True)
    slots, dots = assign_slots(features, prototypes, temp=0.3)
    assert slots.shape == (N, K, D) and dots.shape == (N, K, H, W)
    expected_slots, expected_dots = oracles.assign_slots(features, prototypes, temp=0.3)
    assert_same(slots, expected_slots, features, prototypes)
    assert_same(dots, expected_dots, features, prototypes)
    assert torch.autograd.gradcheck(lambda f, p: assign_slots(f, p, 0.3), (features, prototypes))


def test_assign_slots_with_few_prototypes_and_sharp_attention() -> None:
    """The eps keeps a prototype that attends to nothing from dividing by zero: it becomes the mean of all cells."""
    features = torch.tensor([1.0, 0.0]).double().reshape(1, 2, 1, 1).repeat(1, 1, 2, 2)
    slots, dots = assign_slots(features, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double(), temp=1e-4)
    torch.testing.assert_close(slots, torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]).double())
    assert dots[0, :, 0, 0].tolist() == [1, -1]


def test_active_slots() -> None:
    dots = randn(N, K, H, W)
    active = active_slots(dots)
    assert active.dtype == torch.bool
    assert torch.equal(active, oracles.active_slots(dots))
    dots[1, 2] = 10.0  # one prototype wins all of an image
    assert active_slots(dots)[1].tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("valid", [None, [True, False, True, True, False, True, False]])
def test_grouping_loss(valid: list[bool] | None) -> None:
    student, teacher, center = randn(7, K, grad=True), randn(7, K, seed=1), 0.3 * randn(1, K, seed=2)
    mask = None if valid is None else torch.tensor(valid)

    def loss(x: Tensor) -> Tensor:
        return grouping_loss(x, teacher, center, 0.4, 0.2, mask)

    assert_same(loss(student), oracles.grouping_loss(student, teacher, center, 0.4, 0.2, valid), student)
    assert torch.autograd.gradcheck(loss, student)
    if valid is not None:
        (gradient,) = torch.autograd.grad(loss(student), student)
        assert not gradient[~torch.tensor(valid)].any()


def test_grouping_loss_without_valid_cells_is_zero() -> None:
    student = randn(7, K, grad=True)
    loss = grouping_loss(student, randn(7, K, seed=1), torch.zeros(1, K).double(), 0.1, 0.07, torch.zeros(7).bool())
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_update_center() -> None:
    center, maps = randn(1, K), [randn(N, K, H, W, seed=s) for s in (1, 2)]
    mean = torch.cat(maps).mean(dim=(0, 2, 3))[None]
    torch.testing.assert_close(update_center(center, mean, 0.9), oracles.update_center(center, maps, 0.9), **EXACT)


@pytest.mark.parametrize("with_predictor", [False, True])
@pytest.mark.parametrize("rank_offset", [0, 2])
def test_slot_nce(with_predictor: bool, rank_offset: int) -> None:
    num_keys = N + 3
    queries, keys = randn(N, K, D, grad=True), randn(num_keys, K, D, seed=1)
    query_active, key_active = random_active(N, 2), random_active(num_keys, 3)
    own_keys = key_active[rank_offset : rank_offset + N]
    assert 0 < (query_active & own_keys).sum() < query_active.sum()
    weight, bias = randn(D, D, seed=4, grad=True), randn(D, seed=5, grad=True)
    predictor = None if not with_predictor else lambda z: nn.functional.linear(z, weight, bias)
    predict_one = None if not with_predictor else lambda z: torch.stack([oracles.dot(r, z) for r in weight]) + bias
    inputs = (queries, weight, bias) if with_predictor else (queries,)

    def loss(q: Tensor, *_: Tensor) -> Tensor:
        return slot_nce(q, keys, query_active, key_active, rank_offset, 0.5, predictor)

    expected = oracles.slot_nce(queries, keys, query_active, key_active, rank_offset, 0.5, predict_one)
    assert_same(loss(queries), expected, *inputs)
    assert torch.autograd.gradcheck(loss, inputs)


def test_slot_nce_with_an_image_without_pairs() -> None:
    """Its keys still serve the others."""
    queries, keys = randn(N, K, D, grad=True), randn(N, K, D, seed=1)
    query_active, key_active = torch.ones(N, K).bool(), torch.ones(N, K).bool()
    query_active[1] = False
    loss = slot_nce(queries, keys, query_active, key_active, 0, 0.2)
    assert_same(loss, oracles.slot_nce(queries, keys, query_active, key_active, 0, 0.2), queries)
    (gradient,) = torch.autograd.grad(loss, queries)
    assert not gradient[1].any() and gradient[0].any()
    key_active[1] = False
    assert slot_nce(queries, keys, query_active, key_active, 0, 0.2) < loss


def test_slot_nce_with_a_single_pair() -> None:
    queries, keys = randn(N, K, D, grad=True), randn(N, K, D, seed=1)
    query_active, key_active = torch.zeros(N, K).bool(), torch.zeros(N, K).bool()
    query_active[2, 3] = key_active[2, 3] = key_active[0, 0] = True
    loss = slot_nce(queries, keys, query_active, key_active, 0, 0.2)
    assert_same(loss, oracles.slot_nce(queries, keys, query_active, key_active, 0, 0.2), queries)
    key_active[0, 0] = False  # no negative is left
    assert slot_nce(queries, keys, query_active, key_active, 0, 0.2).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("norm", ["", "BN"])
def test_slot_nce_without_pairs_is_zero(norm: str) -> None:
    """Nothing to compare gave a loss of NaN; and the predictor must have a gradient in every process."""
    predictor = MLP(D, num_fc=2, fc_dim=6, out_dim=D, norm=norm).double()
    queries, keys = randn(N, K, D, grad=True), randn(N, K, D, seed=1)
    query_active = random_active(N, 2)
    loss = slot_nce(queries, keys, query_active, ~query_active, 0, 0.2, predictor)
    assert loss.item() == 0
    loss.backward()
    for gradient in (queries.grad, *(p.grad for p in predictor.parameters())):
        assert gradient is not None and torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("norm", ["", "BN"])
def test_single_pair_goes_through_the_predictor(norm: str) -> None:
    """Batch norm cannot normalise one row by its own statistics."""
    predictor = MLP(D, num_fc=3, fc_dim=6, out_dim=D, norm=norm).double()
    queries, keys = randn(N, K, D, grad=True), randn(N, K, D, seed=1)
    query_active, key_active = torch.zeros(N, K).bool(), random_active(N, 3)
    query_active[1, 1] = key_active[1, 1] = True
    loss = slot_nce(queries, keys, query_active, key_active, 0, 0.2, predictor)
    assert loss.isfinite() and loss > 0
    loss.backward()
    assert queries.grad is not None and queries.grad[1, 1].any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in predictor.parameters())


def test_compact_slot_nce_equals_slot_nce() -> None:
    queries, keys = randn(N, K, D, grad=True), randn(N, K, D, seed=1)
    query_active, key_active = random_active(N, 2), random_active(N, 3)
    row: dict[tuple[int, ...], int] = {}
    for n in range(N):
        for k in range(K):
            if key_active[n, k]:
                row[n, k] = len(row)
    pairs = query_active & key_active
    labels = torch.tensor([row[tuple(position)] for position in pairs.nonzero().tolist()])
    compact = compact_slot_nce(queries[pairs], keys[key_active], labels, 0.2)
    assert_same(compact, oracles.slot_nce(queries, keys, query_active, key_active, 0, 0.2), queries)


@pytest.mark.parametrize("rows", [6, 1])
def test_slot_regression(rows: int) -> None:
    queries, keys = randn(rows, D, grad=True), randn(rows, D, seed=1)
    assert_same(slot_regression(queries, keys), oracles.slot_regression(queries, keys), queries)
    assert torch.autograd.gradcheck(lambda q: slot_regression(q, keys), queries)


def test_slot_regression_without_pairs_is_zero() -> None:
    queries = randn(0, D, grad=True)
    loss = slot_regression(queries, randn(0, D))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, queries)[0].shape == (0, D)


@pytest.mark.parametrize("rank_offset", [0, 2])
def test_image_nce(rank_offset: int) -> None:
    queries, keys = randn(3, D, grad=True), randn(6, D, seed=1)
    assert_same(image_nce(queries, keys, rank_offset, 0.3), oracles.image_nce(queries, keys, rank_offset, 0.3), queries)
    assert torch.autograd.gradcheck(lambda q: image_nce(q, keys, rank_offset, 0.3), queries)


# ------------------------------------------------------------------------------------------------ criterion


def make_criterion(**kwargs: Any) -> SlotConCriterion:
    settings: dict[str, Any] = {
        "predictor": MLP(D, num_fc=2, fc_dim=6, out_dim=D, norm=""),
        "num_prototypes": K,
        "student_temp": 0.3,
        "teacher_temp": 0.2,
        "slot_temp": 0.4,
        "center_momentum": 0.9,
        "group_loss_weight": 0.3,
    }
    torch.manual_seed(0)
    return SlotConCriterion(**{**settings, **kwargs})


def embed(z: Tensor, prototypes: Tensor) -> RegionEmbeddings:
    slots, dots = assign_slots(z, prototypes, 0.2)
    ids = torch.arange(K).expand(len(z), K)
    return RegionEmbeddings(z=slots, ids=ids, valid=active_slots(dots), scores=dots, features=z)


def make_embeddings() -> tuple[list[RegionEmbeddings], list[RegionEmbeddings], list[Tensor]]:
    """Student's and teacher's of two views, and the student's inputs; float32, as in training."""
    maps = [randn(N, D, H, W, seed=s).float().requires_grad_() for s in (1, 2)]
    prototypes = randn(K, D, seed=3).float().requires_grad_()
    student = [embed(z, prototypes) for z in maps]
    teacher = [embed(randn(N, D, H, W, seed=s).float(), randn(K, D, seed=6).float()) for s in (4, 5)]
    return student, teacher, [*maps, prototypes]


def make_views(boxes: list[list[list[float]]], flips: list[list[bool]]) -> list[ViewBatch]:
    return [
        ViewBatch(
            images=torch.zeros(N, 3, 2, 2), crop_boxes=torch.tensor(b, dtype=torch.float32), hflip=torch.tensor(f)
        )
        for b, f in zip(boxes, flips, strict=True)
    ]


# The crops of the last image do not meet.
BOXES: list[list[list[float]]] = [
    [[0, 0, 60, 60], [10, 20, 90, 80], [0, 0, 20, 20]],
    [[30, 10, 80, 70], [0, 0, 100, 100], [70, 0, 99, 30]],
]
FLIPS = [[False, True, False], [True, False, True]]


def oracle_cells(scores: Tensor, own: list[list[float]], flips: list[bool], other: list[list[float]]) -> Tensor:
    """Aligned scores (N, K, h, w) as cells (N h w, K) in float64."""
    rois = [oracles.overlap_roi(a, f, b)[0] for a, f, b in zip(own, flips, other, strict=True)]
    aligned = oracles.align_features(scores.double(), rois, flips)
    return torch.stack([aligned[n, :, i, j] for n in range(N) for i in range(H) for j in range(W)])


def test_criterion_equals_oracle() -> None:
    """The total loss: alignment, grouping without the image whose crops do not meet, slots through the predictor."""
    criterion = make_criterion()
    criterion.center.copy_(0.2 * randn(1, K, seed=7))
    center = criterion.center.double()
    student, teacher, inputs = make_embeddings()
    losses = criterion(student, teacher, make_views(BOXES, FLIPS))
    assert set(losses) == {"loss_group", "loss_slot"}

    predictor = copy.deepcopy(criterion.predictor).double()
    valid = [n < 2 for n in range(N) for _ in range(H * W)]
    group, slot = [], []
    for a, b in ((0, 1), (1, 0)):
        q = oracle_cells(student[a].scores, BOXES[a], FLIPS[a], BOXES[b])
        k = oracle_cells(teacher[b].scores, BOXES[b], FLIPS[b], BOXES[a])
        group.append(oracles.grouping_loss(q, k, center, 0.3, 0.2, valid))
        active = [oracles.active_slots(e.scores) for e in (student[a], teacher[b])]
        slots = [e.z.double() for e in (student[a], teacher[b])]
        slot.append(oracles.slot_nce(*slots, *active, 0, 0.4, predictor))
    expected = {"loss_group": 0.3 * oracles.total(group), "loss_slot": 0.7 * oracles.total(slot)}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].double(), value, **CLOSE)
        own = torch.autograd.grad(losses[name], inputs, retain_graph=True)
        torch.testing.assert_close(own, torch.autograd.grad(value, inputs, retain_graph=True), **CLOSE)
    # The centre moves after the loss, by the scores before alignment.
    moved = oracles.update_center(center, [t.scores.double() for t in teacher], 0.9)
    torch.testing.assert_close(criterion.center.double(), moved, **CLOSE)


def test_criterion_keeps_track_of_prototypes() -> None:
    criterion = make_criterion()
    student, teacher, _ = make_embeddings()
    views = make_views(BOXES, FLIPS)
    for t in teacher:
        t.valid = torch.zeros_like(t.valid)
    teacher[0].valid[1, 2] = teacher[1].valid[0, 4] = True
    criterion(student, teacher, views)
    criterion(student, teacher, views)
    assert criterion.images_since_active.tolist() == [2 * N, 2 * N, 0, 2 * N, 0]
    assert criterion.metrics["active_slots"].item() == pytest.approx(1 / N)
    assert criterion.metrics["dead_prototypes"].item() == 0
    pairs = [(student[a].valid & teacher[b].valid).sum().item() / N for a, b in ((0, 1), (1, 0))]
    assert criterion.metrics["positive_pairs"].item() == pytest.approx(sum(pairs) / 2)
    criterion.images_since_active.fill_(4999 - N)
    criterion(student, teacher, views)
    assert criterion.metrics["dead_prototypes"].item() == 0
    criterion(student, teacher, views)
    assert criterion.metrics["dead_prototypes"].item() == K - 2


def test_feature_std_tells_collapse() -> None:
    criterion = make_criterion()
    student, teacher, _ = make_embeddings()
    views = make_views(BOXES, FLIPS)
    for s in student:
        s.features = torch.ones(N, D, H, W)
    criterion(student, teacher, views)
    assert criterion.metrics["feature_std"].item() == pytest.approx(0, abs=1e-6)
    for s in student:  # directions spread over a sphere of many dimensions
        s.features = torch.randn(N, 2000, H, W)
    criterion(student, teacher, views)
    assert 0.8 < criterion.metrics["feature_std"].item() < 1.2


def test_evaluation_leaves_the_statistics_alone() -> None:
    criterion = make_criterion().eval()
    student, teacher, _ = make_embeddings()
    criterion(student, teacher, make_views(BOXES, FLIPS))
    assert not criterion.center.any() and not criterion.images_since_active.any()


@pytest.mark.parametrize("norm", ["", "BN"])
@pytest.mark.parametrize("regression", [False, True])
def test_no_pair_at_all(norm: str, regression: bool) -> None:
    criterion = make_criterion(predictor=MLP(D, num_fc=2, fc_dim=6, out_dim=D, norm=norm), regression=regression)
    student, teacher, inputs = make_embeddings()
    for s, t in zip(student, reversed(teacher), strict=True):
        t.valid = ~s.valid
    losses = criterion(student, teacher, make_views(BOXES, FLIPS))
    assert losses["loss_slot"].item() == 0
    parameters = list(criterion.predictor.parameters())
    gradients = torch.autograd.grad(losses["loss_slot"], [*inputs, *parameters], retain_graph=True)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
    assert losses["loss_group"] > 0
    assert criterion.center.isfinite().all()


@pytest.mark.parametrize("align_assignment", [False, True])
def test_no_overlap_at_all(align_assignment: bool) -> None:
    criterion = make_criterion(align_assignment=align_assignment)
    student, teacher, inputs = make_embeddings()
    boxes = [[[0.0, 0.0, 20.0, 20.0]] * N, [[300.0, 0.0, 330.0, 30.0]] * N]
    losses = criterion(student, teacher, make_views(boxes, FLIPS))
    assert losses["loss_group"].item() == 0
    gradients = torch.autograd.grad(losses["loss_group"], inputs, retain_graph=True)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
    assert losses["loss_slot"] > 0


# ------------------------------------------------------------------------------------------------ whole model

VARIANTS: dict[str, list[Any]] = {
    "default": [],
    "projection": ["MODEL.SSL.SLOTCON.ALIGN", "projection"],
    "regression": ["MODEL.SSL.SLOTCON.SLOT_LOSS", "regression"],
    "image loss": ["MODEL.SSL.SLOTCON.IMAGE_LOSS_WEIGHT", 0.5],
    "all variants": [
        "MODEL.SSL.SLOTCON.ALIGN", "projection", "MODEL.SSL.SLOTCON.SLOT_LOSS", "regression",
        "MODEL.SSL.SLOTCON.IMAGE_LOSS_WEIGHT", 0.5,
    ],
    "several levels": [
        "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"], "MODEL.SSL.IN_FEATURES", ["res3", "res4", "res5"],
        "MODEL.SSL.GRID_FEATURE", "res4",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "overlap"), [*((v, True) for v in VARIANTS), ("default", False), ("projection", False)]
)
def test_one_training_step(variant: str, overlap: bool) -> None:
    model = tiny_model(*VARIANTS[variant])
    losses = model(tiny_batch(overlap=overlap))
    names = {"loss_group", "loss_slot"} | ({"loss_image"} if model.criterion.image_loss_weight > 0 else set())
    assert set(losses) == names
    for name, loss in losses.items():
        assert loss.shape == () and loss.isfinite(), name
    assert (losses["loss_group"] > 0) == overlap
    if "projection" in VARIANTS[variant]:
        assert (losses["loss_slot"] > 0) == overlap, "images without overlap have no slots"
    sum(losses.values()).backward()
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    assert trained == {k for k, _ in model.named_parameters() if not k.startswith("teacher.")}
    for name, parameter in model.named_parameters():
        if name in trained:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name
    if overlap:
        for name in (
            "student.backbone.stem.conv1.weight",
            "student.embedder.prototypes",
            "criterion.predictor.layers.fc3.weight",
        ):
            assert model.get_parameter(name).grad.any(), name


def test_projection_counts_no_slots_where_crops_do_not_meet() -> None:
    """A map of zeros made prototype 0 win every cell: active in both views, and compared as a pair of zero vectors."""
    model = tiny_model(*VARIANTS["projection"])
    batch = tiny_batch(3)
    batch[1]["views"][1]["crop_box"] += 1000
    views = model.preprocess_views(collate_views(batch).views)
    regions = model.sample_regions(views)
    with torch.no_grad():
        embedded = [model.student(v, r) for v, r in zip(views, regions, strict=True)]
    for e in embedded:
        assert e.valid.any(dim=1).tolist() == [True, False, True]


def test_mixed_precision_step() -> None:
    model = tiny_model(*VARIANTS["image loss"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(tiny_batch())
    for name, loss in losses.items():
        assert loss.dtype == torch.float32 and loss.isfinite(), name
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    full = tiny_model(*VARIANTS["image loss"])(tiny_batch())
    assert losses["loss_group"].item() == pytest.approx(full["loss_group"].item(), rel=0.05)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.SSL.SLOTCON.ALIGN", "both"], 'MODEL.SSL.SLOTCON.ALIGN is "both"'),
        (["MODEL.SSL.SLOTCON.SLOT_LOSS", "none"], 'MODEL.SSL.SLOTCON.SLOT_LOSS is "none"'),
        (["MODEL.SSL.PREDICTOR.OUT_DIM", 8], "MODEL.SSL.PREDICTOR.OUT_DIM is 8, MODEL.SSL.PROJECTOR.OUT_DIM 16"),
    ],
)
def test_settings_that_do_not_fit_are_refused(opts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(*opts)


def test_settings_reach_the_modules() -> None:
    node = "MODEL.SSL.SLOTCON"
    cfg = tiny_cfg(
        f"{node}.STUDENT_TEMP", 0.11, f"{node}.TEACHER_TEMP", 0.12, f"{node}.SLOT_TEMP", 0.13,
        f"{node}.CENTER_MOMENTUM", 0.14, f"{node}.GROUP_LOSS_WEIGHT", 0.15, f"{node}.IMAGE_LOSS_WEIGHT", 0.16,
    )  # fmt: skip
    method = SSL_METHOD_REGISTRY.get("SlotCon")(cfg, {"res5": ShapeSpec(channels=24, stride=32)})
    criterion = method.criterion
    assert method.embedder.temp == criterion.teacher_temp == 0.12
    assert (criterion.student_temp, criterion.slot_temp, criterion.center_momentum) == (0.11, 0.13, 0.14)
    assert (criterion.group_loss_weight, criterion.image_loss_weight) == (0.15, 0.16)
    assert method.embedder.prototypes.std().item() == pytest.approx(1, abs=0.3)


def test_registry_knows_slotcon() -> None:
    builder: Callable = SSL_METHOD_REGISTRY.get("SlotCon")
    method = builder(tiny_cfg(), {"res5": ShapeSpec(channels=24, stride=32)})
    assert method.num_views == 2 and method.sample is None
    assert method.embedder.prototypes.shape == (8, 16)
    assert method.embedder.projector.layers.fc1.in_features == 24
