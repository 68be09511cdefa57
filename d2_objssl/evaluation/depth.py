"""Errors of depth maps.

    d, t  predicted and true depth of a pixel, metres; means are over the scored pixels of an image
    AbsRel mean(|d - t| / t) · SqRel mean((d - t)^2 / t) · RMSE sqrt(mean((d - t)^2)) · RMSElog the same of natural logarithms
    log10 mean(|log10 d - log10 t|) · delta1, 2, 3: share of pixels with max(d / t, t / d) < 1.25, 1.25^2, 1.25^3

Each is computed for every image and then averaged over images, as by Eigen et al. (NeurIPS 2014), BTS and AdaBins; the
mean over all pixels at once would be another number. A pixel is scored if it was measured, its true depth is between
MODEL.DEPTH.MIN and MAX, and it lies in the data set's crop (`scored_area`). Predictions are clipped to that range. Depths
are not rescaled by the median.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

from ..data.depth_mapper import read_depth_map

logger = logging.getLogger(__name__)

_GARG = (0.40810811, 0.99189189, 0.03594771, 0.96405229)  # top, bottom, left, right: shares of height and width
_EIGEN = (45, 471, 41, 601)  # top, bottom, left, right, pixels of NYUv2's images
_NYU_SIZE = (480, 640)
_KITTI_BENCHMARK_SIZE = (352, 1216)


def scored_area(crop: str, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of an image in which depth is scored.

    Args:
        crop: "none" | "eigen": of NYUv2 (Eigen et al.) | "garg": leaves out sky and edges (Garg et al., ECCV 2016) |
            "garg_kitti": that part of the 352 x 1216 pixels at the bottom centre, which KITTI's benchmark shows, as
            AdaBins and BinsFormer have it.
        height, width: of the true depth map, pixels.

    Raises:
        ValueError: for another crop, or an image that it is not made for.
    """
    if crop == "none":
        return slice(0, height), slice(0, width)
    if crop == "eigen":
        if (height, width) != _NYU_SIZE:
            raise ValueError(f"Eigen's crop is for images of 480 x 640 pixels (height x width), not {height} x {width}")
        return slice(*_EIGEN[:2]), slice(*_EIGEN[2:])
    top = left = 0
    if crop == "garg_kitti":
        top, left = height - _KITTI_BENCHMARK_SIZE[0], (width - _KITTI_BENCHMARK_SIZE[1]) // 2
        if min(top, left) < 0:
            raise ValueError(f"KITTI's images have at least 352 x 1216 pixels (height x width), not {height} x {width}")
        height, width = _KITTI_BENCHMARK_SIZE
    elif crop != "garg":
        raise ValueError(f'depth_crop is "{crop}" in the metadata; known: "none", "eigen", "garg", "garg_kitti"')
    first_row, last_row = (top + int(share * height) for share in _GARG[:2])
    first_column, last_column = (left + int(share * width) for share in _GARG[2:])
    return slice(first_row, last_row), slice(first_column, last_column)


def depth_errors(prediction: Tensor, truth: Tensor) -> dict[str, float]:
    """The errors of one image; see the module.

    Args:
        prediction, truth: (n,) float, n > 0 scored pixels, metres, positive.
    """
    prediction, truth = prediction.double(), truth.double()
    difference, log_ratio = prediction - truth, (prediction / truth).log()
    errors = {
        "AbsRel": (difference.abs() / truth).mean(),
        "SqRel": (difference**2 / truth).mean(),
        "RMSE": (difference**2).mean().sqrt(),
        "RMSElog": (log_ratio**2).mean().sqrt(),
        "log10": log_ratio.abs().mean() / math.log(10),
    }
    ratio = torch.maximum(prediction / truth, truth / prediction)
    errors |= {f"delta{k}": (ratio < 1.25**k).double().mean() for k in (1, 2, 3)}
    return {name: error.item() for name, error in errors.items()}


class DepthEvaluator(DatasetEvaluator):
    """Mean errors of depth over the images of all processes."""

    def __init__(self, *, min_depth: float, max_depth: float, crop: str = "none") -> None:
        """
        Args:
            min_depth, max_depth: true depths between them are scored, metres.
            crop: see `scored_area`.
        """
        self.min_depth = min_depth
        self.max_depth = max_depth
        self.crop = crop
        self._errors: dict[Hashable, dict[str, float] | None] = {}

    def reset(self) -> None:
        """Forget all images."""
        self._errors.clear()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Tensor]]) -> None:
        """Take up images (dataset dicts, whose depth maps are read here) and the model's "depth", (height, width) metres.

        A prediction of another size than the true map is resized to it, bilinearly.
        """
        for image, output in zip(inputs, outputs, strict=True):
            truth = torch.from_numpy(read_depth_map(image))
            prediction = output["depth"].detach().float().cpu()
            if prediction.shape != truth.shape:
                resized = F.interpolate(prediction[None, None], truth.shape, mode="bilinear", align_corners=False)
                prediction = resized[0, 0]
            self._errors[image["image_id"]] = self._score(prediction, truth)

    def _score(self, prediction: Tensor, truth: Tensor) -> dict[str, float] | None:
        """Errors of one image, None if no pixel of it is scored; both (H, W)."""
        area = scored_area(self.crop, *truth.shape)
        prediction, truth = prediction[area], truth[area]
        valid = (truth > self.min_depth) & (truth < self.max_depth)
        if not valid.any():
            return None
        return depth_errors(prediction[valid].clamp(self.min_depth, self.max_depth), truth[valid])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """{"depth": {"AbsRel", "SqRel", "RMSE", "RMSElog", "log10", "delta1", "delta2", "delta3"}}; {} but in the main process.

        Each image counts once, whichever process, or however many, had it.

        Raises:
            ValueError: if no image has a pixel to score.
        """
        gathered = comm.gather(self._errors)
        if not comm.is_main_process():
            return {}
        by_image = {image: errors for own in gathered for image, errors in own.items()}
        scored = [errors for errors in by_image.values() if errors is not None]
        if not scored:
            raise ValueError(
                f"None of the {len(by_image)} images of DATASETS.TEST has a measured depth between {self.min_depth:g} "
                f"and {self.max_depth:g} m (MODEL.DEPTH.MIN, MAX) in the crop {self.crop}"
            )
        if len(scored) < len(by_image):
            logger.warning("%d of %d images have no depth to score", len(by_image) - len(scored), len(by_image))
        results = {name: sum(errors[name] for errors in scored) / len(scored) for name in scored[0]}
        logger.info("Depth, mean of %d images: %s", len(scored), {k: round(v, 4) for k, v in results.items()})
        return {"depth": results}
