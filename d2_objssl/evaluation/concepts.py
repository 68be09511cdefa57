"""Visual concepts: the segments of a data set that are most like each prototype, and how much prototypes are used.

SlotCon (Wen et al., NeurIPS 2022).

    N, K, D, h, w  as in structures.py      S  side of an image, pixels
    P              segments of an image     k  segments kept of each prototype

    of the paper                                              here
    segments: pixels of one prototype (supplement A.4)        assign_pixels
    feature of a segment, average pooling (A.4)               segment_features
    top-k segments of a prototype by cosine (A.4)             TopSegments
    each image is one segment (supplement F)                  ConceptSearch(object_centric=True)
    active slots, dead prototypes (supplement D)              ConceptSearch.num_active, active_histogram

Choices where the supplement says nothing:

* A segment's feature is the mean, over its pixels, of the projections resized bilinearly as the scores are, not normalised
  before the mean (as slots are pooled in training).
* Of segments with the same cosine, that of the earlier image wins.
* An image taken as one segment has the mean of its projections as feature, and belongs to the prototype nearest to it.
* A prototype is active in an image, as in training, if it wins a cell of the feature map.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Subset

from ..data.center_crops import CenterCrops
from ..modeling import ObjectSSL
from ..modeling.meta_arch import assign_pixels
from ..structures import RegionEmbeddings
from .prototype_model import embed_dataset


def segment_features(features: Tensor, assignment: Tensor, ids: Tensor) -> Tensor:
    """Average the features, resized bilinearly to the pixels, over the segments of an image.

    Args:
        features: (D, h, w) float.
        assignment: (S, S') integer prototypes of the pixels.
        ids: (P,) prototypes that have pixels.

    Returns:
        (P, D). Resizing is linear, so it is the masks that are carried over to the cells, not the features to the pixels.
    """
    masks = (assignment == ids[:, None, None]).to(features.dtype)
    rows, columns = (
        _resizing_matrix(cells, pixels).to(features)
        for cells, pixels in zip(features.shape[1:], assignment.shape, strict=True)
    )
    weights = rows.T @ masks @ columns
    return weights.flatten(1) @ features.flatten(1).T / masks.sum(dim=(1, 2))[:, None]


def _resizing_matrix(cells: int, pixels: int) -> Tensor:
    """(pixels, cells) weights of bilinear resizing along one axis."""
    return F.interpolate(torch.eye(cells)[None], size=pixels, mode="linear", align_corners=False)[0].T


class TopSegments:
    """The k best segments of each prototype in a stream of images; an image has at most one segment of a prototype.

    Attributes:
        cosines: (K, k) float32, descending; -inf where there are fewer segments.
        images: (K, k) int64, places of the images in the data set; -1 where there are fewer.
    """

    def __init__(self, num_prototypes: int, k: int, device: torch.device | str = "cpu") -> None:
        self.cosines = torch.full((num_prototypes, k), -torch.inf, device=device)
        self.images = torch.full((num_prototypes, k), -1, dtype=torch.int64, device=device)

    def update(self, cosines: Tensor, images: Tensor) -> None:
        """Add images.

        Args:
            cosines: (N, K) of the segments to their prototypes; -inf where an image has no such segment.
            images: (N,) int64 places of the images in the data set, ascending from call to call.
        """
        k = self.cosines.shape[1]
        images = torch.where(cosines.T > -torch.inf, images, -1)
        candidates = torch.cat([self.cosines, cosines.T], dim=1)
        # Stable: of equal cosines the one that was there before, or stands further left, comes first.
        self.cosines, order = (x[:, :k] for x in candidates.sort(dim=1, descending=True, stable=True))
        self.images = torch.cat([self.images, images], dim=1).gather(1, order)


class ConceptSearch:
    """Collects, image by image, the top segments of each prototype and the statistics of their use.

    Memory does not grow with the number of images.

    Attributes:
        top: see `TopSegments`.
        num_segments: (K,) int64, images with a segment of the prototype.
        num_active: (K,) int64, images in which the prototype is active.
        active_histogram: (K + 1,) int64, images with 0, 1, ..., K active prototypes.
    """

    def __init__(self, prototypes: Tensor, *, k: int, size: tuple[int, int], object_centric: bool = False) -> None:
        """
        Args:
            prototypes: (K, D).
            k: segments that are kept of each prototype.
            size: (H, W) of the images, pixels.
            object_centric: each image is one segment.
        """
        num_prototypes, device = len(prototypes), prototypes.device
        self.prototypes = F.normalize(prototypes.detach().float(), dim=1)
        self.size = size
        self.object_centric = object_centric
        self.top = TopSegments(num_prototypes, k, device)
        self.num_segments = torch.zeros(num_prototypes, dtype=torch.int64, device=device)
        self.num_active = torch.zeros_like(self.num_segments)
        self.active_histogram = torch.zeros(num_prototypes + 1, dtype=torch.int64, device=device)

    def update(self, embeddings: RegionEmbeddings, images: Tensor) -> None:
        """Add the images of a batch; `images`: (N,) int64 places in the data set."""
        cosines = self._whole_images(embeddings) if self.object_centric else self._segments(embeddings)
        self.top.update(cosines, images.to(cosines.device))
        self.num_segments += (cosines > -torch.inf).sum(dim=0)
        self.num_active += embeddings.valid.sum(dim=0)
        self.active_histogram += torch.bincount(embeddings.valid.sum(dim=1), minlength=len(self.active_histogram))

    def _segments(self, embeddings: RegionEmbeddings) -> Tensor:
        """(N, K) cosine of each segment to its prototype, -inf where there is none."""
        assert embeddings.scores is not None and embeddings.features is not None
        cosines = embeddings.scores.new_full((len(embeddings.scores), len(self.prototypes)), -torch.inf)
        for row, (scores, features) in enumerate(zip(embeddings.scores, embeddings.features, strict=True)):
            assignment = assign_pixels(scores[None], self.size)[0]
            ids = assignment.unique()
            pooled = F.normalize(segment_features(features.float(), assignment, ids), dim=1)
            cosines[row, ids] = (pooled * self.prototypes[ids]).sum(dim=1).to(cosines)
        return cosines

    def _whole_images(self, embeddings: RegionEmbeddings) -> Tensor:
        """(N, K) cosine of each image to its nearest prototype, -inf to all others."""
        assert embeddings.features is not None
        pooled = F.normalize(embeddings.features.float().mean(dim=(2, 3)), dim=1)
        cosines = pooled @ self.prototypes.T
        nearest = cosines.argmax(dim=1, keepdim=True)
        return torch.full_like(cosines, -torch.inf).scatter_(1, nearest, cosines.gather(1, nearest))

    def statistics(self) -> dict[str, float]:
        """Supplement D in numbers.

        Returns:
            "active_slots", the mean over images; "dead_prototypes", active in no image; "images_per_prototype/min",
            "/median" and "/max", over the prototypes that are not dead (NaN if all are).
        """
        counts = self.active_histogram.cpu().numpy()
        alive = self.num_active[self.num_active > 0].cpu().numpy()
        spread = np.percentile(alive, [0, 50, 100]) if len(alive) else np.full(3, np.nan)
        return {
            "active_slots": float(counts @ np.arange(len(counts)) / counts.sum()),
            "dead_prototypes": int((self.num_active == 0).sum()),
            "images_per_prototype/min": float(spread[0]),
            "images_per_prototype/median": float(spread[1]),
            "images_per_prototype/max": float(spread[2]),
        }


def find_concepts(
    model: ObjectSSL, dataset: CenterCrops, *, k: int, object_centric: bool = False, **run: Any
) -> ConceptSearch:
    """Search a data set with the exported branch of a model (SlotCon's is the teacher).

    Args:
        model: in evaluation mode.
        dataset: images.
        k: segments that are kept of each prototype.
        object_centric: each image is one segment, as on ImageNet.
        **run: see `prototype_model.embed_dataset`.
    """
    assert model.prototypes is not None
    size = (dataset.crop_size, dataset.crop_size)
    search = ConceptSearch(model.prototypes, k=k, size=size, object_centric=object_centric)
    for batch, embeddings in embed_dataset(model, dataset, **run):
        search.update(embeddings, batch["index"])
    return search


def assign_images(
    model: ObjectSSL, dataset: CenterCrops, images: list[int], **run: Any
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Segment some images again, for pictures.

    Returns:
        For each place in the data set: (S, S, 3) uint8 RGB, (S, S) int64 prototypes of the pixels.
    """
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    size = (dataset.crop_size, dataset.crop_size)
    for batch, embeddings in embed_dataset(model, Subset(dataset, images), **run):
        assert embeddings.scores is not None
        assignment = assign_pixels(embeddings.scores, size).cpu().numpy()
        pixels = batch["image"].permute(0, 2, 3, 1).numpy()
        found.update(zip(batch["index"].tolist(), zip(pixels, assignment, strict=True), strict=True))
    return found
