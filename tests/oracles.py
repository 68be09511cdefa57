"""Naive versions of the mathematics, written from the papers one scalar at a time, in float64.

Nothing here imports the package. Loops run over plain indices; sums, norms and softmaxes are spelled out. Values stay
scalar tensors where the package's are tensors, so that autograd gives the oracle's gradients, too.

N images, G images of all processes, K prototypes, D dimensions, h, w cells, n cells of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------ scalars


def total(terms: Sequence[Tensor]) -> Tensor:
    """Sum of scalars."""
    result = torch.zeros((), dtype=torch.float64)
    for term in terms:
        result = result + term
    return result


def dot(a: Sequence[Tensor] | Tensor, b: Sequence[Tensor] | Tensor) -> Tensor:
    """Inner product of two vectors."""
    return total([a[i] * b[i] for i in range(len(a))])


def cosine(a: Sequence[Tensor] | Tensor, b: Sequence[Tensor] | Tensor) -> Tensor:
    """Cosine of the angle between two vectors."""
    return dot(a, b) / (torch.sqrt(dot(a, a)) * torch.sqrt(dot(b, b)))


def softmax(logits: Sequence[Tensor]) -> list[Tensor]:
    """Softmax of a list of scalars."""
    exponentials = [torch.exp(x) for x in logits]
    return [e / total(exponentials) for e in exponentials]


# ------------------------------------------------------------------------------------------------ SlotCon


def assign_slots(features: Tensor, prototypes: Tensor, temp: float, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """SlotCon's assignment and slots: (N, D, h, w), (K, D) -> slots (N, K, D), cosines (N, K, h, w)."""
    n, d, h, w = features.shape
    k = len(prototypes)
    slots: list[Tensor] = []
    dots: list[Tensor] = []
    for b in range(n):
        cells = [[features[b, c, i, j] for c in range(d)] for i in range(h) for j in range(w)]
        scores = [[cosine(cell, prototypes[p]) for p in range(k)] for cell in cells]
        shares = [[a + eps for a in softmax([s / temp for s in row])] for row in scores]
        for p in range(k):
            mass = total([row[p] for row in shares])
            for c in range(d):
                slots.append(
                    total([row[p] * cell[c] for row, cell in zip(shares, cells, strict=True)]) / mass,
                )
            dots.extend(row[p] for row in scores)
    return torch.stack(slots).reshape(n, k, d), torch.stack(dots).reshape(n, k, h, w)


def active_slots(dots: Tensor) -> Tensor:
    """SlotCon's indicator: (N, K, h, w) -> (N, K) bool, True where a prototype is the best one of some cell."""
    n, k, h, w = dots.shape
    active = torch.zeros(n, k, dtype=torch.bool)
    for b in range(n):
        for i in range(h):
            for j in range(w):
                best = 0
                for p in range(1, k):
                    if dots[b, p, i, j] > dots[b, best, i, j]:
                        best = p
                active[b, best] = True
    return active


def grouping_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    valid: Sequence[bool] | Tensor | None = None,
) -> Tensor:
    """SlotCon's grouping loss over cells: (n, K), (n, K), (1, K) -> scalar; the mean over the cells that are valid."""
    terms = []
    for cell in range(len(student)):
        if valid is not None and not valid[cell]:
            continue
        k = student.shape[1]
        target = softmax([(teacher[cell, p] - center[0, p]) / teacher_temp for p in range(k)])
        guess = softmax([student[cell, p] / student_temp for p in range(k)])
        terms.append(-total([target[p] * torch.log(guess[p]) for p in range(k)]))
    return total(terms) / max(len(terms), 1)


def update_center(center: Tensor, teacher_maps: Sequence[Tensor], momentum: float) -> Tensor:
    """SlotCon's centre: centre (1, K) and the teacher's cosines (N, K, h, w) of every view and process -> (1, K)."""
    moved = []
    for p in range(center.shape[1]):
        values = [m[b, p, i, j] for m in teacher_maps for b, i, j in _positions(m)]
        moved.append(momentum * center[0, p] + (1 - momentum) * total(values) / len(values))
    return torch.stack(moved)[None]


def _positions(maps: Tensor) -> list[tuple[int, int, int]]:
    n, _, h, w = maps.shape
    return [(b, i, j) for b in range(n) for i in range(h) for j in range(w)]


def slot_nce(
    queries: Tensor,
    keys: Tensor,
    query_active: Tensor,
    key_active: Tensor,
    rank_offset: int,
    temp: float,
    predictor: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """SlotCon Eq. 6: queries (N, K, D) of a process, keys (G, K, D) of all of them -> scalar, 0 without a pair."""
    n, k, _ = queries.shape
    terms = []
    for b in range(n):
        for p in range(k):
            if not (query_active[b, p] and key_active[rank_offset + b, p]):
                continue
            query = queries[b, p] if predictor is None else predictor(queries[b, p])
            positive = torch.exp(cosine(query, keys[rank_offset + b, p]) / temp)
            everything = [
                torch.exp(cosine(query, keys[other, q]) / temp)
                for other in range(len(keys))
                for q in range(k)
                if key_active[other, q]
            ]
            terms.append(-torch.log(positive / total(everything)))
    return 2 * temp * total(terms) / max(len(terms), 1)


def slot_regression(queries: Tensor, keys: Tensor) -> Tensor:
    """BYOL: |q / |q| - k / |k||^2 of matching rows (P, D), their mean, 0 without a row."""
    terms = []
    for query, key in zip(queries, keys, strict=True):
        q_norm, k_norm = torch.sqrt(dot(query, query)), torch.sqrt(dot(key, key))
        terms.append(total([(q / q_norm - k / k_norm) ** 2 for q, k in zip(query, key, strict=True)]))
    return total(terms) / max(len(terms), 1)


def image_nce(queries: Tensor, keys: Tensor, rank_offset: int, temp: float) -> Tensor:
    """MoCo-v3: queries (N, D), keys (G, D) -> scalar, 2 tau times the cross-entropy over the batch."""
    terms = []
    for b in range(len(queries)):
        chances = softmax([cosine(queries[b], key) / temp for key in keys])
        terms.append(-torch.log(chances[rank_offset + b]))
    return 2 * temp * total(terms) / len(terms)


# ------------------------------------------------------------------------------------------------ geometry


def overlap_roi(
    own: Sequence[float], own_flip: bool, other: Sequence[float]
) -> tuple[tuple[float, float, float, float], bool]:
    """Where two crops (x1, y1, x2, y2) of an image overlap, in [0, 1] of the first one as it is seen; and whether."""
    left, top = max(own[0], other[0]), max(own[1], other[1])
    right, bottom = min(own[2], other[2]), min(own[3], other[3])
    width, height = own[2] - own[0], own[3] - own[1]
    x1, x2 = (left - own[0]) / width, (right - own[0]) / width
    if own_flip:
        x1, x2 = (own[2] - right) / width, (own[2] - left) / width
    return (x1, (top - own[1]) / height, x2, (bottom - own[1]) / height), left < right and top < bottom


def bilinear(feature: Tensor, y: float, x: float) -> Tensor:
    """Value of (h, w) at continuous coordinates, cell (0, 0) reaching from 0 to 1; constant beyond the outer centres."""
    h, w = feature.shape
    y, x = min(max(y - 0.5, 0.0), h - 1.0), min(max(x - 0.5, 0.0), w - 1.0)
    i, j = min(int(y), max(h - 2, 0)), min(int(x), max(w - 2, 0))
    i2, j2 = min(i + 1, h - 1), min(j + 1, w - 1)
    a, b = y - i, x - j
    upper = (1 - b) * feature[i, j] + b * feature[i, j2]
    lower = (1 - b) * feature[i2, j] + b * feature[i2, j2]
    return (1 - a) * upper + a * lower


def align_features(features: Tensor, rois: Sequence[Sequence[float]], flips: Sequence[bool]) -> Tensor:
    """SlotCon A.1: resample boxes in [0, 1] of (N, C, h, w) to h x w cells, one sample a cell, and undo the flip."""
    n, c, h, w = features.shape
    values = []
    for b in range(n):
        x1, y1, x2, y2 = (float(v) for v in rois[b])
        for channel in range(c):
            for i in range(h):
                for j in range(w):
                    column = w - 1 - j if flips[b] else j
                    y, x = y1 + (i + 0.5) / h * (y2 - y1), x1 + (column + 0.5) / w * (x2 - x1)
                    empty = x1 >= x2 or y1 >= y2
                    values.append(
                        features[b, channel, 0, 0] * 0 if empty else bilinear(features[b, channel], y * h, x * w)
                    )
    return torch.stack(values).reshape(n, c, h, w)


# ------------------------------------------------------------------------------------------------ optimisation


def lars(
    start: Sequence[float],
    gradients: Sequence[Sequence[float]],
    *,
    one_dimensional: bool,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
) -> list[list[float]]:
    """LARS on one tensor, given as a flat list: its values after each of the steps."""
    p, m, after = list(start), [0.0] * len(start), []
    for g in gradients:
        u = list(g)
        if not one_dimensional:
            u = [gi + weight_decay * pi for gi, pi in zip(g, p, strict=True)]
            p_norm, u_norm = math.sqrt(sum(x * x for x in p)), math.sqrt(sum(x * x for x in u))
            if p_norm > 0 and u_norm > 0:
                u = [trust_coefficient * p_norm / u_norm * x for x in u]
        m = [momentum * mi + ui for mi, ui in zip(m, u, strict=True)]
        p = [pi - lr * mi for pi, mi in zip(p, m, strict=True)]
        after.append(list(p))
    return after


# ------------------------------------------------------------------------------------------------ DetCon


def region_weights(region_map: Tensor, stride: int, num_ids: int) -> Tensor:
    """Ids of pixels (S, S) -> (num_ids, h, w): 1 for the most frequent id of a cell, the lowest one among equals."""
    side = len(region_map)
    cells = math.ceil(side / stride)
    weights = torch.zeros(num_ids, cells, cells)
    for i in range(cells):
        for j in range(cells):
            counts = [0] * num_ids
            for y in range(i * stride, min((i + 1) * stride, side)):
                for x in range(j * stride, min((j + 1) * stride, side)):
                    if 0 <= int(region_map[y, x]) < num_ids:
                        counts[int(region_map[y, x])] += 1
            if max(counts) > 0:
                weights[counts.index(max(counts)), i, j] = 1
    return weights


def masked_average_pool(features: Tensor, weights: Tensor) -> Tensor:
    """DetCon's mask-pooled vectors: (N, C, h, w), (N, M, h, w) -> (N, M, C), zero for an empty mask."""
    n, c, h, w = features.shape
    cells = [(i, j) for i in range(h) for j in range(w)]
    values = []
    for b in range(n):
        for mask in weights[b]:
            mass = float(mask.sum())
            for channel in range(c):
                value = total([mask[i, j] * features[b, channel, i, j] for i, j in cells])
                values.append(value / mass if mass > 0 else value)
    return torch.stack(values).reshape(n, -1, c)


def detcon_nce(
    preds: Sequence[Tensor],
    targets: Sequence[Tensor],
    pred_ids: Sequence[Tensor],
    target_ids: Sequence[Tensor],
    rank_offset: int,
    temp: float,
    local_negatives: bool,
) -> Tensor:
    """DetCon Eq. 1-3 with the released code's weights; every argument has an entry for each of the two views.

    preds (N, M, D), targets (G, M, D), ids (N, M) -> scalar. Several positives share the label equally, a query counts
    1 / (how often its region was drawn), the mean is over all queries.
    """
    n, m, _ = preds[0].shape
    terms = []
    for own, other in ((0, 1), (1, 0)):
        for b in range(n):
            for r in range(m):
                region = int(pred_ids[own][b, r])
                positives, everything = [], []
                for g in range(len(targets[0])):
                    is_own_image = g == rank_offset + b
                    for u in range(m):
                        same = is_own_image and int(target_ids[other][b, u]) == region
                        if same or local_negatives or not is_own_image:
                            logit = cosine(preds[own][b, r], targets[other][g, u]) / temp
                            everything.append(torch.exp(logit))
                            if same:
                                positives.append(logit)
                        same = is_own_image and int(target_ids[own][b, u]) == region
                        if not same and (local_negatives or not is_own_image):
                            everything.append(torch.exp(cosine(preds[own][b, r], targets[own][g, u]) / temp))
                if positives:
                    repeats = sum(int(i) == region for i in pred_ids[own][b])
                    terms.append((torch.log(total(everything)) - total(positives) / len(positives)) / repeats)
    return total(terms) / (n * m)


def nt_xent(z1: Tensor, z2: Tensor, temp: float) -> Tensor:
    """SimCLR's loss: (N, D) of two views -> mean over 2 N anchors of the cross-entropy over the 2 N - 1 others."""
    n, z = len(z1), [*z1, *z2]
    terms = []
    for i in range(2 * n):
        others = {k: cosine(z[i], z[k]) / temp for k in range(2 * n) if k != i}
        positive = (i + n) % (2 * n)
        terms.append(torch.log(total([torch.exp(x) for x in others.values()])) - others[positive])
    return total(terms) / (2 * n)
