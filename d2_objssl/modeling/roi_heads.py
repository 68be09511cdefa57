"""ROI heads beyond Detectron2's."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """Detectron2's `Res5ROIHeads` (C4 models) with one more norm behind res5: MoCo (He et al., CVPR 2020, section 4.2).

    `res5.0` to `res5.2` are blocks of the pretrained ResNet, `res5.norm` starts anew.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Read what `Res5ROIHeads` reads; the norm is MODEL.RESNETS.NORM.

        Raises:
            ValueError: if the ResNet below is one whose res5 Detectron2's heads cannot continue.
        """
        resnets = cfg.MODEL.RESNETS
        # Res5ROIHeads knows neither key, nor basic blocks.
        if resnets.DEPTH < 50 or resnets.PADDING != "symmetric" or resnets.WIDTH_MULTIPLIER != 1:
            raise ValueError(
                f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}, PADDING {resnets.PADDING!r}, WIDTH_MULTIPLIER "
                f'{resnets.WIDTH_MULTIPLIER}: MODEL.ROI_HEADS.NAME "{cls.__name__}" makes res5 for a depth of at least 50, '
                "'symmetric' and 1 alone"
            )
        args = super().from_config(cfg, input_shape)
        args["res5"].add_module("norm", get_norm(resnets.NORM, 8 * resnets.RES2_OUT_CHANNELS))
        return args
