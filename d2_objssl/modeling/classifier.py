"""Image classification on a backbone: the linear and the semi-supervised probe of pretrained features.

N images, C classes, D channels of the feature map.  backbone -> mean over the cells (N, D) -> linear layer (N, C)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from torch import Tensor, nn

from ..data.classification_datasets import common_class_names


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """A linear classifier on the average-pooled feature map of a backbone.

    MODEL.BACKBONE.FREEZE_AT 5 makes it the linear probe: weights and batch-norm statistics of the backbone all stay.
    Otherwise the backbone is trained along; SOLVER.HEAD_LR_FACTOR sets the two learning rates apart.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_feature: str,
        num_classes: int,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
    ) -> None:
        """
        Args:
            backbone: returns a dict of feature maps.
            in_feature: the one to classify by.
            num_classes: C.
            pixel_mean, pixel_std: of each channel, in 0-255.
        """
        super().__init__()
        self.backbone = backbone
        self.in_feature = in_feature
        self.linear = nn.Linear(backbone.output_shape()[in_feature].channels, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)  # MoCo's
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read MODEL.CLASSIFIER, and the classes of DATASETS.

        Raises:
            ValueError: if the data sets have different classes, or not as many as MODEL.CLASSIFIER.NUM_CLASSES, or if
                the backbone has no such feature.
        """
        names = common_class_names([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        num_classes = cfg.MODEL.CLASSIFIER.NUM_CLASSES
        if num_classes not in (0, len(names)):
            first = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST][0]
            raise ValueError(
                f'MODEL.CLASSIFIER.NUM_CLASSES is {num_classes}, but "{first}" has {len(names)} classes. 0 takes their number'
            )
        backbone = build_backbone(cfg)
        in_feature = cfg.MODEL.CLASSIFIER.IN_FEATURE
        if in_feature not in backbone.output_shape():
            raise ValueError(
                f'MODEL.CLASSIFIER.IN_FEATURE is "{in_feature}", but the backbone gives '
                f"{', '.join(backbone.output_shape())} (MODEL.RESNETS.OUT_FEATURES)"
            )
        return {
            "backbone": backbone,
            "in_feature": in_feature,
            "num_classes": len(names),
            "pixel_mean": tuple(cfg.MODEL.PIXEL_MEAN),
            "pixel_std": tuple(cfg.MODEL.PIXEL_STD),
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Classify images.

        Args:
            batched_inputs: dicts with "image", (3, H, W) of one size for all, in 0-255, and in training "label", int.

        Returns:
            In training {"loss_cls": scalar}, the mean cross-entropy; otherwise a dict an image, "scores": (C,) logits.
        """
        images = torch.stack([x["image"] for x in batched_inputs]).to(self.device)
        features = self.backbone((images - self.pixel_mean) / self.pixel_std)[self.in_feature]
        logits = self.linear(features.mean(dim=(2, 3)))
        if not self.training:
            return [{"scores": scores} for scores in logits]
        labels = torch.tensor([x["label"] for x in batched_inputs], device=self.device)
        return {"loss_cls": F.cross_entropy(logits, labels)}
