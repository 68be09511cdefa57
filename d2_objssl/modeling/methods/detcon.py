"""DetCon: efficient visual pretraining with contrastive detection (Hénaff et al., ICCV 2021).

    N images, G images of all processes, M regions drawn from a view, D dimensions, C channels, h, w cells

    of the paper                                       here
    masks on the grid, mask-pooled vectors (3.1)       region_pool.region_weights, masked_average_pool
    sampling of 16 masks a view (3.1)                  region_pool.sample_regions, RegionSampler
    objective (Eq. 1-3)                                detcon_nce
    projection, prediction (A.2)                       DetConEmbedder, DetConCriterion
    DetCon-S, DetCon-B                                 the builders DetConS, DetConB
    local features at high resolution (4.4)            MODEL.SSL.DETCON.POOLING "sample", region_pool.sample_cells
    local negatives, one view (4.4, Table 5)           GLOBAL_NEGATIVES, NUM_VIEWS in MODEL.SSL.DETCON

Where paper and released code differ, this is the code:

* Several positives of a query share its label equally, as soft labels of one softmax over everything (Eq. 1-3: a sum of
  softmaxes, each with one positive in its denominator).
* A query is weighted by 1 / (how often its region was drawn from its view), so that a region counts once however often
  it is drawn, and the mean is over all N M queries, those without a positive included.
* Drawings of the query's own region from its own view are no negatives: they would be the query itself.
* Regions are drawn with replacement. Student and teacher of a view get the same ones, the two views draw independently.
* The last layer of a head has no bias; batch norm takes all N M vectors of a view together.

With one region, the whole image, and M = 1 DetCon-S is SimCLR: the loss is twice NT-Xent's mean over 2 N anchors. With
M copies of that region it becomes (loss + 2 log M) / M: the same gradient divided by M, to which LARS is blind but for
weight decay (Table 4a: "no difference"). DetCon-B then has BYOL's networks and their asymmetry; its loss stays
contrastive.

Deviation from the released code: a cell without any region belongs to none, and a view without any region contributes
its whole grid as one (there: the cells become mask 0, which may be another region).

Choices of ours, where neither the paper nor the released code says how:

* NUM_VIEWS 1: the two sides are two independent drawings of M regions from the one view. Their vectors of a region
  differ with POOLING "sample" (other cells), and with a teacher; DetCon-S on means has trivial positives and learns from
  the negatives alone, which the log warns about.
* POOLING "sample": one cell for each of the M drawings, in proportion to the region's share of the cells.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...distributed import gather_keys, gather_with_gradient
from ...structures import MAX_OVERLAPPING, RegionEmbeddings, Regions, ViewBatch
from ..heads import MLP
from ..metrics import feature_std
from ..region_pool import RegionSampler, fuse_levels, masked_average_pool
from .registry import SSL_METHOD_REGISTRY, SSLMethod

logger = logging.getLogger(__name__)

# Logit of what is left out. The softmax of it is exactly 0, and other than of -inf that of nothing else is no NaN.
_LEFT_OUT = -1e9
# Logits of a matrix that is held for the backward pass, 512 MB in float32; a loss has four. Larger ones are computed anew
# there, in blocks of a quarter, of which a few live at a time.
_MAX_LOGITS = 2**27


# ---------------------------------------------------------------------------------------------- pure functions


def detcon_nce(
    pred1: Tensor,
    pred2: Tensor,
    target1: Tensor,
    target2: Tensor,
    pred_ids1: Tensor,
    pred_ids2: Tensor,
    target_ids1: Tensor,
    target_ids2: Tensor,
    rank_offset: int = 0,
    temp: float = 0.1,
    local_negatives: bool = True,
) -> Tensor:
    """Tell the latents of the same region in the other view from those of all other regions and images (Eq. 1-3).

    Args:
        pred1, pred2: (N, M, D) latents of this process' two views that predict, not normalised.
        target1, target2: (G, M, D) latents of all processes to be predicted, not normalised.
        pred_ids1, pred_ids2: (N, M) region ids of `pred1`, `pred2`; equal ids of an image are the same region.
        target_ids1, target_ids2: (N, M) region ids of this process' own part of `target1`, `target2`.
        rank_offset: index of this process' first image in the targets.
        temp: tau.
        local_negatives: False: other regions of the query's own image are no negatives.

    Returns:
        Scalar, sum over both directions; 0 with a zero gradient where no region is in both views of an image.
    """
    preds = [F.normalize(p, dim=2) / temp for p in (pred1, pred2)]
    targets = [F.normalize(t, dim=2) for t in (target1, target2)]
    pred_ids, target_ids = (pred_ids1, pred_ids2), (target_ids1, target_ids2)
    loss = [
        _predict_other_view(
            preds[own],
            other_view=targets[other],
            own_view=targets[own],
            query_ids=pred_ids[own],
            other_ids=target_ids[other],
            own_ids=target_ids[own],
            rank_offset=rank_offset,
            local_negatives=local_negatives,
        )
        for own, other in ((0, 1), (1, 0))
    ]
    return loss[0] + loss[1]


def _predict_other_view(
    queries: Tensor,
    *,
    other_view: Tensor,
    own_view: Tensor,
    query_ids: Tensor,
    other_ids: Tensor,
    own_ids: Tensor,
    rank_offset: int,
    local_negatives: bool,
) -> Tensor:
    """One direction of `detcon_nce`, on unit targets and queries of length 1 / tau."""
    positive = query_ids[:, :, None] == other_ids[:, None, :]
    if local_negatives:
        other_left_out, own_left_out = torch.zeros_like(positive), query_ids[:, :, None] == own_ids[:, None, :]
    else:
        other_left_out, own_left_out = ~positive, torch.ones_like(positive)
    normalizer = torch.logaddexp(
        _log_sum_exp(queries, other_view, other_left_out, rank_offset),
        _log_sum_exp(queries, own_view, own_left_out, rank_offset),
    )
    own_image = other_view[rank_offset : rank_offset + len(queries)]
    num_positives = positive.sum(dim=2)
    mean_positive = (queries @ own_image.transpose(1, 2) * positive).sum(dim=2) / num_positives.clamp(min=1)
    weights = (num_positives > 0).to(queries.dtype) / _num_repeats(query_ids)
    return ((normalizer - mean_positive) * weights).mean()


def _num_repeats(ids: Tensor) -> Tensor:
    """How often each id occurs in its row: (N, M) -> (N, M) int64."""
    return (ids[:, :, None] == ids[:, None, :]).sum(dim=2)


def _log_sum_exp(queries: Tensor, keys: Tensor, left_out: Tensor, rank_offset: int) -> Tensor:
    """Log of the sum of the exponential logits of each query.

    Args:
        queries: (N, M, D).
        keys: (G, M, D).
        left_out: (N, M, M) bool, the keys of the query's own image that do not count.
        rank_offset: the image n of the queries is the image rank_offset + n of the keys.

    Returns:
        (N, M).
    """
    n, m = queries.shape[:2]
    logits_of_image = m * keys.shape[0] * keys.shape[1]
    if n * logits_of_image <= _MAX_LOGITS:
        return _log_sum_exp_of_block(queries, keys, left_out, rank_offset)
    size = max(_MAX_LOGITS // 4 // logits_of_image, 1)
    blocks = [
        checkpoint(
            _log_sum_exp_of_block,
            queries[i : i + size],
            keys,
            left_out[i : i + size],
            rank_offset + i,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for i in range(0, n, size)
    ]
    return torch.cat(blocks)


def _log_sum_exp_of_block(queries: Tensor, keys: Tensor, left_out: Tensor, first_image: int) -> Tensor:
    logits = queries.flatten(0, 1) @ keys.flatten(0, 1).T
    with torch.no_grad():  # in place, and autograd need not know: by a softmax of 0 these get no gradient
        by_image = logits.view(*queries.shape[:2], *keys.shape[:2])
        images = torch.arange(len(queries), device=queries.device)
        own = by_image[images, :, first_image + images]
        by_image[images, :, first_image + images] = own.masked_fill_(left_out, _LEFT_OUT)
    return logits.logsumexp(dim=1).view(queries.shape[:2])


# ---------------------------------------------------------------------------------------------- modules


class DetConEmbedder(nn.Module):
    """Pools the regions of a view and projects them; the teacher has its own copy."""

    def __init__(
        self, *, in_features: list[str], grid_feature: str, projector: MLP, keep_features: bool = False
    ) -> None:
        """
        Args:
            in_features: backbone features that are fused and pooled.
            grid_feature: the one of them whose grid is used.
            projector: g, maps pooled vectors to embeddings.
            keep_features: return the fused feature map, too.
        """
        super().__init__()
        self.in_features = in_features
        self.grid_feature = grid_feature
        self.projector = projector
        self.keep_features = keep_features

    def forward(self, features: dict[str, Tensor], view: ViewBatch, regions: Regions) -> RegionEmbeddings:
        """
        Args:
            features: backbone features.
            view: the view they belong to.
            regions: M regions of each image, on the grid of `grid_feature`.
        """
        h, w = features[self.grid_feature].shape[-2:]
        fused = fuse_levels([features[f] for f in self.in_features], (h, w))
        return RegionEmbeddings(
            z=self.projector(masked_average_pool(fused, regions.weights)),
            ids=regions.ids,
            valid=regions.weights.flatten(2).any(dim=2),
            features=fused if self.keep_features else None,
        )


class DetConCriterion(nn.Module):
    """The contrastive detection loss over both directions; the predictor lives here."""

    def __init__(
        self,
        *,
        predictor: MLP | None,
        temp: float,
        max_region_ids: int,
        local_negatives: bool = True,
        global_negatives: bool = True,
    ) -> None:
        """
        Args:
            predictor: q of DetCon-B. None: DetCon-S, whose targets get a gradient, too.
            temp: tau.
            max_region_ids: regions with this id, in views of overlapping regions MAX_OVERLAPPING, stand for no region.
            local_negatives: other regions of an image are negatives.
            global_negatives: images of other processes are negatives.
        """
        super().__init__()
        self.predictor = predictor
        self.temp = temp
        self.max_region_ids = max_region_ids
        self.local_negatives = local_negatives
        self.global_negatives = global_negatives
        self.metrics: dict[str, Tensor] = {}

    def forward(
        self, student: list[RegionEmbeddings], teacher: list[RegionEmbeddings], views: list[ViewBatch]
    ) -> dict[str, Tensor]:
        """
        Args:
            student, teacher: embeddings of the two views, M regions each; or of the only view, twice M regions.
            views: the views.

        Returns:
            The scalar "loss_detcon".
        """
        z, ids = _two_sides(student)
        targets, target_ids = _two_sides(teacher)
        # One call per side: batch-norm statistics are per view.
        preds = [z[:, v] if self.predictor is None else self.predictor(z[:, v]) for v in (0, 1)]
        with torch.autocast(z.device.type, enabled=False):
            targets, rank_offset = self._gather(targets.float())
            loss = detcon_nce(
                preds[0].float(),
                preds[1].float(),
                targets[:, 0],
                targets[:, 1],
                ids[:, 0],
                ids[:, 1],
                target_ids[:, 0],
                target_ids[:, 1],
                rank_offset=rank_offset,
                temp=self.temp,
                local_negatives=self.local_negatives,
            )
        if self.training:
            self._update_metrics(z, ids, views)
        return {"loss_detcon": loss}

    def _gather(self, targets: Tensor) -> tuple[Tensor, int]:
        """(N, 2, M, D) of this process -> (G, 2, M, D) of those it contrasts, and the index of its first image."""
        if not self.global_negatives:
            return targets, 0
        return gather_with_gradient(targets) if self.predictor is None else gather_keys(targets)

    @torch.no_grad()
    def _update_metrics(self, z: Tensor, ids: Tensor, views: list[ViewBatch]) -> None:
        """Leave scalars for the log."""
        # A region that was drawn r times counts r times 1 / r.
        distinct = [1 / _num_repeats(ids[:, v]) for v in (0, 1)]
        shared = (ids[:, 0, :, None] == ids[:, 1, None, :]).any(dim=2)
        no_region = MAX_OVERLAPPING if views[0].overlapping else self.max_region_ids
        self.metrics = {
            "regions_per_view": torch.stack(distinct).sum(dim=2).mean(),
            "positive_pairs": (distinct[0] * shared).sum(dim=1).mean(),
            "images_without_region": (ids == no_region).any(dim=2).float().mean(dim=1).sum(),
            "feature_std": feature_std(z.float().flatten(0, 2)),
        }


def _two_sides(embeddings: list[RegionEmbeddings]) -> tuple[Tensor, Tensor]:
    """Embeddings (N, 2, M, D) and ids (N, 2, M) of the two views, or of the two halves of one view's regions."""
    if len(embeddings) == 1:
        return embeddings[0].z.unflatten(1, (2, -1)), embeddings[0].ids.unflatten(1, (2, -1))
    return torch.stack([e.z for e in embeddings], dim=1), torch.stack([e.ids for e in embeddings], dim=1)


# ---------------------------------------------------------------------------------------------- builders


@SSL_METHOD_REGISTRY.register()
def DetConS(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> SSLMethod:
    """Build DetCon-S, SimCLR's networks, from MODEL.SSL.{IN_FEATURES, PROJECTOR, DETCON}."""
    return _build(cfg, input_shape, use_teacher=False)


@SSL_METHOD_REGISTRY.register()
def DetConB(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> SSLMethod:
    """Build DetCon-B, BYOL's networks, from MODEL.SSL.{IN_FEATURES, PROJECTOR, PREDICTOR, DETCON}."""
    return _build(cfg, input_shape, use_teacher=True)


def _build(cfg: CfgNode, input_shape: dict[str, ShapeSpec], use_teacher: bool) -> SSLMethod:
    name = "DetConB" if use_teacher else "DetConS"
    check_config(cfg, name, use_teacher)
    if cfg.INPUT.REGIONS.SOURCE in ("none", "bootstrap"):
        raise ValueError(
            f'INPUT.REGIONS.SOURCE is "{cfg.INPUT.REGIONS.SOURCE}"; {name} needs regions that are known before the '
            'run, for example "file", "felzenszwalb" or "grid"'
        )
    ssl, detcon = cfg.MODEL.SSL, cfg.MODEL.SSL.DETCON
    if not use_teacher and detcon.NUM_VIEWS == 1 and detcon.POOLING == "mean":
        logger.warning(
            'MODEL.SSL.DETCON: with NUM_VIEWS 1, POOLING "mean" and no teacher a region and its positive are the same '
            'vector, so only negatives teach anything. POOLING "sample" compares different cells of a region.'
        )
    grid_feature = ssl.GRID_FEATURE or ssl.IN_FEATURES[-1]
    in_dim = sum(int(input_shape[f].channels or 0) for f in ssl.IN_FEATURES)
    embedder = DetConEmbedder(
        in_features=list(ssl.IN_FEATURES),
        grid_feature=grid_feature,
        projector=MLP.from_config(ssl.PROJECTOR, in_dim),
    )
    criterion = DetConCriterion(
        predictor=MLP.from_config(ssl.PREDICTOR, ssl.PROJECTOR.OUT_DIM) if use_teacher else None,
        temp=detcon.TEMP,
        max_region_ids=detcon.MAX_REGION_IDS,
        local_negatives=detcon.LOCAL_NEGATIVES,
        global_negatives=detcon.GLOBAL_NEGATIVES,
    )
    sampler = RegionSampler(
        # Of a single view both sides are drawn at once.
        num_regions=detcon.NUM_REGIONS * (2 if detcon.NUM_VIEWS == 1 else 1),
        max_region_ids=detcon.MAX_REGION_IDS,
        stride=int(input_shape[grid_feature].stride or 0),
        single_cells=detcon.POOLING == "sample",
    )
    return SSLMethod(embedder, criterion, sample=sampler, num_views=detcon.NUM_VIEWS)


def check_config(cfg: CfgNode, name: str, use_teacher: bool) -> None:
    """Refuse what contradicts the method `name`, one of DetCon's kind, naming key and value."""
    ssl, detcon = cfg.MODEL.SSL, cfg.MODEL.SSL.DETCON
    if ssl.TEACHER.ENABLED != use_teacher:
        raise ValueError(f"MODEL.SSL.TEACHER.ENABLED is {ssl.TEACHER.ENABLED}; {name} needs {use_teacher}")
    if ssl.EXPORT_BRANCH != "student":
        raise ValueError(f'MODEL.SSL.EXPORT_BRANCH is "{ssl.EXPORT_BRANCH}"; {name} exports the "student"')
    if use_teacher and ssl.PREDICTOR.OUT_DIM != ssl.PROJECTOR.OUT_DIM:
        raise ValueError(
            f"MODEL.SSL.PREDICTOR.OUT_DIM is {ssl.PREDICTOR.OUT_DIM}, MODEL.SSL.PROJECTOR.OUT_DIM "
            f"{ssl.PROJECTOR.OUT_DIM}: {name} compares their outputs, so they must be equal"
        )
    for key, known in (("NUM_VIEWS", (1, 2)), ("POOLING", ("mean", "sample"))):
        if detcon[key] not in known:
            raise ValueError(f"MODEL.SSL.DETCON.{key} is {detcon[key]!r}; known: {known}")
    if detcon.NUM_REGIONS < 1:
        raise ValueError(f"MODEL.SSL.DETCON.NUM_REGIONS is {detcon.NUM_REGIONS}; it must be at least 1")
