"""Monocular depth estimation: the depth, in metres, of every pixel of one image.

    N     images
    H, W  size of an image as the network gets it, pixels

Feature maps -> semantic FPN's sum at the finest one's stride (Kirillov et al., "Panoptic feature pyramid networks", CVPR
2019; Detectron2's `SemSegFPNHead` with one output) -> bilinear to the image -> depth = MAX sigmoid(x), as in BTS.

Loss: the scale-invariant error of logarithms (SILog) of Eigen et al. (NeurIPS 2014, Eq. 4), in the form of BTS (Lee et al.,
"From big to small", 2019, Eq. 4 and 5): with the root, lambda = 0.85 (Eigen: 0.5), times 10, over all measured pixels of
the batch of a process.

SemCL evaluates depth with BinsFormer (Li et al., 2022), whose transformer decoder classifies adaptive bins of depth. This is
*not* BinsFormer but a compact head: it compares backbones with each other, and its numbers are not those of the paper.
Other deviations from the released configs of BinsFormer: no rotation or change of colours in training; in tests no
average with the flipped image, and KITTI's images are not cropped to 352 x 1216 pixels (the scored pixels are the same).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList
from torch import Tensor, nn

_EPSILON = 1e-12  # under the root, whose slope at 0 is infinite


def silog_loss(log_depth: Tensor, target: Tensor, valid: Tensor, variance_focus: float = 0.85) -> Tensor:
    """Root of mean(g^2) - lambda mean(g)^2, with g = log depth - log target.

    Args:
        log_depth: predictions, any shape, float32, logarithms of metres.
        target: depths of that shape, float32, metres.
        valid: bool of that shape, True where `target` is positive and counts.
        variance_focus: lambda, in [0, 1]; with 1 a factor common to all predictions costs nothing.

    Returns:
        Scalar, at least 0; 0 where nothing is valid.
    """
    if not valid.any():
        return log_depth.sum() * 0
    error = log_depth[valid] - target[valid].log()
    # As a variance, which rounding does not make negative.
    squared = error.var(unbiased=False) + (1 - variance_focus) * error.mean() ** 2
    return squared.clamp(min=_EPSILON).sqrt()


@META_ARCH_REGISTRY.register()
class DepthEstimator(nn.Module):
    """A compact depth head on any backbone of Detectron2; see the module."""

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: tuple[str, ...],
        conv_dim: int,
        norm: str,
        min_depth: float,
        max_depth: float,
        variance_focus: float,
        loss_weight: float,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
    ) -> None:
        """
        Args:
            backbone: returns a dict of feature maps.
            in_features: those that are summed; each stride is a power of 2 times the smallest.
            conv_dim: channels of the head.
            norm: of its convolutions.
            min_depth, max_depth: metres; pixels with other depths are not trained on, and none above is predicted.
            variance_focus: lambda of the loss.
            loss_weight: its factor.
            pixel_mean, pixel_std: of each channel, in 0-255.
        """
        super().__init__()
        self.backbone = backbone
        shapes = {name: backbone.output_shape()[name] for name in in_features}
        strides = [shape.stride for shape in shapes.values()]
        self.stride = min(strides)
        # Without an FPN the backbone asks for no padding, but the sum needs maps that fit each other.
        self.size_divisibility = max(backbone.size_divisibility, *strides)
        self.head = SemSegFPNHead(shapes, num_classes=1, conv_dims=conv_dim, common_stride=self.stride, norm=norm)
        # The head's own spread goes by its number of outputs: with one it is so large that the sigmoid is saturated.
        nn.init.normal_(self.head.predictor.weight, std=0.01)
        self.min_depth = min_depth
        self.max_depth = max_depth
        self.variance_focus = variance_focus
        self.loss_weight = loss_weight
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read MODEL.DEPTH.

        Raises:
            ValueError: naming the key that is wrong.
        """
        depth = cfg.MODEL.DEPTH
        check_depth_range(cfg)
        if not 0 <= depth.SILOG_LAMBDA <= 1:
            raise ValueError(f"MODEL.DEPTH.SILOG_LAMBDA is {depth.SILOG_LAMBDA}; it must be from 0 to 1")
        backbone = build_backbone(cfg)
        if not depth.IN_FEATURES or not set(depth.IN_FEATURES) <= set(backbone.output_shape()):
            raise ValueError(
                f"MODEL.DEPTH.IN_FEATURES is {list(depth.IN_FEATURES)}, but MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} "
                f"gives {', '.join(backbone.output_shape())}"
            )
        return {
            "backbone": backbone,
            "in_features": tuple(depth.IN_FEATURES),
            "conv_dim": depth.CONVS_DIM,
            "norm": depth.NORM,
            "min_depth": depth.MIN,
            "max_depth": depth.MAX,
            "variance_focus": depth.SILOG_LAMBDA,
            "loss_weight": depth.LOSS_WEIGHT,
            "pixel_mean": tuple(cfg.MODEL.PIXEL_MEAN),
            "pixel_std": tuple(cfg.MODEL.PIXEL_STD),
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Estimate depths.

        Args:
            batched_inputs: dicts with "image", (3, H, W) in 0-255; in training "depth", (H, W) float32, metres, 0: no
                measurement; in tests optionally "height" and "width" of the result.

        Returns:
            In training {"loss_depth": scalar}; otherwise a dict an image, "depth": (height, width) float32, metres.
        """
        padding = {"size_divisibility": self.size_divisibility}
        padding |= {"padding_constraints": self.backbone.padding_constraints}
        pixels = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        images = ImageList.from_tensors(pixels, **padding)
        log_depth = self.estimate_log_depth(images.tensor)
        if self.training:
            targets = [x["depth"].to(self.device) for x in batched_inputs]
            target = ImageList.from_tensors(targets, pad_value=0.0, **padding).tensor
            valid = (target >= self.min_depth) & (target <= self.max_depth)
            loss = silog_loss(log_depth.squeeze(1), target, valid, self.variance_focus)
            return {"loss_depth": self.loss_weight * loss}
        results = []
        for x, depth, size in zip(batched_inputs, log_depth.exp(), images.image_sizes, strict=True):
            height, width = x.get("height", size[0]), x.get("width", size[1])
            results.append({"depth": sem_seg_postprocess(depth, size, height, width)[0]})
        return results

    def estimate_log_depth(self, images: Tensor) -> Tensor:
        """Logarithms of depths in metres.

        Args:
            images: (N, 3, H, W), normalised; H and W are multiples of all strides.

        Returns:
            (N, 1, H, W) float32, below log(MODEL.DEPTH.MAX).
        """
        logits = self.head.layers(self.backbone(images)).float()
        logits = F.interpolate(logits, scale_factor=self.stride, mode="bilinear", align_corners=False)
        return math.log(self.max_depth) + F.logsigmoid(logits)


def check_depth_range(cfg: CfgNode) -> None:
    """Check MODEL.DEPTH.MIN and MAX, and that MAX is that of the data sets, where they say how far they are scored.

    Raises:
        ValueError: naming the key, and the data set.
    """
    low, high = cfg.MODEL.DEPTH.MIN, cfg.MODEL.DEPTH.MAX
    if not 0 < low < high:
        raise ValueError(f"MODEL.DEPTH.MIN is {low} and MAX {high}; needed: 0 < MIN < MAX, metres")
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        expected = MetadataCatalog.get(name).get("max_depth", high)
        if expected != high:
            raise ValueError(f'MODEL.DEPTH.MAX is {high:g}, but depths of "{name}" are scored up to {expected:g} m')
