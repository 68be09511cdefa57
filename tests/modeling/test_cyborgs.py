"""CYBORGS' losses against naive loops, the phases of its criterion, its configs, and training steps in two processes.

N images, C channels, K clusters, n cells of a batch, h, w cells.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import oracles
import pytest
import tiny_cyborgs
import tiny_runs
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils import comm
from multiprocess import run_in_processes
from tiny_slotcon import REPO_ROOT, SIDE, tiny_batch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from d2_objssl import add_objssl_config
from d2_objssl.checkpoint import ObjSSLCheckpointer, checkpoint_metadata
from d2_objssl.data import collate_views
from d2_objssl.modeling import ObjectSSL
from d2_objssl.modeling.heads import MLP
from d2_objssl.modeling.methods import cyborgs
from d2_objssl.modeling.methods.cyborgs import (
    CyborgsCriterion,
    consistency_loss,
    euclidean_distance,
    vmf_distance,
    vmf_loss,
)
from d2_objssl.structures import RegionEmbeddings, ViewBatch

CELLS, C, K = 6, 4, 3
EXACT = {"rtol": 1e-11, "atol": 1e-12}
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # float32


def randn(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_(grad)


def unit(x: Tensor) -> Tensor:
    return x / (x * x).sum(dim=1, keepdim=True).sqrt()


def random_labels(seed: int, k: int = K) -> Tensor:
    return torch.randint(k, (CELLS,), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ oracles


def oracle_vmf(cell: Tensor, centroids: Tensor, label: int, kappa: float) -> Tensor:
    """Eq. 4 for one cell; the centroids have unit length, so their inner product with a direction is the cosine."""
    exponents = [torch.exp(kappa * oracles.cosine(cell, mu)) for mu in centroids]
    return -torch.log(exponents[label] / oracles.total(exponents))


def oracle_euclidean(cell: Tensor, centroids: Tensor, label: int) -> Tensor:
    length = torch.sqrt(oracles.dot(cell, cell))
    return torch.sqrt(oracles.total([(cell[c] / length - centroids[label][c]) ** 2 for c in range(len(cell))]))


def oracle_consistency(y1, y2, p1, p2, l1, l2, d) -> Tensor:
    """Eq. 3: mu is the cluster of a cell in the first view, mu' that of the cell of the same index in the second."""
    terms = []
    for i in range(len(y1)):
        own, other = int(l1[i]), int(l2[i])
        terms += [d(y1[i], p1, own), d(y2[i], p2, other), d(y1[i], p2, other), d(y2[i], p1, own)]
    return oracles.total(terms) / len(y1)


# ------------------------------------------------------------------------------------------------ pure functions


def make_views(k1: int = K, k2: int = K) -> tuple[Tensor, ...]:
    """Features of two views with gradient, centroids, labels."""
    centroids = unit(randn(k1, C, seed=2)), unit(randn(k2, C, seed=3))
    features = 3 * randn(CELLS, C).detach(), 0.1 * randn(CELLS, C, seed=1)
    labels = random_labels(4, k1), random_labels(5, k2)
    return *(f.requires_grad_() for f in features), *centroids, *labels


@pytest.mark.parametrize("kappa", [10.0, 0.5])
@pytest.mark.parametrize("k2", [K, 5])
def test_vmf_loss(kappa: float, k2: int) -> None:
    views = make_views(k2=k2)
    loss, oracle = vmf_loss(*views, kappa), oracle_consistency(*views, partial(oracle_vmf, kappa=kappa))
    torch.testing.assert_close(loss, oracle, **EXACT)
    own = torch.autograd.grad(loss, views[:2])
    torch.testing.assert_close(own, torch.autograd.grad(oracle, views[:2]), **EXACT)
    assert torch.autograd.gradcheck(lambda a, b: vmf_loss(a, b, *views[2:], kappa), views[:2])


def test_euclidean_loss() -> None:
    views = make_views(k2=5)
    loss, oracle = consistency_loss(*views, euclidean_distance), oracle_consistency(*views, oracle_euclidean)
    torch.testing.assert_close(loss, oracle, **EXACT)
    own = torch.autograd.grad(loss, views[:2])
    torch.testing.assert_close(own, torch.autograd.grad(oracle, views[:2]), **EXACT)
    assert torch.autograd.gradcheck(lambda a, b: consistency_loss(a, b, *views[2:], euclidean_distance), views[:2])


def test_known_values() -> None:
    """Orthogonal clusters: the posterior of the own one is e^kappa / (e^kappa + K - 1)."""
    centroids, labels = torch.eye(K).double(), torch.arange(K)
    cells = 7 * centroids
    expected = torch.log(torch.tensor(1 + (K - 1) * torch.e**-2.0)).double()
    torch.testing.assert_close(vmf_distance(cells, centroids, labels, 2.0), expected, rtol=1e-6, atol=0)
    assert euclidean_distance(cells, centroids, labels).item() == pytest.approx(0, abs=1e-12)
    assert euclidean_distance(cells, centroids, labels.roll(1)).item() == pytest.approx(2**0.5)


def test_lengths_of_features_do_not_matter() -> None:
    y1, y2, *rest = make_views()
    for scale in (1e-3, 1e3):
        torch.testing.assert_close(vmf_loss(scale * y1, scale * y2, *rest, 10.0), vmf_loss(y1, y2, *rest, 10.0))


def test_the_loss_pulls_towards_the_own_cluster() -> None:
    """The released code has the opposite sign."""
    centroids = torch.eye(2).double()
    cell = torch.tensor([[1.0, 0.8]]).double().requires_grad_()
    label = torch.zeros(1, dtype=torch.int64)
    vmf_loss(cell, cell.detach(), centroids, centroids, label, label, 10.0).backward()
    assert cell.grad is not None
    moved = cell.detach() - 0.1 * cell.grad
    assert unit(moved)[0, 0] > unit(cell.detach())[0, 0]


def test_euclidean_gradient_is_finite_at_a_centroid() -> None:
    """A cluster of one cell has that cell as its centroid."""
    cell = torch.tensor([[0.6, 0.8]]).double().requires_grad_()
    euclidean_distance(cell, torch.nn.functional.normalize(cell.detach()), torch.zeros(1).long()).backward()
    assert cell.grad is not None and cell.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------ criterion

N, H, W, D = 2, 2, 3, 5


def make_criterion(**kwargs: Any) -> CyborgsCriterion:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "distance": partial(vmf_distance, kappa=10.0),
        "consistency_weight": 0.1,
        "min_clusters": 2,
        "max_clusters": 4,
        "warmup_clusters": 3,
        "kmeans_iters": 5,
        "predictor": MLP(D, num_fc=1, fc_dim=D, out_dim=D),
        "temp": 0.1,
        "max_region_ids": 4,
    }
    return CyborgsCriterion(**{**settings, **kwargs})


def make_branch(seed: int) -> list[RegionEmbeddings]:
    """Embeddings of 4 regions and fused maps of two views, with gradient."""
    ids = torch.arange(4).expand(N, 4)
    return [
        RegionEmbeddings(
            z=randn(N, 4, D, seed=s).float().requires_grad_(),
            ids=ids,
            valid=torch.ones_like(ids, dtype=torch.bool),
            features=randn(N, C, H, W, seed=s + 50).float().requires_grad_(),
        )
        for s in (seed, seed + 1)
    ]


def blank_views() -> list[ViewBatch]:
    return [ViewBatch(torch.zeros(N, 3, 2, 2), torch.zeros(N, 4), torch.zeros(N).bool()) for _ in range(2)]


def record_clusterings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the criterion clusters, and what comes out, in order."""
    calls: list[dict[str, Any]] = []

    def recorded(features: Tensor, num_clusters: int, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
        result = spherical_kmeans(features, num_clusters, iterations, seed)
        calls.append({"features": features.detach(), "k": num_clusters, "seed": seed, "result": result})
        return result

    spherical_kmeans = cyborgs.spherical_kmeans
    monkeypatch.setattr(cyborgs, "spherical_kmeans", recorded)
    return calls


@pytest.mark.parametrize(("warmup", "weight"), [(True, 1.0), (False, 0.1)])
@pytest.mark.parametrize("name", ["vmf", "euclidean"])
def test_consistency_loss_equals_oracle(
    monkeypatch: pytest.MonkeyPatch, name: str, warmup: bool, weight: float
) -> None:
    """Both ways to hand the views to the networks, added; the weight holds behind the warm-up."""
    distance, oracle = {
        "vmf": (partial(vmf_distance, kappa=10.0), partial(oracle_vmf, kappa=10.0)),
        "euclidean": (euclidean_distance, oracle_euclidean),
    }[name]
    criterion = make_criterion(distance=distance)
    criterion.set_phase(warmup=warmup, consistency=True)
    calls = record_clusterings(monkeypatch)
    student, teacher = make_branch(1), make_branch(3)
    loss = criterion(student, teacher, blank_views())["loss_consistency"]

    def cells(e: RegionEmbeddings) -> Tensor:
        return torch.stack([e.features[n, :, i, j] for n in range(N) for i in range(H) for j in range(W)]).double()

    maps = {f"{b}{v}": cells(e) for b, branch in (("y", student), ("t", teacher)) for v, e in enumerate(branch)}
    clusterings = {}
    for key, value in maps.items():
        found = [c["result"] for c in calls if torch.equal(c["features"].double(), value.detach())]
        assert len(found) == 1, "every map is clustered once"
        clusterings[key] = (found[0][0].double(), found[0][1])
    terms = []
    for a, b in (("y0", "t1"), ("y1", "t0")):
        (p1, l1), (p2, l2) = clusterings[a], clusterings[b]
        terms.append(oracle_consistency(maps[a], maps[b].detach(), p1, p2, l1, l2, oracle))
    expected = weight * oracles.total(terms)
    torch.testing.assert_close(loss.double(), expected, **CLOSE)
    inputs = [e.features for e in student]
    own = torch.autograd.grad(loss, inputs, retain_graph=True)
    torch.testing.assert_close(own, torch.autograd.grad(expected, inputs, retain_graph=True), **CLOSE)
    none = torch.autograd.grad(loss, [e.features for e in teacher], allow_unused=True)
    assert none == (None, None), "targets and clusterings have no gradient"


def test_phases() -> None:
    criterion = make_criterion()
    student, teacher, views = make_branch(1), make_branch(3), blank_views()
    region, consistency = {"regions_per_view", "feature_std"}, {"clusters", "cluster_entropy", "cell_std"}
    for warmup, on, losses, metrics in (
        (True, True, {"loss_consistency"}, consistency),
        (False, False, {"loss_detcon"}, region),
        (False, True, {"loss_detcon", "loss_consistency"}, region | consistency),
    ):
        criterion.set_phase(warmup=warmup, consistency=on)
        assert set(criterion(student, teacher, views)) == losses
        found = {k for k in criterion.metrics if k in region | consistency}
        assert found == metrics, "metrics of another phase are stale"


def test_number_of_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """K ~ U[min, max], both included, one for all clusterings of a step; a constant in the warm-up."""
    criterion = make_criterion()
    calls = record_clusterings(monkeypatch)
    student, teacher, views = make_branch(1), make_branch(3), blank_views()
    for _ in range(40):
        criterion(student, teacher, views)
    steps = [calls[i : i + 4] for i in range(0, len(calls), 4)]
    assert all(len({c["k"] for c in step}) == 1 for step in steps)
    assert {step[0]["k"] for step in steps} == {2, 3, 4}
    assert len({step[0]["seed"] for step in steps}) == 40
    calls.clear()
    criterion.set_phase(warmup=True, consistency=True)
    criterion(student, teacher, views)
    assert {c["k"] for c in calls} == {3}


def test_random_numbers_come_from_the_global_generator() -> None:
    """So that a resumed run draws what the other one would have drawn."""
    criterion, views = make_criterion(), blank_views()
    values = []
    for _ in range(2):
        torch.manual_seed(5)
        values.append([criterion(make_branch(1), make_branch(3), views)["loss_consistency"].item() for _ in range(4)])
    assert values[0] == values[1]
    assert len(set(values[0])) > 1


def test_metrics_tell_collapse() -> None:
    criterion, views = make_criterion(), blank_views()
    criterion.set_phase(warmup=True, consistency=True)
    criterion(make_branch(1), make_branch(3), views)
    assert criterion.metrics["clusters"] == 3
    assert 0.5 < criterion.metrics["cluster_entropy"] <= 1
    assert criterion.metrics["cell_std"] > 0.5
    collapsed = make_branch(1)
    for e in collapsed:
        e.features = torch.ones(N, C, H, W, requires_grad=True)
    loss = criterion(collapsed, make_branch(3), views)["loss_consistency"]
    assert loss.isfinite()
    assert criterion.metrics["cluster_entropy"].item() == pytest.approx(0, abs=1e-6)
    assert criterion.metrics["cell_std"].item() == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------------ whole model


def cyborgs_cfg(*opts: Any) -> CfgNode:
    """The pretraining config with a narrow R50, 64-pixel views (4 x 4 cells), small heads, few clusters."""
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.merge_from_file(str(REPO_ROOT / "configs" / "pretrain" / "Base-CYBORGS-R50.yaml"))
    tiny: list[Any] = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.STEM_OUT_CHANNELS", 8]
    tiny += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.WIDTH_PER_GROUP", 4, "VIS_PERIOD", 0]
    tiny += ["MODEL.SSL.GRID_FEATURE", "res4", "INPUT.SSL.CROP_SIZE", SIDE, "MODEL.SSL.CYBORGS.WARMUP_CLUSTERS", 4]
    tiny += ["MODEL.SSL.CYBORGS.MAX_CLUSTERS", 6, "MODEL.SSL.CYBORGS.KMEANS_ITERS", 5]
    for head in ("PROJECTOR", "PREDICTOR"):
        node = f"MODEL.SSL.{head}"
        tiny += [f"{node}.FC_DIM", 32, f"{node}.OUT_DIM", 16, f"{node}.NORM", "BN"]
    cfg.merge_from_list([*tiny, *opts])
    cfg.freeze()
    return cfg


def cyborgs_model(*opts: Any) -> ObjectSSL:
    torch.manual_seed(0)
    return build_model(cyborgs_cfg(*opts)).train()


def cyborgs_batch(n: int = 4, *, num_ids: int | None = None) -> list[dict[str, Any]]:
    """`tiny_batch`, with `num_ids` regions of equal cells in every view if given."""
    batch = tiny_batch(n)
    if num_ids is not None:
        cells = (torch.arange(16) % num_ids).view(4, 4).repeat_interleave(SIDE // 4, 0).repeat_interleave(SIDE // 4, 1)
        for image in batch:
            for view in image["views"]:
                view["region_map"] = cells.to(torch.int16)
    return batch


HEADS = ("student.embedder.projector.", "criterion.predictor.")


def check_gradients(model: torch.nn.Module, without: tuple[str, ...]) -> None:
    """Every trained parameter has a finite gradient, except those whose names start with `without`: these have none."""
    for name, parameter in model.named_parameters():
        if name.startswith(("teacher.", *without)):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model.get_parameter("student.backbone.stem.conv1.weight").grad.any()


def test_warmup_step_without_region_maps() -> None:
    """A gradient of 0 would let weight decay, which LARS scales up, shrink the heads to nothing."""
    model = cyborgs_model()
    model.criterion.set_phase(warmup=True, consistency=True)
    losses = model(cyborgs_batch())
    assert set(losses) == {"loss_consistency"}
    sum(losses.values()).backward()
    check_gradients(model, without=HEADS)


@pytest.mark.parametrize("consistency", ["vmf", "euclidean"])
def test_step_behind_the_warmup(consistency: str) -> None:
    model = cyborgs_model("MODEL.SSL.CYBORGS.CONSISTENCY", consistency)
    losses = model(cyborgs_batch(num_ids=5))
    assert set(losses) == {"loss_detcon", "loss_consistency"}
    assert all(loss.isfinite() and loss > 0 and loss.shape == () for loss in losses.values())
    sum(losses.values()).backward()
    check_gradients(model, without=())


def test_missing_region_maps_are_an_error_behind_the_warmup() -> None:
    with pytest.raises(ValueError, match=r"INPUT\.REGIONS\.SOURCE"):
        cyborgs_model()(cyborgs_batch())


def test_mixed_precision_step() -> None:
    model = cyborgs_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(cyborgs_batch(num_ids=5))
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    check_gradients(model, without=())


def test_networks_draw_their_own_regions() -> None:
    """Without replacement: 16 present regions are all drawn; of more than that, each network has others."""
    seen: dict[str, list[Tensor]] = {}
    model = cyborgs_model()
    for name in ("student", "teacher"):
        embedder = getattr(model, name).embedder
        seen[name] = []
        embedder.register_forward_hook(lambda m, args, out, name=name: seen[name].append(out.ids))
    model(cyborgs_batch(2, num_ids=16))
    for ids in (*seen["student"], *seen["teacher"]):
        assert torch.equal(ids.sort(dim=1).values, torch.arange(16).expand(2, 16))
    assert not torch.equal(seen["student"][0], seen["teacher"][0])


def test_regions_that_are_absent_are_not_drawn() -> None:
    model = cyborgs_model()
    views = model.preprocess_views(collate_views(cyborgs_batch(2, num_ids=3)).views)
    for regions in model.sample_regions(views):
        assert set(regions.ids.flatten().tolist()) == {0, 1, 2}
        assert regions.weights.flatten(2).any(dim=2).all()
        counts = torch.stack([(regions.ids == i).sum(dim=1) for i in range(3)])
        assert counts.min() >= 5 and counts.max() <= 6, "each region comes once before any comes twice"


def test_copies_have_phases_of_their_own() -> None:
    model = cyborgs_model()
    other = copy.deepcopy(model)
    other.criterion.set_phase(warmup=True, consistency=True)
    assert set(other(cyborgs_batch())) == {"loss_consistency"}
    assert set(model(cyborgs_batch(num_ids=4))) == {"loss_detcon", "loss_consistency"}


def test_the_loss_falls() -> None:
    model, batch = cyborgs_model(), cyborgs_batch(num_ids=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.003)
    values = []
    for _ in range(12):
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        values.append(losses["loss_detcon"].item())
    assert values[-1] < 0.9 * values[0]


# ------------------------------------------------------------------------------------------------ two processes


def half_of(batch: list[dict[str, Any]], rank: int) -> list[dict[str, Any]]:
    return batch[2 * rank : 2 * rank + 2]


def warmup_gradients(rank: int, distributed: bool) -> dict[str, Tensor | None]:
    """Gradients of the warm-up on one half of the batch; where `distributed`, of all processes' halves."""
    model = cyborgs_model()
    model.criterion.set_phase(warmup=True, consistency=True)
    runner = DistributedDataParallel(model, find_unused_parameters=model.idle_parameters) if distributed else model
    torch.manual_seed(7 + rank)
    sum(runner(half_of(cyborgs_batch(), rank)).values()).backward()
    return {k: p.grad for k, p in model.named_parameters()}


def steps_in_processes() -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """Gradients of the warm-up, and parameters after some steps of all phases."""
    rank = comm.get_rank()
    gradients = warmup_gradients(rank, distributed=True)
    model = cyborgs_model()
    ddp = DistributedDataParallel(model, find_unused_parameters=model.idle_parameters)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for warmup, consistency in ((True, True), (False, True), (False, False)):
        model.criterion.set_phase(warmup=warmup, consistency=consistency)
        losses = ddp(half_of(cyborgs_batch(num_ids=None if warmup else 5), rank))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        check_gradients(model, without=HEADS if warmup else ())
        optimizer.step()
    return gradients, {k: p.detach() for k, p in model.named_parameters() if k.startswith(("student.", "criterion."))}


def test_two_processes_average_their_own_clusterings() -> None:
    results = run_in_processes(steps_in_processes)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes: other rounding may give other clusters
    halves = [warmup_gradients(rank, distributed=False) for rank in (0, 1)]
    torch.set_num_threads(num_threads)
    for name, first in halves[0].items():
        for gradients, _ in results:
            if first is None:
                assert gradients[name] is None, name
            else:
                mean = (first + halves[1][name]) / 2
                torch.testing.assert_close(
                    gradients[name], mean, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name]), name


def run_trainer(cfg: CfgNode) -> dict[int, Any]:
    return tiny_runs.train(cfg, seed=comm.get_rank())


@pytest.mark.slow
def test_trainer_in_two_processes(tmp_path: Path) -> None:
    """Two iterations of warm-up, which leave the heads as they are, and two with bootstrapped masks."""
    photos = tiny_runs.write_photos(tmp_path / "photos", 8)
    opts = ["SOLVER.MAX_ITER", 4, "SOLVER.WARMUP_ITERS", 0, "SOLVER.CHECKPOINT_PERIOD", 1]
    opts += ["MODEL.SSL.CYBORGS.WARMUP_EPOCHS", 1.0, "MODEL.SSL.CYBORGS.VMF_PERIOD", 1]
    cfg = tiny_cyborgs.cyborgs_cfg(photos, tmp_path / "run", *opts)
    losses = run_in_processes(run_trainer, cfg)[0]
    assert [("loss_detcon" in losses[i]) for i in range(4)] == [False, False, True, True]
    weights = [torch.load(tmp_path / "run" / f"model_{i:07d}.pth", weights_only=True)["model"] for i in range(3)]
    for name in ("student.backbone.stem.conv1.weight", *(f"{head}layers.fc1.weight" for head in HEADS)):
        idle = name.startswith(HEADS)
        assert torch.equal(weights[0][name], weights[1][name]) == idle, name
        assert not torch.equal(weights[1][name], weights[2][name]), name


# ------------------------------------------------------------------------------------------------ inference


def two_halves(height: int = 64, width: int = 96) -> Tensor:
    """(3, H, W) uint8: vertical stripes on the left, horizontal ones in another colour on the right."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[:, ::4] = (250, 200, 20)
    image[:, width // 2 :] = (10, 10, 120)
    image[::4, width // 2 :] = (0, 250, 250)
    return torch.from_numpy(image).permute(2, 0, 1)


def test_inference_clusters_the_image() -> None:
    model = cyborgs_model("MODEL.SSL.CYBORGS.WARMUP_CLUSTERS", 2, "INPUT.SSL.CROP_SIZE", 64).eval()
    state = torch.get_rng_state()
    inputs = [{"image": two_halves(), "height": 32, "width": 48}, {"image": two_halves(96, 96)}]
    maps = [x["region_map"] for x in model(inputs)]
    assert [m.shape for m in maps] == [(32, 48), (96, 96)]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(maps[0], model(inputs[:1])[0]["region_map"])
    left, right = maps[0][:, :16].float().mean(), maps[0][:, 32:].float().mean()
    assert {round(left.item()), round(right.item())} == {0, 1} and abs(left - right) > 0.8


def test_inference_with_fewer_cells_than_clusters() -> None:
    model = cyborgs_model("MODEL.SSL.CYBORGS.WARMUP_CLUSTERS", 50).eval()
    region_map = model([{"image": two_halves()}])[0]["region_map"]
    assert region_map.shape == (64, 96) and 0 <= region_map.min() and region_map.max() < 24  # 4 x 6 cells


def test_tool_draws_regions(load_tool, tmp_path: Path) -> None:
    tool: ModuleType = load_tool("visualize")
    for i in range(2):
        cv2.imwrite(str(tmp_path / f"{i}.png"), two_halves().permute(1, 2, 0).numpy())
    opts = ["DATASETS.TRAIN", (f"images:{tmp_path}",), "OUTPUT_DIR", str(tmp_path / "run")]
    cfg = cyborgs_cfg(*opts)
    model = build_model(cfg)
    ObjSSLCheckpointer(model, str(tmp_path), metadata=checkpoint_metadata(cfg)).save("model")
    config = tmp_path / "config.yaml"
    config.write_text(cfg.dump())
    tool.main(["regions", "--config-file", str(config), "--weights", str(tmp_path / "model.pth"), "--num-images", "2"])
    assert cv2.imread(str(tmp_path / "run" / "regions.png")) is not None


# ------------------------------------------------------------------------------------------------ configs


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.SSL.CYBORGS.MIN_CLUSTERS", 9, "MODEL.SSL.CYBORGS.MAX_CLUSTERS", 8], "MAX_CLUSTERS is 8.*at least 9"),
        (["MODEL.SSL.CYBORGS.MIN_CLUSTERS", 0], "MIN_CLUSTERS is 0.*at least 1"),
        (["MODEL.SSL.CYBORGS.MAX_CLUSTERS", 257], "MAX_CLUSTERS is 257.*MAX_REGION_IDS 256"),
        (["MODEL.SSL.CYBORGS.CONSISTENCY", "cosine"], 'CONSISTENCY is "cosine"; known:'),
        (["MODEL.SSL.CYBORGS.WARMUP_CLUSTERS", 0], "WARMUP_CLUSTERS is 0"),
        (["MODEL.SSL.CYBORGS.KMEANS_ITERS", 0], "KMEANS_ITERS is 0"),
        (["MODEL.SSL.CYBORGS.VMF_WEIGHT", -0.1], "VMF_WEIGHT is -0.1"),
        (["MODEL.SSL.TEACHER.ENABLED", False], "TEACHER.ENABLED is False; CYBORGS"),
        (["MODEL.SSL.EXPORT_BRANCH", "teacher"], "EXPORT_BRANCH.*CYBORGS"),
        (["MODEL.SSL.PREDICTOR.OUT_DIM", 8], "PREDICTOR.OUT_DIM is 8.*CYBORGS"),
        (["MODEL.SSL.DETCON.NUM_VIEWS", 1], "NUM_VIEWS is 1; CYBORGS"),
        (["INPUT.REGIONS.SOURCE", "none"], 'SOURCE is "none"; CYBORGS'),
    ],
)
def test_contradictions_are_refused(opts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(cyborgs_cfg(*opts))


@pytest.mark.parametrize(
    "path", sorted((REPO_ROOT / "configs" / "pretrain").rglob("cyborgs_*.yaml")), ids=lambda p: p.stem
)
def test_config_has_the_papers_values(path: Path) -> None:
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.merge_from_file(str(path))
    solver, ssl, values = cfg.SOLVER, cfg.MODEL.SSL, cfg.MODEL.SSL.CYBORGS
    assert (solver.OPTIMIZER, solver.IMS_PER_BATCH, solver.BASE_LR, solver.WEIGHT_DECAY) == ("LARS", 64, 0.1, 1.5e-6)
    assert (solver.REFERENCE_BATCH, solver.MAX_EPOCHS, solver.WARMUP_EPOCHS) == (0, 800, 10)
    assert (solver.LR_SCHEDULER_NAME, solver.STEPS_EPOCHS, solver.GAMMA) == ("WarmupMultiStepLR", (768, 784), 0.1)
    assert (ssl.TEACHER.MOMENTUM, ssl.TEACHER.MOMENTUM_SCHEDULE, ssl.EXPORT_BRANCH) == (0.996, "constant", "student")
    for head in (ssl.PROJECTOR, ssl.PREDICTOR):
        assert (head.NUM_FC, head.FC_DIM, head.OUT_DIM, head.ACTIVATION, head.LAST_BIAS) == (
            2,
            4096,
            256,
            "relu",
            False,
        )
    assert (values.VMF_KAPPA, values.VMF_WEIGHT, values.VMF_PERIOD) == (10, 0.1, 5)
    assert (values.WARMUP_EPOCHS, values.WARMUP_CLUSTERS, values.BOOTSTRAP_PERIOD) == (5, 8, 100)
    assert (values.MIN_CLUSTERS, values.MAX_CLUSTERS, values.KMEANS_ITERS) == (2, 256, 20)
    assert (values.BOOTSTRAP_FEATURE, values.IMAGES_PER_CLUSTERING) == ("res3.2", 16)
    assert (ssl.IN_FEATURES, ssl.DETCON.NUM_REGIONS, ssl.DETCON.TEMP) == (["res3", "res4", "res5"], 16, 0.1)
    changed = {values.CONSISTENCY, cfg.INPUT.REGIONS.SOURCE} - {"vmf", "bootstrap"}
    assert len(changed) == ("ablations" in path.parts)
