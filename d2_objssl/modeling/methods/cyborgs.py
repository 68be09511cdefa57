"""CYBORGS: contrastively bootstrapping object representations by grounding in segmentation (Wang et al., ECCV 2022).

    N images, M regions drawn from a view, C channels of the fused levels, K clusters, h, w cells, n = N h w cells of a batch

    of the paper                                       here
    mask-dependent contrastive loss (Eq. 1-2)          detcon.detcon_nce, detcon.DetConCriterion
    fused features (3.2, 4.1)                          region_pool.fuse_levels, CyborgsEmbedder
    clustering consistency (Eq. 3)                     consistency_loss
    von Mises-Fisher posterior (Eq. 4), vMF loss       vmf_distance, vmf_loss
    Euclidean distance in its place (Table 2f)         euclidean_distance
    warm-up, period of the consistency loss (3.4)      CyborgsCriterion.set_phase, engine.bootstrap.CyborgsPhases
    bootstrapping of masks (3.3)                       engine.bootstrap.MaskBootstrap
    fixed masks instead of it (Figure 5a)              INPUT.REGIONS.SOURCE other than "bootstrap"

Which networks: y and P of Eq. 3 are the student's of one view, y' and P' the teacher's of the other one. Gradients flow
through y alone: not through y', and not through the clusterings, which are constants of a step. The two ways to hand the
views to the networks are added, as in the contrastive loss, so every view of the student is pulled by two terms. Like the
paper, it pairs cells of the two views by their index, although the crops differ ("a slight abuse of notation").

Which weight: the warm-up has the consistency loss "strictly", and so with weight 1; lambda holds behind it. The scale of a
distance is its own: -log of a posterior of K clusters, about log K for cells that belong to none, or a length up to 2. A
concentration kappa is a temperature 1 / kappa.

Choices that the paper leaves open follow the released code:

* The fused levels, "res2, res3, res4" of the paper, are those of strides 8, 16 and 32: Detectron2's res3, res4, res5.
* The consistency loss clusters the fused maps that the regions are pooled from, over the images of one process, with the K
  of a step drawn anew. (Section 3.4 takes up the notation of 3.3, where y is the one block that masks are made of.)
* Student and teacher draw their regions separately, without replacement; the loss is otherwise DetCon-B's.

Choices of ours, where neither the paper nor the released code says how:

* Euclidean: the length of the difference, not its square, of a cell scaled to unit length and a centroid; k-means stays
  spherical, since Table 2f is about Eq. 4 alone.
* Whole images in evaluation are clustered one by one, by WARMUP_CLUSTERS clusters.

Deviations from the released code:

* The sign of the logits is the paper's: there, features are pushed away from their clusters.
* Labels of the other view go with the centroids of that view: there, with those of the own one, although two runs of
  k-means number their clusters independently.
* y' is the teacher's: there, both maps are the student's and both clusterings the teacher's.
* A view with fewer than M regions repeats some of them: there, ids that are absent fill up, as zero vectors.
* Batch norm of the heads takes all N M vectors of a view together, as in DetCon: there, N at a time.
* There is a warm-up: there, the first masks are read from disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.layers import ShapeSpec
from torch import Tensor

from ...proposals import spherical_kmeans
from ...structures import RegionEmbeddings, Regions, ViewBatch
from ..heads import MLP
from ..metrics import feature_std
from ..region_pool import RegionSampler, fuse_levels
from .detcon import DetConCriterion, DetConEmbedder, check_config
from .registry import SSL_METHOD_REGISTRY, SSLMethod

# ---------------------------------------------------------------------------------------------- pure functions

# (n, C) features, (K, C) centroids, (n,) labels -> scalar
Distance = Callable[[Tensor, Tensor, Tensor], Tensor]


def vmf_distance(features: Tensor, centroids: Tensor, labels: Tensor, kappa: float) -> Tensor:
    """Negative log-posterior of clusters under a mixture of von Mises-Fisher distributions of one concentration (Eq. 4).

    Args:
        features: (n, C), of any length.
        centroids: (K, C), mean directions of unit length.
        labels: (n,) int64 in [0, K), the clusters that the features should belong to.
        kappa: concentration; the inverse of a softmax's temperature.

    Returns:
        Scalar mean over the features.
    """
    return F.cross_entropy(kappa * F.normalize(features, dim=1) @ centroids.T, labels)


def euclidean_distance(features: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """Mean distance of features, scaled to unit length, from the centroids of clusters (Table 2f).

    Arguments and result as of `vmf_distance`. Its gradient is 0 where a feature coincides with its centroid.
    """
    return torch.linalg.vector_norm(F.normalize(features, dim=1) - centroids[labels], dim=1).mean()


def consistency_loss(
    features1: Tensor,
    features2: Tensor,
    centroids1: Tensor,
    centroids2: Tensor,
    labels1: Tensor,
    labels2: Tensor,
    distance: Distance,
) -> Tensor:
    """Intra- and inter-view consistency of two clusterings (Eq. 3).

    Args:
        features1, features2: (n, C) cells of two views of the same images, in the same order.
        centroids1, centroids2: (K, C) of unit length, of each view's own clustering; the two K may differ.
        labels1, labels2: (n,) int64 cluster of each cell in its own view.
        distance: `vmf_distance` or `euclidean_distance`.

    Returns:
        Scalar. Every cell is compared with its own cluster, and with the cluster that the cell of the same index has in
        the other view, in the numbering and by the centroids of that view.
    """
    intra = distance(features1, centroids1, labels1) + distance(features2, centroids2, labels2)
    inter = distance(features1, centroids2, labels2) + distance(features2, centroids1, labels1)
    return intra + inter


def vmf_loss(
    features1: Tensor,
    features2: Tensor,
    centroids1: Tensor,
    centroids2: Tensor,
    labels1: Tensor,
    labels2: Tensor,
    kappa: float,
) -> Tensor:
    """The paper's clustering loss (Eq. 3 with Eq. 4); see `consistency_loss` and `vmf_distance`."""
    distance = partial(vmf_distance, kappa=kappa)
    return consistency_loss(features1, features2, centroids1, centroids2, labels1, labels2, distance)


# ---------------------------------------------------------------------------------------------- modules


class CyborgsEmbedder(DetConEmbedder):
    """DetCon's, which also returns the fused feature map, and does without regions where there are none."""

    def __init__(self, *, num_clusters: int, kmeans_iters: int, **detcon: Any) -> None:
        """
        Args:
            num_clusters: K of whole images in evaluation.
            kmeans_iters: iterations of k-means there.
            **detcon: arguments of `DetConEmbedder`.
        """
        super().__init__(keep_features=True, **detcon)
        self.num_clusters = num_clusters
        self.kmeans_iters = kmeans_iters

    def forward(self, features: dict[str, Tensor], view: ViewBatch, regions: Regions | None) -> RegionEmbeddings:
        """
        Args:
            features: backbone features.
            view: the view they belong to.
            regions: M regions of each image; None: no region is embedded, and in evaluation the cells are scored by
                clusters of their image.
        """
        if regions is not None:
            return super().forward(features, view, regions)
        h, w = features[self.grid_feature].shape[-2:]
        fused = fuse_levels([features[f] for f in self.in_features], (h, w))
        return RegionEmbeddings(
            z=fused.new_zeros(len(fused), 0, 0),
            ids=torch.zeros(len(fused), 0, dtype=torch.int64, device=fused.device),
            valid=torch.zeros(len(fused), 0, dtype=torch.bool, device=fused.device),
            scores=None if self.training else self._cluster_scores(fused),
            features=fused,
        )

    @torch.no_grad()
    def _cluster_scores(self, fused: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, K, h, w) cosines of the cells to the clusters of their own image; -1 where it has fewer."""
        n, _, h, w = fused.shape
        scores = torch.full((n, self.num_clusters, h, w), -1.0, device=fused.device)
        with torch.autocast(fused.device.type, enabled=False):
            for i in range(n):
                cells = _cells(fused[i : i + 1])
                centroids, _ = spherical_kmeans(cells, self.num_clusters, self.kmeans_iters, seed=0)
                scores[i, : len(centroids)] = (centroids @ F.normalize(cells, dim=1).T).unflatten(1, (h, w))
        return scores


def _cells(maps: Tensor) -> Tensor:
    """(N, C, h, w) -> (N h w, C) float32."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2).float()


class CyborgsCriterion(DetConCriterion):
    """DetCon-B's loss and the consistency of the clusterings, by phase."""

    def __init__(
        self,
        *,
        distance: Distance,
        consistency_weight: float,
        min_clusters: int,
        max_clusters: int,
        warmup_clusters: int,
        kmeans_iters: int,
        **detcon: Any,
    ) -> None:
        """
        Args:
            distance: d of Eq. 3.
            consistency_weight: lambda, behind the warm-up.
            min_clusters, max_clusters: K of each step is drawn uniformly from these and what is between.
            warmup_clusters: K in the warm-up.
            kmeans_iters: iterations of k-means.
            **detcon: arguments of `DetConCriterion`.
        """
        super().__init__(**detcon)
        self.distance = distance
        self.consistency_weight = consistency_weight
        self.min_clusters = min_clusters
        self.max_clusters = max_clusters
        self.warmup_clusters = warmup_clusters
        self.kmeans_iters = kmeans_iters
        self.set_phase(warmup=False, consistency=True)

    def set_phase(self, warmup: bool, consistency: bool) -> None:
        """Choose the losses of the coming steps. The hook `engine.bootstrap.CyborgsPhases` does so before each step.

        Args:
            warmup: the consistency loss is the only one, and no region is drawn.
            consistency: outside the warm-up, it is added.
        """
        self.warmup = warmup
        self.consistency = consistency

    def forward(
        self, student: list[RegionEmbeddings], teacher: list[RegionEmbeddings], views: list[ViewBatch]
    ) -> dict[str, Tensor]:
        """
        Args:
            student, teacher: embeddings of the two views, with the fused feature maps.
            views: the two views.

        Returns:
            By phase DetCon's losses, the weighted scalar "loss_consistency", or both.
        """
        if self.warmup:
            self.metrics = {}
            return {"loss_consistency": self._consistency_loss(student, teacher)}
        losses = super().forward(student, teacher, views)
        if self.consistency:
            losses["loss_consistency"] = self.consistency_weight * self._consistency_loss(student, teacher)
        return losses

    def _consistency_loss(self, student: list[RegionEmbeddings], teacher: list[RegionEmbeddings]) -> Tensor:
        """Eq. 3 for both ways to hand the two views to student and teacher, added."""
        # From the global generator, whose state the checkpoints keep.
        num_clusters = self.warmup_clusters
        if not self.warmup:
            num_clusters = int(torch.randint(self.min_clusters, self.max_clusters + 1, ()))
        seed = int(torch.randint(2**31 - 1, ()))
        online = [self._cluster(e.features, num_clusters, seed) for e in student]
        target = [self._cluster(e.features, num_clusters, seed) for e in teacher]
        loss = torch.zeros((), device=online[0][0].device)
        with torch.autocast(loss.device.type, enabled=False):
            for (y1, p1, l1), (y2, p2, l2) in zip(online, reversed(target), strict=True):
                loss = loss + consistency_loss(y1, y2.detach(), p1, p2, l1, l2, self.distance)
        if self.training:
            self._add_metrics(online)
        return loss

    def _cluster(self, maps: Tensor | None, num_clusters: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Cells (n, C) of the fused maps of a view, and their clustering: centroids (K, C), labels (n,)."""
        assert maps is not None
        cells = _cells(maps)
        with torch.autocast(cells.device.type, enabled=False):
            return cells, *spherical_kmeans(cells, num_clusters, self.kmeans_iters, seed)

    @torch.no_grad()
    def _add_metrics(self, clusterings: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Leave scalars on the student's cells, centroids and labels for the log."""
        entropies = []
        for _, centroids, labels in clusterings:
            counts = labels.new_zeros(len(centroids)).scatter_add_(0, labels, torch.ones_like(labels))
            shares = counts / len(labels)
            entropies.append(torch.special.entr(shares).sum() / math.log(max(len(centroids), 2)))
        self.metrics |= {
            "clusters": torch.tensor(len(clusterings[0][1])),
            # 1 where all clusters have equally many cells, 0 where one has all of them.
            "cluster_entropy": torch.stack(entropies).mean(),
            # "feature_std" is that of regions.
            "cell_std": feature_std(torch.cat([cells for cells, _, _ in clusterings])),
        }


@dataclass(frozen=True)
class PhasedSampler:
    """Draws regions in the phases that contrast them.

    Attributes:
        sampler: draws them.
        criterion: knows the phase.
    """

    sampler: RegionSampler
    criterion: CyborgsCriterion

    def __call__(self, views: list[ViewBatch]) -> list[Regions] | list[None]:
        """Regions of each view; None in the warm-up, where there may be no maps yet, and in evaluation, where there is none."""
        if self.criterion.warmup or not self.criterion.training:
            return [None] * len(views)
        return self.sampler(views)


# ---------------------------------------------------------------------------------------------- builder


@SSL_METHOD_REGISTRY.register()
def CYBORGS(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> SSLMethod:
    """Build CYBORGS from MODEL.SSL.{IN_FEATURES, PROJECTOR, PREDICTOR, DETCON, CYBORGS}."""
    _check_config(cfg)
    ssl, detcon, cyborgs = cfg.MODEL.SSL, cfg.MODEL.SSL.DETCON, cfg.MODEL.SSL.CYBORGS
    grid_feature = ssl.GRID_FEATURE or ssl.IN_FEATURES[-1]
    in_dim = sum(int(input_shape[f].channels or 0) for f in ssl.IN_FEATURES)
    embedder = CyborgsEmbedder(
        num_clusters=cyborgs.WARMUP_CLUSTERS,
        kmeans_iters=cyborgs.KMEANS_ITERS,
        in_features=list(ssl.IN_FEATURES),
        grid_feature=grid_feature,
        projector=MLP.from_config(ssl.PROJECTOR, in_dim),
    )
    criterion = CyborgsCriterion(
        distance=_DISTANCES[cyborgs.CONSISTENCY](cyborgs.VMF_KAPPA),
        consistency_weight=cyborgs.VMF_WEIGHT,
        min_clusters=cyborgs.MIN_CLUSTERS,
        max_clusters=cyborgs.MAX_CLUSTERS,
        warmup_clusters=cyborgs.WARMUP_CLUSTERS,
        kmeans_iters=cyborgs.KMEANS_ITERS,
        predictor=MLP.from_config(ssl.PREDICTOR, ssl.PROJECTOR.OUT_DIM),
        temp=detcon.TEMP,
        max_region_ids=detcon.MAX_REGION_IDS,
        local_negatives=detcon.LOCAL_NEGATIVES,
        global_negatives=detcon.GLOBAL_NEGATIVES,
    )
    sampler = RegionSampler(
        num_regions=detcon.NUM_REGIONS,
        max_region_ids=detcon.MAX_REGION_IDS,
        stride=int(input_shape[grid_feature].stride or 0),
        replacement=False,
        single_cells=detcon.POOLING == "sample",
    )
    return SSLMethod(
        embedder,
        criterion,
        sample=PhasedSampler(sampler, criterion),
        separate_teacher_regions=True,
        build_hooks=_build_hooks,
        idle_parameters=cyborgs.WARMUP_EPOCHS > 0,
    )


def _build_hooks(trainer: Any) -> list[HookBase]:
    from ...engine.bootstrap import build_bootstrap_hooks  # not above: the engine imports the modelling

    return build_bootstrap_hooks(trainer)


_DISTANCES: dict[str, Callable[[float], Distance]] = {
    "vmf": lambda kappa: partial(vmf_distance, kappa=kappa),
    "euclidean": lambda kappa: euclidean_distance,
}


def _check_config(cfg: CfgNode) -> None:
    """Refuse what contradicts the method, naming key and value."""
    check_config(cfg, "CYBORGS", use_teacher=True)
    cyborgs, detcon = cfg.MODEL.SSL.CYBORGS, cfg.MODEL.SSL.DETCON
    if cyborgs.CONSISTENCY not in _DISTANCES:
        raise ValueError(f'MODEL.SSL.CYBORGS.CONSISTENCY is "{cyborgs.CONSISTENCY}"; known: {sorted(_DISTANCES)}')
    if detcon.NUM_VIEWS != 2:
        raise ValueError(f"MODEL.SSL.DETCON.NUM_VIEWS is {detcon.NUM_VIEWS}; CYBORGS compares 2 views")
    if cfg.INPUT.REGIONS.SOURCE == "none":
        raise ValueError('INPUT.REGIONS.SOURCE is "none"; CYBORGS needs regions, its own are "bootstrap"')
    for key, smallest in (
        ("WARMUP_EPOCHS", 0),
        ("WARMUP_CLUSTERS", 1),
        ("MIN_CLUSTERS", 1),
        ("MAX_CLUSTERS", cyborgs.MIN_CLUSTERS),
        ("KMEANS_ITERS", 1),
        ("VMF_WEIGHT", 0),
        ("VMF_KAPPA", 0),
    ):
        if cyborgs[key] < smallest:
            raise ValueError(f"MODEL.SSL.CYBORGS.{key} is {cyborgs[key]}; it must be at least {smallest}")
    if cyborgs.MAX_CLUSTERS > detcon.MAX_REGION_IDS:
        raise ValueError(
            f"MODEL.SSL.CYBORGS.MAX_CLUSTERS is {cyborgs.MAX_CLUSTERS}, but the pooling knows MODEL.SSL.DETCON."
            f"MAX_REGION_IDS {detcon.MAX_REGION_IDS} ids: clusters beyond it would be lost"
        )
