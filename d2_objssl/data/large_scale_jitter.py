"""Large-scale jitter: images of one size, resized at random and cropped or padded. INPUT.AUGMENTATION "large_scale_jitter".

Source: DetCon (Hénaff et al., ICCV 2021), appendix A.1: the longest side becomes u * 1024 pixels, u ~ U[0.8, 1.25], then the
image is cropped or padded to 1024 x 1024 and flipped; at test the longest side is 1024 pixels.

Deviations: padding is grey (128) in training, and zeros after normalisation at test, where it goes to the next multiple of
the FPN's stride rather than to the whole square: Detectron2 takes the size of its input for the size of the image.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.data import transforms as T

from .finetune_augmentation import AUGMENTATION_REGISTRY


@AUGMENTATION_REGISTRY.register()
def large_scale_jitter(cfg: CfgNode, is_train: bool) -> dict[str, Any]:
    """Arguments of `DatasetMapper` by INPUT.LSJ; boxes become those of the masks that the crop has left.

    Raises:
        ValueError: if the size is not positive or the range of scales is empty.
    """
    lsj = cfg.INPUT.LSJ
    if lsj.IMAGE_SIZE < 1 or not 0 < lsj.MIN_SCALE <= lsj.MAX_SCALE:
        raise ValueError(
            f"INPUT.LSJ.IMAGE_SIZE is {lsj.IMAGE_SIZE}, MIN_SCALE {lsj.MIN_SCALE} and MAX_SCALE {lsj.MAX_SCALE}; needed: "
            "a positive size, and 0 < MIN_SCALE <= MAX_SCALE"
        )
    size = lsj.IMAGE_SIZE
    if not is_train:
        return {"augmentations": [T.ResizeScale(1.0, 1.0, size, size)]}
    augmentations = [
        T.ResizeScale(lsj.MIN_SCALE, lsj.MAX_SCALE, size, size),
        T.FixedSizeCrop((size, size)),
        T.RandomFlip(),
    ]
    return {"augmentations": augmentations, "recompute_boxes": cfg.MODEL.MASK_ON}
