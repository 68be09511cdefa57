"""SemCL: semantic information in contrastive learning (Quan et al., ICCV-W 2023). It learns from semantic LABELS.

Every (image, class) of a labelled data set makes a pair: the anchor shows the pixels of the class, the not-anchor the
others, on black (`data/semantic_pairs.py`). Each member is augmented three times; MoCo-v3 compares the views.

    N pairs of a process, V = 3 views of each member, D dimensions, G pairs of all processes.

    of the paper                                     here
    paired InfoNCE (Eq. 3, Figure 3 right)           paired_info_nce
    unpaired InfoNCE (Eq. 2, Figure 3 left)          unpaired_info_nce
    momentum encoder (Eq. 1)                         engine.hooks.EMATeacher
    base encoder f_b, momentum encoder f_m           SemCLEmbedder, in the student and in the teacher

Choices that the paper leaves open follow the released code:

* Heads are those of MoCo-v3 for a ResNet: projector of two layers that ends in batch norm without scale and shift,
  predictor of two layers. For Swin the projector has three layers, and the predictor ends in such a norm, too. Their
  linear layers have no bias (ours have one before a batch norm, which takes it away again).
* Every view of every member is one pass through the network: batch-norm statistics never mix anchors and not-anchors, so
  that no constant difference between the two, such as how much is black, is left after the projector.
* The six terms of the paired loss are summed, without MoCo-v3's factor 2 tau; the unpaired loss has it.

Deviations from the paper, with the released code:

* The positive of query v is key v + 1, that of the last query key 0. Eq. 3 compares the views (0, 1), (0, 2), (1, 2), so
  that view 2 is never a query and view 0 never a positive.

Deviations from the released code, with the paper:

* All three views are random resized crops with jitter, greyscale and blur. There, view 0 is a square crop of the whole
  height or width of the image, without change of colours.
* The teacher's momentum reaches 1 with the run. There its cosine is one of whole epochs, which may go beyond the run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ...distributed import gather_keys
from ...structures import RegionEmbeddings, ViewBatch
from ...visualization import draw_pairs
from ..heads import MLP
from ..metrics import feature_std
from ..region_pool import fuse_levels
from .registry import SSL_METHOD_REGISTRY, SSLMethod
from .slotcon import image_nce

NUM_MEMBER_VIEWS = 3  # V; views 0 to 2 show anchors, views 3 to 5 not-anchors


# ---------------------------------------------------------------------------------------------- pure functions


def paired_logits(queries: Tensor, keys: Tensor, negatives: Tensor, temp: float) -> Tensor:
    """Compare the queries of one member of each pair with its own keys and with those of the other member.

    Args:
        queries, keys: (N, V, D) of the member, not normalised; the positive of query v is key (v + 1) mod V.
        negatives: (N, V, D) keys of the other member.
        temp: tau.

    Returns:
        (N, V, 1 + V) cosines / tau, the positive first.
    """
    q = F.normalize(queries, dim=2)
    positive = (q * F.normalize(keys, dim=2).roll(-1, dims=1)).sum(dim=2, keepdim=True)
    return torch.cat([positive, q @ F.normalize(negatives, dim=2).transpose(1, 2)], dim=2) / temp


def paired_info_nce(
    anchor_queries: Tensor, not_anchor_queries: Tensor, anchor_keys: Tensor, not_anchor_keys: Tensor, temp: float
) -> Tensor:
    """Tell each view of an object from the surroundings of that object, and the reverse (Eq. 3, cyclic).

    Args:
        anchor_queries, not_anchor_queries: (N, V, D) predictions of the student.
        anchor_keys, not_anchor_keys: (N, V, D) of the teacher, without gradient.
        temp: tau.

    Returns:
        Scalar: sum over views and both members of the mean over pairs.
    """
    both = torch.cat(
        [
            paired_logits(anchor_queries, anchor_keys, not_anchor_keys, temp),
            paired_logits(not_anchor_queries, not_anchor_keys, anchor_keys, temp),
        ],
        dim=1,
    )
    return -both.log_softmax(dim=2)[:, :, 0].mean(dim=0).sum()


def unpaired_info_nce(queries: Tensor, keys: Tensor, rank_offset: int, temp: float) -> Tensor:
    """Compare the queries of one member with the same member's keys of the whole batch: MoCo-v3's loss.

    Args:
        queries: (N, V, D) predictions of the student.
        keys: (G, V, D) of the teacher, of all processes; key (rank_offset + n, (v + 1) mod V) belongs to query (n, v).
        rank_offset: index of this process' first key.
        temp: tau.

    Returns:
        Scalar: sum over views.
    """
    terms = [
        image_nce(q, k, rank_offset, temp) for q, k in zip(queries.unbind(1), keys.roll(-1, 1).unbind(1), strict=True)
    ]
    return torch.stack(terms).sum()


# ---------------------------------------------------------------------------------------------- modules


class SemCLEmbedder(nn.Module):
    """Global average pooling and MoCo-v3's projector: a view is one region."""

    def __init__(self, *, in_features: list[str], projector: MLP) -> None:
        """
        Args:
            in_features: backbone features, brought to the grid of the last one and concatenated.
            projector: maps their mean to D dimensions.
        """
        super().__init__()
        self.in_features = in_features
        self.projector = projector

    def forward(self, features: dict[str, Tensor], view: ViewBatch, regions: None) -> RegionEmbeddings:
        """
        Args:
            features: backbone features.
            view: the view they belong to.
            regions: none.

        Returns:
            `z` (N, 1, D) projections, `features` the maps before pooling.
        """
        x = fuse_levels([features[f] for f in self.in_features])
        z = self.projector(x.mean(dim=(2, 3)))[:, None]
        ids = torch.zeros(z.shape[:2], dtype=torch.int64, device=z.device)
        return RegionEmbeddings(z=z, ids=ids, valid=torch.ones_like(ids, dtype=torch.bool), features=x)


class SemCLCriterion(nn.Module):
    """Paired or unpaired InfoNCE; the predictor lives here."""

    def __init__(self, *, predictor: MLP, temp: float, paired: bool = True) -> None:
        """
        Args:
            predictor: D to D dimensions.
            temp: tau.
            paired: False: the loss of MoCo-v3, whose negatives are the other images.
        """
        super().__init__()
        self.predictor = predictor
        self.temp = temp
        self.paired = paired
        self.metrics: dict[str, Tensor] = {}

    def forward(
        self, student: list[RegionEmbeddings], teacher: list[RegionEmbeddings], views: list[ViewBatch]
    ) -> dict[str, Tensor]:
        """
        Args:
            student, teacher: embeddings of the six views, anchors first; the teacher's without gradient.
            views: the views.

        Returns:
            {"loss_pair"}, a scalar.
        """
        predictions = [self.predictor(s.z[:, 0]).float() for s in student]
        queries = [torch.stack(member, dim=1) for member in _members(predictions)]
        keys = [torch.stack(member, dim=1) for member in _members([t.z[:, 0].float() for t in teacher])]
        # Similarities and softmaxes are worth full precision; they cost next to nothing.
        with torch.autocast(queries[0].device.type, enabled=False):
            if self.paired:
                loss = paired_info_nce(queries[0], queries[1], keys[0], keys[1], self.temp)
            else:
                anchors, others = (
                    unpaired_info_nce(q, *gather_keys(k), self.temp) for q, k in zip(queries, keys, strict=True)
                )
                loss = anchors + others
            self.metrics = self._measure(queries, keys, student)
        return {"loss_pair": loss}

    @torch.no_grad()
    def _measure(self, queries: list[Tensor], keys: list[Tensor], student: list[RegionEmbeddings]) -> dict[str, Tensor]:
        """Scalars for the log; the accuracies are those of picking the positive among the paired negatives."""
        picked = [
            paired_logits(q, k, negatives, self.temp).argmax(dim=2) == 0
            for q, k, negatives in zip(queries, keys, reversed(keys), strict=True)
        ]
        pooled = torch.cat([s.features.float().mean(dim=(2, 3)) for s in student if s.features is not None])
        return {
            "anchor_accuracy": picked[0].float().mean(),
            "not_anchor_accuracy": picked[1].float().mean(),
            "feature_std": feature_std(pooled),
        }


def _members(views: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Split what belongs to the six views into anchors' and not-anchors'."""
    assert len(views) == 2 * NUM_MEMBER_VIEWS
    return views[:NUM_MEMBER_VIEWS], views[NUM_MEMBER_VIEWS:]


@SSL_METHOD_REGISTRY.register()
def SemCL(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> SSLMethod:
    """Build SemCL from MODEL.SSL.{IN_FEATURES, PROJECTOR, PREDICTOR, SEMCL}."""
    ssl, semcl = cfg.MODEL.SSL, cfg.MODEL.SSL.SEMCL
    if semcl.LOSS not in ("paired", "unpaired"):
        raise ValueError(f'MODEL.SSL.SEMCL.LOSS is "{semcl.LOSS}"; known: "paired", "unpaired"')
    if semcl.TEMP <= 0:
        raise ValueError(f"MODEL.SSL.SEMCL.TEMP is {semcl.TEMP}; it must be positive")
    if ssl.PREDICTOR.OUT_DIM != ssl.PROJECTOR.OUT_DIM:
        raise ValueError(
            f"MODEL.SSL.PREDICTOR.OUT_DIM is {ssl.PREDICTOR.OUT_DIM}, MODEL.SSL.PROJECTOR.OUT_DIM "
            f"{ssl.PROJECTOR.OUT_DIM}: SemCL compares their outputs, so they must be equal"
        )
    if cfg.INPUT.SSL.NUM_VIEWS > 0 and cfg.INPUT.PAIRS.SOURCE == "none":
        raise ValueError(
            'INPUT.PAIRS.SOURCE is "none", but SemCL works on pairs made from labels: "sem_seg", "instances" or "both"'
        )
    in_dim = sum(int(input_shape[f].channels or 0) for f in ssl.IN_FEATURES)
    return SSLMethod(
        SemCLEmbedder(in_features=list(ssl.IN_FEATURES), projector=MLP.from_config(ssl.PROJECTOR, in_dim)),
        SemCLCriterion(
            predictor=MLP.from_config(ssl.PREDICTOR, ssl.PROJECTOR.OUT_DIM),
            temp=semcl.TEMP,
            paired=semcl.LOSS == "paired",
        ),
        num_views=2 * NUM_MEMBER_VIEWS,
        draw=draw_pairs,
    )
