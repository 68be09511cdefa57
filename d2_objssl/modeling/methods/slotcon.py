"""SlotCon: self-supervised visual representation learning with semantic grouping (Wen et al., NeurIPS 2022).

    N images, K prototypes = slots of an image, D dimensions, h, w cells, n cells of a batch, G images of all processes.

    of the paper                                     here
    assignment of cells to prototypes, slots         assign_slots
    grouping loss and its centre                     grouping_loss, update_center
    slot contrastive loss with indicator (Eq. 6)     slot_nce, active_slots
    total loss                                       SlotConCriterion
    inverse augmentation (supplement A.1)            geometry.overlap_rois, geometry.align_features
    prediction of a cell's prototype (A.3, Eq. 1)    ObjectSSL.inference
    alternatives (supplement, Tables 3b-3d)          slot_regression, SlotConEmbedder(align_projection), image_nce

Choices that the paper leaves open follow the released code:

* Student and teacher are both grouped with the teacher's temperature; the student's only divides its logits in the
  grouping loss.
* The attention is softmax + 1e-6, the slot loss is multiplied by 2 tau_c, the centre averages scores before alignment.
* The teacher's batch-norm statistics are its own; the moving average covers parameters only.

Choices of ours, where neither the supplement nor the released code says how:

* The image-level loss has MoCo-v3's heads for a ResNet (two layers) at the projector's width, tau_c as temperature, and no
  published weight.
* With views aligned on the projections everything is computed on the aligned maps, the centre and the slots included.

Deviations from the released code:

* Pairs of crops without overlap leave the grouping loss (there: compared with a target made of zeros).
* Where no slot is active in both views the slot loss is 0 (there: NaN with a zero gradient).
* Only active slots travel between processes (there: all of them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils import comm
from torch import Tensor, nn

from ...distributed import all_reduce_mean, gather_keys, gather_rows
from ...geometry import align_features, overlap_rois
from ...structures import RegionEmbeddings, ViewBatch
from ..heads import MLP
from ..metrics import feature_std
from ..region_pool import fuse_levels
from .registry import SSL_METHOD_REGISTRY, SSLMethod

# A prototype counts as dead while it has won no cell in this many images (the paper counts over the 5,000 of val2017).
_DEAD_AFTER_IMAGES = 5000


_DIRECTIONS = ((0, 1), (1, 0))  # the views of the student and of the teacher that are compared


# ---------------------------------------------------------------------------------------------- pure functions


def assign_slots(features: Tensor, prototypes: Tensor, temp: float, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Group the cells of each image by prototypes and pool the groups.

    Args:
        features: (N, D, h, w) projected features, not normalised.
        prototypes: (K, D).
        temp: temperature of the softmax over prototypes.
        eps: added to the assignment after the softmax.

    Returns:
        slots: (N, K, D) weighted means of the features as given.
        dots: (N, K, h, w) cosine of every cell to every prototype.
    """
    flat = features.flatten(2)
    dots = F.normalize(prototypes, dim=1) @ F.normalize(flat, dim=1)
    attention = (dots / temp).softmax(dim=1) + eps
    attention = attention / attention.sum(dim=2, keepdim=True)
    slots = attention @ flat.transpose(1, 2)
    return slots, dots.unflatten(2, features.shape[-2:])


def active_slots(dots: Tensor) -> Tensor:
    """Tell which prototypes win the arg-max of at least one cell: (N, K, h, w) -> (N, K) bool."""
    n, k = dots.shape[:2]
    winners = dots.flatten(2).argmax(dim=1)
    return torch.zeros(n, k, dtype=torch.bool, device=dots.device).scatter_(1, winners, True)


def grouping_loss(
    student_dots: Tensor,
    teacher_dots: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    valid: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the student's assignment of cells under the teacher's.

    Args:
        student_dots: (n, K) scores of aligned cells.
        teacher_dots: (n, K) scores of the same cells in the other view.
        center: (1, K), subtracted from the teacher's scores.
        student_temp, teacher_temp: temperatures.
        valid: (n,) bool, the cells that count; None: all.

    Returns:
        Scalar mean over the cells that count, 0 where there is none.
    """
    target = ((teacher_dots - center) / teacher_temp).softmax(dim=1)
    per_cell = -(target * (student_dots / student_temp).log_softmax(dim=1)).sum(dim=1)
    if valid is None:
        return per_cell.mean()
    return (per_cell * valid).sum() / valid.sum().clamp(min=1)


def update_center(center: Tensor, dots_mean: Tensor, momentum: float) -> Tensor:
    """Moving average of the teacher's mean scores: (1, K), (1, K) -> (1, K)."""
    return momentum * center + (1 - momentum) * dots_mean


def slot_nce(
    queries: Tensor,
    keys: Tensor,
    query_active: Tensor,
    key_active: Tensor,
    rank_offset: int,
    temp: float,
    predictor: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Contrast slots that are active in both views against all active slots of the global batch (Eq. 6).

    Args:
        queries: (N, K, D) student slots of this process.
        keys: (G, K, D) teacher slots of all processes, without gradient.
        query_active, key_active: (N, K), (G, K) bool, see `active_slots`.
        rank_offset: key (rank_offset + n, k) is the positive of query (n, k).
        temp: tau_c.
        predictor: applied to the queries that count, (P, D) -> (P, D).

    Returns:
        Scalar, 2 tau_c times the mean over the slots active in both views; 0 with a zero gradient where there is none.
    """
    own_key_active = key_active[rank_offset : rank_offset + queries.shape[0]]
    pairs = query_active & own_key_active
    # Row of each active key in the compacted list of keys.
    rows = key_active.flatten().cumsum(0).view_as(key_active) - 1
    labels = rows[rank_offset : rank_offset + queries.shape[0]][pairs]
    return compact_slot_nce(queries[pairs], keys[key_active], labels, temp, predictor)


def compact_slot_nce(
    queries: Tensor, keys: Tensor, labels: Tensor, temp: float, predictor: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """`slot_nce` on lists: queries (P, D), keys (Q, D), labels (P,) rows of `keys` -> scalar."""
    if predictor is not None:
        queries = predictor(queries)
    if queries.shape[0] == 0:
        return queries.sum()  # 0, but with a gradient: the predictor must take part in every process
    logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temp
    return F.cross_entropy(logits, labels) * (2 * temp)


def slot_regression(queries: Tensor, keys: Tensor) -> Tensor:
    """BYOL's loss 2 - 2 cos over matching rows (supplement, Table 3b): (P, D), (P, D) -> scalar, 0 where P = 0."""
    cosine = F.cosine_similarity(queries, keys, dim=1)
    return (2 - 2 * cosine).sum() / max(len(queries), 1)


def image_nce(queries: Tensor, keys: Tensor, rank_offset: int, temp: float) -> Tensor:
    """MoCo-v3's loss (supplement, Table 3d): queries (N, D), keys (G, D) of all processes -> scalar."""
    logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temp
    labels = torch.arange(len(queries), device=queries.device) + rank_offset
    return F.cross_entropy(logits, labels) * (2 * temp)


def true_rows(masks: Sequence[Tensor]) -> list[Tensor]:
    """List what is True in each of several masks together: lengths depend on values, so this waits for the device.

    Args:
        masks: bool, of one shape.

    Returns:
        For each mask (n,) int64, indices of its flattened elements, ascending.
    """
    flat = torch.stack([mask.flatten() for mask in masks])
    return list(flat.nonzero()[:, 1].split(flat.sum(dim=1).tolist()))


# ---------------------------------------------------------------------------------------------- modules


class SlotConEmbedder(nn.Module):
    """Dense projector and prototypes; the teacher has its own copy."""

    def __init__(
        self,
        *,
        in_features: list[str],
        grid_feature: str,
        projector: MLP,
        num_prototypes: int,
        embed_dim: int,
        temp: float,
        align_projection: bool = False,
        image_projector: MLP | None = None,
    ) -> None:
        """
        Args:
            in_features: backbone features that are fused and projected.
            grid_feature: the one of them whose grid is used.
            projector: maps fused cells to `embed_dim` dimensions.
            num_prototypes: K.
            embed_dim: D.
            temp: temperature of the assignment.
            align_projection: group only the overlap of the views, aligned before grouping (supplement, Table 3c).
            image_projector: head of the image-level loss on the pooled features, if that is used.
        """
        super().__init__()
        self.in_features = in_features
        self.grid_feature = grid_feature
        self.projector = projector
        self.prototypes = nn.Parameter(torch.randn(num_prototypes, embed_dim))
        self.temp = temp
        self.align_projection = align_projection
        self.image_projector = image_projector

    def forward(self, features: dict[str, Tensor], view: ViewBatch, rois: Tensor | None) -> RegionEmbeddings:
        """
        Args:
            features: backbone features.
            view: the view they belong to.
            rois: (N, 4) overlap with the other view, used where `align_projection`; see `geometry.overlap_rois`.
        """
        h, w = features[self.grid_feature].shape[-2:]
        x = fuse_levels([features[f] for f in self.in_features], (h, w))
        z = self.projector(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(self.prototypes.dtype)
            if self.align_projection:
                assert rois is not None
                z = align_features(z, rois, view.hflip)
            slots, dots = assign_slots(z, self.prototypes, self.temp)
        active = active_slots(dots)
        if self.align_projection:
            assert rois is not None
            # Without overlap `z` is all zeros, and prototype 0 would win every cell.
            active &= (rois[:, 2:] > rois[:, :2]).all(dim=1, keepdim=True)
        ids = torch.arange(slots.shape[1], device=slots.device).expand(slots.shape[:2])
        image = None if self.image_projector is None else self.image_projector(x.mean(dim=(2, 3)))
        return RegionEmbeddings(z=slots, ids=ids, valid=active, scores=dots, features=z, image=image)


class SlotConCriterion(nn.Module):
    """Grouping + slot + optional image-level loss, both directions; predictor and centre live here."""

    center: Tensor
    images_since_active: Tensor

    def __init__(
        self,
        *,
        predictor: MLP,
        num_prototypes: int,
        student_temp: float,
        teacher_temp: float,
        slot_temp: float,
        center_momentum: float,
        group_loss_weight: float,
        align_assignment: bool = True,
        regression: bool = False,
        image_loss_weight: float = 0.0,
        image_predictor: MLP | None = None,
    ) -> None:
        """Arguments are the symbols of the paper; see d2_objssl/config.py, MODEL.SSL.SLOTCON."""
        super().__init__()
        self.predictor = predictor
        self.image_predictor = image_predictor
        self.student_temp = student_temp
        self.teacher_temp = teacher_temp
        self.slot_temp = slot_temp
        self.center_momentum = center_momentum
        self.group_loss_weight = group_loss_weight
        self.align_assignment = align_assignment
        self.regression = regression
        self.image_loss_weight = image_loss_weight
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        # How many images of the global batch have passed since each prototype last won a cell.
        self.register_buffer("images_since_active", torch.zeros(num_prototypes, dtype=torch.int64))
        self.metrics: dict[str, Tensor] = {}

    def forward(
        self, student: list[RegionEmbeddings], teacher: list[RegionEmbeddings], views: list[ViewBatch]
    ) -> dict[str, Tensor]:
        """
        Args:
            student, teacher: embeddings of the two views; the teacher's without gradient.
            views: the two views.

        Returns:
            Weighted scalars "loss_group", "loss_slot" and, where it has a weight, "loss_image".
        """
        pairs = [student[a].valid & teacher[b].valid for a, b in _DIRECTIONS]
        rows = true_rows([*pairs, *(t.valid for t in teacher)])
        pair_rows, key_rows = rows[:2], rows[2:]
        queries = [
            self.predictor(student[a].z.flatten(0, 1).index_select(0, of_pairs)).float()
            for (a, _), of_pairs in zip(_DIRECTIONS, pair_rows, strict=True)
        ]
        # Similarities and softmaxes are worth full precision; they cost next to nothing.
        with torch.autocast(self.center.device.type, enabled=False):
            group = self._group_loss(student, teacher, views)
            slot = self._slot_losses(queries, teacher, pair_rows, key_rows)
        losses = {
            "loss_group": self.group_loss_weight * group,
            "loss_slot": (1 - self.group_loss_weight) * (slot[0] + slot[1]),
        }
        if self.image_loss_weight > 0:
            image = [self._image_loss(student[a], teacher[b]) for a, b in _DIRECTIONS]
            losses["loss_image"] = self.image_loss_weight * (image[0] + image[1])
        if self.training:
            self._update_statistics(student, teacher, pairs)
        return losses

    def _group_loss(
        self, student: list[RegionEmbeddings], teacher: list[RegionEmbeddings], views: list[ViewBatch]
    ) -> Tensor:
        def cells(scores: Tensor | None, roi: Tensor, hflip: Tensor) -> Tensor:
            assert scores is not None
            aligned = align_features(scores, roi, hflip) if self.align_assignment else scores
            return aligned.permute(0, 2, 3, 1).flatten(0, 2)

        rois, valid = zip(overlap_rois(views[0], views[1]), overlap_rois(views[1], views[0]), strict=True)
        student_dots = [cells(s.scores, r, v.hflip) for s, r, v in zip(student, rois, views, strict=True)]
        teacher_dots = [cells(t.scores, r, v.hflip) for t, r, v in zip(teacher, rois, views, strict=True)]
        num_cells = student_dots[0].shape[0] // len(views[0])
        cell_valid = valid[0].repeat_interleave(num_cells)
        loss = [
            grouping_loss(
                student_dots[a], teacher_dots[b], self.center, self.student_temp, self.teacher_temp, cell_valid
            )
            for a, b in _DIRECTIONS
        ]
        return loss[0] + loss[1]

    def _slot_losses(
        self, queries: list[Tensor], teacher: list[RegionEmbeddings], pair_rows: list[Tensor], key_rows: list[Tensor]
    ) -> list[Tensor]:
        """The slot loss of each direction.

        Args:
            queries: (P, D) predicted slots of each direction's pairs.
            teacher: embeddings of the two views.
            pair_rows: (P,) of each direction, which of the (N K) slots of a view are its pairs.
            key_rows: of each view, which of its slots are active in the teacher.
        """
        slots = [t.z.flatten(0, 1) for t in teacher]
        if self.regression:
            return [
                slot_regression(q, slots[b].index_select(0, of_pairs))
                for q, of_pairs, (_, b) in zip(queries, pair_rows, _DIRECTIONS, strict=True)
            ]
        gathered = gather_rows([z.index_select(0, rows) for z, rows in zip(slots, key_rows, strict=True)])
        losses = []
        for q, of_pairs, (_, b) in zip(queries, pair_rows, _DIRECTIONS, strict=True):
            keys, offset = gathered[b]
            # Every pair is among the active keys of this process: where in their list?
            labels = torch.searchsorted(key_rows[b], of_pairs) + offset
            losses.append(compact_slot_nce(q, keys, labels, self.slot_temp))
        return losses

    def _image_loss(self, student: RegionEmbeddings, teacher: RegionEmbeddings) -> Tensor:
        assert student.image is not None and teacher.image is not None and self.image_predictor is not None
        queries = self.image_predictor(student.image).float()
        keys, offset = gather_keys(teacher.image.float())
        with torch.autocast(queries.device.type, enabled=False):
            return image_nce(queries, keys, offset, self.slot_temp)

    @torch.no_grad()
    def _update_statistics(
        self, student: list[RegionEmbeddings], teacher: list[RegionEmbeddings], pairs: list[Tensor]
    ) -> None:
        """Move the centre, note which prototypes are in use, and leave scalars for the log."""
        scores = torch.stack([t.scores.mean(dim=(0, 2, 3)) for t in teacher if t.scores is not None]).mean(0)
        active = torch.stack([t.valid.float().mean(0) for t in teacher]).mean(0)
        scores, active = all_reduce_mean(torch.stack([scores, active.to(scores)])).unbind(0)
        self.center.copy_(update_center(self.center, scores[None], self.center_momentum))
        self.images_since_active += len(student[0].z) * comm.get_world_size()
        self.images_since_active.masked_fill_(active > 0, 0)
        maps = [s.features.float().mean(dim=(2, 3)) for s in student if s.features is not None]
        self.metrics = {
            "active_slots": torch.stack([t.valid.sum(1).float().mean() for t in teacher]).mean(),
            "positive_pairs": torch.stack([p.sum(1).float().mean() for p in pairs]).mean(),
            "dead_prototypes": (self.images_since_active >= _DEAD_AFTER_IMAGES).sum(),
            "feature_std": feature_std(torch.cat(maps)),
        }


@SSL_METHOD_REGISTRY.register()
def SlotCon(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> SSLMethod:
    """Build SlotCon from MODEL.SSL.{IN_FEATURES, PROJECTOR, PREDICTOR, SLOTCON}."""
    ssl, slotcon = cfg.MODEL.SSL, cfg.MODEL.SSL.SLOTCON
    for key, known in (("ALIGN", ("assignment", "projection")), ("SLOT_LOSS", ("contrastive", "regression"))):
        if slotcon[key] not in known:
            raise ValueError(f'MODEL.SSL.SLOTCON.{key} is "{slotcon[key]}"; known: {known}')
    if ssl.PREDICTOR.OUT_DIM != ssl.PROJECTOR.OUT_DIM:
        raise ValueError(
            f"MODEL.SSL.PREDICTOR.OUT_DIM is {ssl.PREDICTOR.OUT_DIM}, MODEL.SSL.PROJECTOR.OUT_DIM "
            f"{ssl.PROJECTOR.OUT_DIM}: SlotCon compares their outputs, so they must be equal"
        )
    in_dim = sum(int(input_shape[f].channels or 0) for f in ssl.IN_FEATURES)
    embed_dim = ssl.PROJECTOR.OUT_DIM
    image_loss = slotcon.IMAGE_LOSS_WEIGHT > 0
    align_projection = slotcon.ALIGN == "projection"

    def image_head(dim: int, last_norm: bool) -> MLP | None:
        if not image_loss:
            return None
        head = ssl.PROJECTOR
        return MLP(
            dim, num_fc=2, fc_dim=head.FC_DIM, out_dim=embed_dim, norm=head.NORM, activation="relu", last_norm=last_norm
        )

    embedder = SlotConEmbedder(
        in_features=list(ssl.IN_FEATURES),
        grid_feature=ssl.GRID_FEATURE or ssl.IN_FEATURES[-1],
        projector=MLP.from_config(ssl.PROJECTOR, in_dim),
        num_prototypes=slotcon.NUM_PROTOTYPES,
        embed_dim=embed_dim,
        temp=slotcon.TEACHER_TEMP,
        align_projection=align_projection,
        image_projector=image_head(in_dim, last_norm=True),
    )
    criterion = SlotConCriterion(
        predictor=MLP.from_config(ssl.PREDICTOR, embed_dim),
        num_prototypes=slotcon.NUM_PROTOTYPES,
        student_temp=slotcon.STUDENT_TEMP,
        teacher_temp=slotcon.TEACHER_TEMP,
        slot_temp=slotcon.SLOT_TEMP,
        center_momentum=slotcon.CENTER_MOMENTUM,
        group_loss_weight=slotcon.GROUP_LOSS_WEIGHT,
        align_assignment=not align_projection,
        regression=slotcon.SLOT_LOSS == "regression",
        image_loss_weight=slotcon.IMAGE_LOSS_WEIGHT,
        image_predictor=image_head(embed_dim, last_norm=False),
    )

    def overlaps(views: list[ViewBatch]) -> list[Tensor]:
        return [overlap_rois(views[0], views[1])[0], overlap_rois(views[1], views[0])[0]]

    return SSLMethod(embedder, criterion, sample=overlaps if align_projection else None, num_views=2)
