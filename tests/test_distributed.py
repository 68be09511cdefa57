"""Two processes: what they exchange, the loss over the global batch, and training under DistributedDataParallel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import oracles
import pytest
import torch
import torch.distributed as dist
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from multiprocess import run_in_processes
from tiny_slotcon import tiny_batch, tiny_cfg, tiny_model
from torch import Tensor

from d2_objssl.distributed import all_reduce_mean, gather_keys, gather_rows, gather_with_gradient
from d2_objssl.engine import EMATeacher, build_optimizer
from d2_objssl.modeling.heads import MLP
from d2_objssl.modeling.methods.detcon import DetConCriterion
from d2_objssl.modeling.methods.slotcon import SlotConCriterion, active_slots, assign_slots
from d2_objssl.structures import RegionEmbeddings, ViewBatch

N, K, D, SIZE = 2, 8, 3, 2  # images of a process, prototypes, dimensions, cells of a side
MOVING = ["student.backbone.stem.conv1.weight", "criterion.predictor.layers.fc1.weight", "teacher.embedder.prototypes"]


# ------------------------------------------------------------------------------------------------ collectives


def test_one_process_is_the_identity() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    for rows, offset in (*gather_rows([x]), gather_keys(x)):
        assert torch.equal(rows, x) and offset == 0 and not rows.requires_grad
    assert gather_with_gradient(x)[0] is x and gather_with_gradient(x)[1] == 0
    mean = all_reduce_mean(x)
    assert torch.equal(mean, x) and not mean.requires_grad and mean.data_ptr() != x.data_ptr()


def exchange() -> dict[str, Any]:
    rank = comm.get_rank()
    x = torch.full((3, 2), 10.0 * rank, requires_grad=True)
    strided = torch.arange(6.0).reshape(2, 3).T + 10 * rank
    parts = [x[: 1 + 2 * rank], x[: 3 * rank], x[: 2 - 2 * rank]]
    return {
        **dict(zip(("unequal", "none in rank 0", "none in rank 1"), gather_rows(parts), strict=True)),
        "none": gather_rows([x[:0]])[0],
        "matrices": gather_rows([torch.full((1 + rank, 2, 2), rank)])[0],
        "keys": gather_keys(x),
        "strided": gather_keys(strided),
        "mean": all_reduce_mean(x),
        "untouched": x.detach(),
        "requires_grad": [t.requires_grad for t in (gather_rows([x])[0][0], gather_keys(x)[0], all_reduce_mean(x))],
    }


def test_two_processes_exchange() -> None:
    results = run_in_processes(exchange)
    zeros, tens = torch.zeros(3, 2), torch.full((3, 2), 10.0)
    strided = torch.arange(6.0).reshape(2, 3).T
    expected: dict[str, tuple[Tensor, tuple[int, int]]] = {
        "unequal": (torch.cat([zeros[:1], tens]), (0, 1)),
        "none in rank 0": (tens, (0, 0)),
        "none in rank 1": (zeros[:2], (0, 2)),
        "none": (zeros[:0], (0, 0)),
        "matrices": (torch.tensor([0, 1, 1])[:, None, None].expand(3, 2, 2), (0, 1)),
        "keys": (torch.cat([zeros, tens]), (0, 3)),
        "strided": (torch.cat([strided, strided + 10]), (0, 3)),
    }
    for rank, result in enumerate(results):
        for name, (rows, offsets) in expected.items():
            assert torch.equal(result[name][0], rows), name
            assert result[name][1] == offsets[rank], name
        assert torch.equal(result["mean"], torch.full((3, 2), 5.0))
        assert torch.equal(result["untouched"], (zeros, tens)[rank])
        assert result["requires_grad"] == [False] * 3


def weigh_gathered_rows() -> dict[str, Any]:
    """The gradient where process r weighs the i-th of all rows by (i + 1) 10^r."""
    x = torch.full((2, 3), 1.0 + comm.get_rank(), requires_grad=True)
    rows, offset = gather_with_gradient(x)
    weights = torch.arange(1.0, 5.0)[:, None] * 10 ** comm.get_rank()
    (rows * weights).sum().backward()
    return {"rows": rows.detach(), "offset": offset, "gradient": x.grad}


def test_gradients_come_back_from_all_processes() -> None:
    for rank, result in enumerate(run_in_processes(weigh_gathered_rows)):
        assert result["offset"] == 2 * rank
        assert torch.equal(result["rows"], torch.tensor([1.0, 1, 2, 2])[:, None].expand(4, 3))
        expected = 11 * torch.tensor([1.0 + 2 * rank, 2 + 2 * rank])
        assert torch.equal(result["gradient"], expected[:, None].expand(2, 3))


# ------------------------------------------------------------------------------------------------ criterion


def make_criterion() -> SlotConCriterion:
    torch.manual_seed(0)
    return SlotConCriterion(
        predictor=MLP(D, num_fc=2, fc_dim=6, out_dim=D, norm=""),
        num_prototypes=K,
        student_temp=0.3,
        teacher_temp=0.2,
        slot_temp=0.4,
        center_momentum=0.9,
        group_loss_weight=0.5,
    )


def make_embeddings(seed: int, prototypes: Tensor) -> RegionEmbeddings:
    generator = torch.Generator().manual_seed(seed)
    slots, dots = assign_slots(torch.randn(N, D, SIZE, SIZE, generator=generator), prototypes, 0.2)
    ids = torch.arange(K).expand(N, K)
    return RegionEmbeddings(z=slots.requires_grad_(), ids=ids, valid=active_slots(dots), scores=dots, features=dots)


def criterion_step(case: str) -> dict[str, Any]:
    """Loss and gradients of this process, and what they were made of."""
    rank, criterion = comm.get_rank(), make_criterion()
    prototypes = torch.randn(K, D, generator=torch.Generator().manual_seed(1))
    prototypes[K - 1] = 0  # similar to nothing, so it wins no cell
    student, teacher = ([make_embeddings(100 * rank + 10 * role + v, prototypes) for v in (0, 1)] for role in (1, 2))
    if case == "rank 1 without pairs" and rank == 1:
        student[0].valid, student[1].valid = ~teacher[1].valid, ~teacher[0].valid
    views = [ViewBatch(torch.zeros(N, 3, 2, 2), torch.tensor([[0.0, 0, 9, 9]] * N), torch.zeros(N).bool())] * 2
    losses = criterion(student, teacher, views)
    leaves = [s.z for s in student] + list(criterion.predictor.parameters())
    return {
        "loss": losses["loss_slot"].detach(),
        "gradients": list(torch.autograd.grad(losses["loss_slot"], leaves)),
        "center": criterion.center,
        "images_since_active": criterion.images_since_active,
        "student": [(s.z.detach(), s.valid) for s in student],
        "teacher": [(t.z.detach(), t.valid, t.scores) for t in teacher],
    }


@pytest.mark.parametrize("case", ["all have pairs", "rank 1 without pairs"])
def test_slot_loss_sees_the_keys_of_all_processes(case: str) -> None:
    results = run_in_processes(criterion_step, case)
    predictor = make_criterion().predictor.double()
    keys = [torch.cat([r["teacher"][v][0] for r in results]).double() for v in (0, 1)]
    key_active = [torch.cat([r["teacher"][v][1] for r in results]) for v in (0, 1)]
    assert not torch.equal(keys[0][:N], keys[0][N:])
    for rank, result in enumerate(results):
        queries = [z.double().requires_grad_() for z, _ in result["student"]]
        expected = torch.zeros((), dtype=torch.float64)
        num_pairs = 0
        for a, b in ((0, 1), (1, 0)):
            active = result["student"][a][1]
            num_pairs += int((active & result["teacher"][b][1]).sum())
            expected = expected + 0.5 * oracles.slot_nce(
                queries[a], keys[b], active, key_active[b], rank * N, 0.4, predictor
            )
        torch.testing.assert_close(result["loss"].double(), expected, rtol=1e-5, atol=1e-6)
        if case == "rank 1 without pairs" and rank == 1:
            assert num_pairs == 0 and result["loss"] == 0
            assert not any(g.any() for g in result["gradients"])
            continue
        assert num_pairs > 0
        gradients = torch.autograd.grad(expected, [*queries, *predictor.parameters()])
        for own, other in zip(result["gradients"], gradients, strict=True):
            torch.testing.assert_close(own.double(), other, rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_the_global_batch() -> None:
    results = run_in_processes(criterion_step, "all have pairs")
    maps = [t[2] for r in results for t in r["teacher"]]
    center = oracles.update_center(torch.zeros(1, K), maps, 0.9)
    won = torch.stack([oracles.active_slots(m).any(dim=0) for m in maps]).any(dim=0)
    assert won.any() and not won[K - 1]
    for result in results:
        torch.testing.assert_close(result["center"].double(), center, rtol=1e-5, atol=1e-6)
        assert result["images_since_active"].tolist() == [0 if w else 2 * N for w in won]
    for name in ("center", "images_since_active"):
        assert torch.equal(results[0][name], results[1][name])


# ------------------------------------------------------------------------------------------------ DetCon


class TinyDetCon(torch.nn.Module):
    """A linear student, a linear teacher (of DetCon-B), and the criterion; no batch norm."""

    def __init__(self, with_teacher: bool, global_negatives: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student, teacher = torch.nn.Linear(4, D), torch.nn.Linear(4, D).requires_grad_(False)
        self.teacher = teacher if with_teacher else None
        predictor = MLP(D, num_fc=2, fc_dim=5, out_dim=D, norm="") if with_teacher else None
        self.criterion = DetConCriterion(
            predictor=predictor, temp=0.1, max_region_ids=K, global_negatives=global_negatives
        )

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """(n, 2, M, 4) pooled vectors of two views, (n, 2, M) ids -> loss."""
        view = ViewBatch(torch.zeros(len(x), 3, 2, 2), torch.zeros(len(x), 4), torch.zeros(len(x)).bool())

        def embed(branch: torch.nn.Module) -> list[RegionEmbeddings]:
            return [RegionEmbeddings(branch(x[:, v]), ids[:, v], ids[:, v] >= 0) for v in (0, 1)]

        student = embed(self.student)
        teacher = student if self.teacher is None else embed(self.teacher)
        return self.criterion(student, teacher, [view, view])["loss_detcon"]


def detcon_batch() -> tuple[Tensor, Tensor]:
    """Pooled vectors and ids of 2 N images."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 4, (2 * N, 2, 5), generator=generator)
    return torch.randn(2 * N, 2, 5, 4, generator=generator), ids


def detcon_step(with_teacher: bool, global_negatives: bool) -> dict[str, Any]:
    """Loss of this process' half of the batch, and the gradients that DistributedDataParallel makes."""
    mine = slice(comm.get_rank() * N, (comm.get_rank() + 1) * N)
    x, ids = detcon_batch()
    model = TinyDetCon(with_teacher, global_negatives)
    ddp = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    loss = ddp(x[mine], ids[mine])
    loss.backward()
    return {"loss": loss.detach(), "gradients": [p.grad for p in model.parameters() if p.requires_grad]}


@pytest.mark.parametrize("global_negatives", [True, False])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_detcon_of_two_processes_equals_one_with_the_doubled_batch(with_teacher: bool, global_negatives: bool) -> None:
    """Without global negatives, it equals the mean of two independent halves."""
    results = run_in_processes(detcon_step, with_teacher, global_negatives)
    model = TinyDetCon(with_teacher, global_negatives)
    x, ids = detcon_batch()
    halves = model(x[:N], ids[:N]), model(x[N:], ids[N:])
    mean_of_halves = (halves[0] + halves[1]) / 2
    loss = model(x, ids) if global_negatives else mean_of_halves
    assert results[0]["loss"] != results[1]["loss"]
    torch.testing.assert_close((results[0]["loss"] + results[1]["loss"]) / 2, loss, rtol=1e-5, atol=1e-6)
    if global_negatives:
        assert loss > mean_of_halves + 0.1  # negatives of the other half count
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    for result in results:
        for own, other in zip(result["gradients"], gradients, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------ DDP


def find_batch_without_pairs_in_rank_1(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Images of which the two views have no prototype in common, in rank 1 only."""
    for seed in range(100):
        batch = tiny_batch(1, seed=1000 * comm.get_rank() + seed)
        if comm.get_rank() == 0:  # alike, so that they have some in common
            batch[0]["views"][1]["image"] = batch[0]["views"][0]["image"]
        with torch.no_grad():
            model(batch)
        pairs = comm.all_gather(model.criterion.metrics["positive_pairs"].item())
        if pairs[0] > 0 and pairs[1] == 0:
            return batch
    raise AssertionError("no such batch")


def train_two_steps(align: str) -> dict[str, Any]:
    """Two steps, the first one without a positive pair in rank 1; the ranks start with different weights."""
    rank = comm.get_rank()
    opts = ["MODEL.SSL.SLOTCON.ALIGN", align, "MODEL.SSL.SLOTCON.NUM_PROTOTYPES", 64, "SOLVER.BASE_LR", 0.5]
    model = tiny_model(*opts, norm="naiveSyncBN", seed=rank)
    ddp = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    optimizer = build_optimizer(tiny_cfg(*opts), model)
    hook = EMATeacher(model.teacher, model.student, 0.9, "constant")
    hook.trainer = SimpleNamespace(iter=0, max_iter=2, storage=EventStorage())
    if align == "projection":
        first = tiny_batch(4, seed=rank, overlap=rank == 0)
    else:
        first = find_batch_without_pairs_in_rank_1(model)
    start = {k: model.state_dict()[k].clone() for k in MOVING}
    losses, pairs = [], []
    for batch in (first, tiny_batch(2, seed=10 + rank)):
        step_losses = ddp(batch)
        optimizer.zero_grad()
        sum(step_losses.values()).backward()
        optimizer.step()
        hook.after_step()
        losses.append({k: v.item() for k, v in step_losses.items()})
        pairs.append(model.criterion.metrics["positive_pairs"].item())
    return {
        "losses": losses,
        "pairs": pairs,
        "moved": [k for k in MOVING if not torch.equal(model.state_dict()[k], start[k])],
        "start differs": differing_from_rank_0(start),
        "end differs": differing_from_rank_0(model.state_dict()),
        "not finite": [k for k, v in model.state_dict().items() if not v.isfinite().all()],
    }


def differing_from_rank_0(tensors: dict[str, Tensor]) -> list[str]:
    different = []
    for name, value in tensors.items():
        reference = value.clone()
        dist.broadcast(reference, src=0)
        if not torch.equal(reference, value):
            different.append(name)
    return different


@pytest.mark.parametrize("align", ["assignment", "projection"])
def test_processes_stay_together(align: str) -> None:
    """Also when one of them has nothing to compare: its predictor sees no row."""
    first, second = run_in_processes(train_two_steps, align)
    assert first["pairs"][0] > 0 and second["pairs"][0] == 0
    assert second["losses"][0]["loss_slot"] == 0
    assert first["losses"] != second["losses"]
    assert first["moved"] == MOVING
    assert second["start differs"] == [] and second["end differs"] == []
    assert first["not finite"] == [] and second["not finite"] == []
