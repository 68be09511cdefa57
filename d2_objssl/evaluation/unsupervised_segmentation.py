"""Unsupervised semantic segmentation: prototypes as classes (SlotCon, Wen et al., NeurIPS 2022, supplement A.3).

    K  prototypes          S  side of an image, pixels
    C  classes of the ground truth

    of the paper                                        here
    prediction of each pixel's prototype (Eq. 1)        ObjectSSL.embed_images, assign_pixels
    best one-to-one matching [13, 14, 16]               confusion_histogram, match_one_to_one
    mIoU and pAcc                                       segmentation_metrics

Choices where the supplement says nothing:

* The matching is made once, on the histogram of the whole data set, and maximises the number of correct pixels, as in IIC
  and PiCIE. It sees the labels: the figures are an upper bound of what the prototypes can be named.
* Where K > C, K - C prototypes stay unmatched; their pixels are wrong, whatever their class.
  Where K < C, some classes stay without a prototype, and have an IoU of 0. The paper has K = C = 27. For other K,
  `match_majority` gives each prototype the class that it covers most, so that several may share one (IIC's many-to-one).
* The mean IoU is over the classes that the ground truth has, as in Detectron2's SemSegEvaluator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..data.center_crops import CenterCrops
from ..modeling import ObjectSSL
from ..modeling.meta_arch import assign_pixels
from .prototype_model import embed_dataset

UNMATCHED = -1


def confusion_histogram(prediction: Tensor, classes: Tensor, num_prototypes: int, num_classes: int) -> Tensor:
    """Count the pixels of each pair of prototype and class.

    Args:
        prediction: integer prototypes, of any shape.
        classes: integer classes of the same shape; pixels of `num_classes` or above do not count.
        num_prototypes, num_classes: K, C.

    Returns:
        (K, C) int64.
    """
    counted = classes < num_classes
    pairs = prediction[counted].long() * num_classes + classes[counted].long()
    return torch.bincount(pairs, minlength=num_prototypes * num_classes).view(num_prototypes, num_classes)


def match_one_to_one(histogram: np.ndarray) -> np.ndarray:
    """Give min(K, C) prototypes a class of their own, so that most pixels are correct.

    Args:
        histogram: (K, C), see `confusion_histogram`.

    Returns:
        (K,) int64 classes; UNMATCHED where a prototype has none.
    """
    prototypes, classes = linear_sum_assignment(histogram, maximize=True)
    class_of_prototype = np.full(len(histogram), UNMATCHED, dtype=np.int64)
    class_of_prototype[prototypes] = classes
    return class_of_prototype


def match_majority(histogram: np.ndarray) -> np.ndarray:
    """Give each prototype the class of most of its pixels; UNMATCHED where it has none: (K, C) -> (K,) int64."""
    return np.where(histogram.sum(axis=1) > 0, histogram.argmax(axis=1), UNMATCHED)


def segmentation_metrics(histogram: np.ndarray, class_of_prototype: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Score the prototypes as predictions of their classes.

    Args:
        histogram: (K, C), see `confusion_histogram`.
        class_of_prototype: (K,) from `match_one_to_one` or `match_majority`.

    Returns:
        "mIoU", the mean over the classes of the ground truth, and "pAcc", the share of correct pixels, both in percent.
        (C,) float64 IoU of each class, in percent; NaN where the ground truth does not have the class.

    Raises:
        ValueError: if no pixel counts.
    """
    if histogram.sum() == 0:
        raise ValueError("the ground truth has no pixel that counts: all labels are ignored")
    num_classes = histogram.shape[1]
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    matched = class_of_prototype != UNMATCHED
    np.add.at(confusion, class_of_prototype[matched], histogram[matched])
    correct, actual = np.diag(confusion), histogram.sum(axis=0)
    union = actual + confusion.sum(axis=1) - correct
    iou = np.full(num_classes, np.nan)
    np.divide(100.0 * correct, union, out=iou, where=actual > 0)
    return {"mIoU": float(np.nanmean(iou)), "pAcc": float(100 * correct.sum() / actual.sum())}, iou


@dataclass
class Segmentation:
    """What a model made of a data set.

    Attributes:
        histogram: (K, C) int64, see `confusion_histogram`.
        images, classes, predictions: of the samples that were asked for: (S, S, 3) uint8 RGB, (S, S) uint8 classes, (S, S)
            int64 prototypes.
    """

    histogram: np.ndarray
    images: list[np.ndarray] = field(default_factory=list)
    classes: list[np.ndarray] = field(default_factory=list)
    predictions: list[np.ndarray] = field(default_factory=list)


def segment_dataset(
    model: ObjectSSL, dataset: CenterCrops, num_classes: int, *, num_samples: int = 0, **run: Any
) -> Segmentation:
    """Segment labelled images by the prototypes of the exported branch (SlotCon's is the teacher).

    Args:
        model: in evaluation mode.
        dataset: with labels.
        num_classes: C.
        num_samples: how many images, evenly spaced in the data set, are kept for pictures.
        **run: see `prototype_model.embed_dataset`.
    """
    assert model.prototypes is not None
    num_prototypes, size = len(model.prototypes), (dataset.crop_size, dataset.crop_size)
    kept = set(np.linspace(0, len(dataset) - 1, min(num_samples, len(dataset))).round().astype(int).tolist())
    histogram = torch.zeros(num_prototypes, num_classes, dtype=torch.int64, device=model.device)
    result = Segmentation(np.zeros(0))
    for batch, embeddings in embed_dataset(model, dataset, **run):
        assert embeddings.scores is not None
        prediction = assign_pixels(embeddings.scores, size)
        histogram += confusion_histogram(prediction, batch["classes"].to(model.device), num_prototypes, num_classes)
        for row, index in enumerate(batch["index"].tolist()):
            if index in kept:
                result.images.append(batch["image"][row].permute(1, 2, 0).numpy())
                result.classes.append(batch["classes"][row].numpy())
                result.predictions.append(prediction[row].cpu().numpy())
    result.histogram = histogram.cpu().numpy()
    return result
