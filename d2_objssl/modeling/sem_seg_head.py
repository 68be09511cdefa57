"""A fully convolutional head on one feature of a backbone (Long et al., CVPR 2015; MoCo and SlotCon's "FCN").

    K    classes
    h, w cells of the feature, s its stride in pixels: n pixels have ceil(n / s) cells
    H, W size of an image, pixels

NUM_CONVS 3x3 convolutions with norm and ReLU, then a 1x1 convolution: K scores a cell. With NUM_CONVS 0 the head is
linear, a probe of the features it stands on.

Sources: SlotCon's supplement A.2 after MoCo (256 channels, dilation 6, no dropout, no auxiliary head), and its released
configs. Scores are enlarged as there: the centre of cell i is pixel s i, where the convolutions of a ResNet have it
("align_corners" on crops of 513 and 769 pixels). Elsewhere, and in tests, their framework stretches the grid of cells to
the image; here cells stay where they are, whatever the size of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn


def enlarge_cells(x: Tensor, stride: int) -> Tensor:
    """Interpolate linearly between the centres of cells; beyond the last one its values are repeated.

    Args:
        x: (N, C, h, w); the centre of cell (i, j) is pixel (s i, s j).
        stride: s.

    Returns:
        (N, C, s h, s w).
    """
    h, w = x.shape[-2:]
    size = (stride * (h - 1) + 1, stride * (w - 1) + 1)
    inner = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    return F.pad(inner, (0, stride - 1, 0, stride - 1), mode="replicate")


@SEM_SEG_HEADS_REGISTRY.register()
class FCNHead(nn.Module):
    """Convolutions and a classifier of cells, with the interface of Detectron2's `SemSegFPNHead`."""

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        in_feature: str,
        num_classes: int,
        num_convs: int,
        conv_dim: int,
        dilation: int = 1,
        norm: str = "BN",
        ignore_value: int = 255,
        loss_weight: float = 1.0,
    ) -> None:
        """
        Args:
            input_shape: channels and stride of the feature.
            in_feature: its name.
            num_classes: K.
            num_convs: number of 3x3 convolutions.
            conv_dim: their channels.
            dilation: of them.
            norm: after each of them; "": none, and biases instead.
            ignore_value: label of pixels without a class.
            loss_weight: factor of the loss.
        """
        super().__init__()
        self.in_feature = in_feature
        self.stride = input_shape.stride
        self.ignore_value = ignore_value
        self.loss_weight = loss_weight
        self.convs = nn.Sequential()
        channels = input_shape.channels
        for _ in range(num_convs):
            conv = Conv2d(
                channels,
                conv_dim,
                kernel_size=3,
                padding=dilation,
                dilation=dilation,
                bias=not norm,
                norm=get_norm(norm, conv_dim),
                activation=F.relu,
            )
            weight_init.c2_msra_fill(conv)
            self.convs.append(conv)
            channels = conv_dim
        self.predictor = Conv2d(channels, num_classes, kernel_size=1)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Read MODEL.SEM_SEG_HEAD.

        Raises:
            ValueError: naming the key that is wrong.
        """
        head = cfg.MODEL.SEM_SEG_HEAD
        if len(head.IN_FEATURES) != 1 or head.IN_FEATURES[0] not in input_shape:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES is {list(head.IN_FEATURES)}; FCNHead takes one feature of the backbone, "
                f"which has {', '.join(input_shape)}"
            )
        name = head.IN_FEATURES[0]
        if head.COMMON_STRIDE != input_shape[name].stride:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE is {head.COMMON_STRIDE}, but {name} of MODEL.BACKBONE.NAME "
                f"{cfg.MODEL.BACKBONE.NAME} has stride {input_shape[name].stride}: see MODEL.RESNETS.RES4_DILATION "
                "(of build_objssl_resnet_backbone alone) and RES5_DILATION"
            )
        return {
            "input_shape": input_shape[name],
            "in_feature": name,
            "num_classes": head.NUM_CLASSES,
            "num_convs": head.NUM_CONVS,
            "conv_dim": head.CONVS_DIM,
            "dilation": head.DILATION,
            "norm": head.NORM,
            "ignore_value": head.IGNORE_VALUE,
            "loss_weight": head.LOSS_WEIGHT,
        }

    def forward(
        self, features: Mapping[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Score pixels, or in training compare the scores with labels.

        Args:
            features: of the backbone, (N, C, h, w) each.
            targets: (N, H, W) int64 in [0, K), or `ignore_value`; used in training.

        Returns:
            In training, (None, {"loss_sem_seg": scalar}). Otherwise (N, K, s h, s w) scores, of which the first H rows
            and W columns are those of the image, and {}.
        """
        scores = enlarge_cells(self.predictor(self.convs(features[self.in_feature])).float(), self.stride)
        if not self.training:
            return scores, {}
        assert targets is not None
        return None, {"loss_sem_seg": self.loss_weight * self._loss(scores, targets)}

    def _loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, the mean over labelled pixels; 0, where PyTorch's mean is NaN, if there is none."""
        height, width = targets.shape[-2:]
        total = F.cross_entropy(scores[..., :height, :width], targets, ignore_index=self.ignore_value, reduction="sum")
        return total / (targets != self.ignore_value).sum().clamp(min=1)
