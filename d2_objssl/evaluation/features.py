"""Features of whole images from a frozen backbone.

n  images    D  channels of the feature map    S  side of the square that the network sees, pixels
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..checkpoint import ObjSSLCheckpointer, checkpoint_metadata
from ..data.center_crops import CenterCrops
from ..engine import resolve_norms


class PooledBackbone(nn.Module):
    """Images in, the mean of a feature map over its cells out, scaled to length 1."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, backbone: nn.Module, feature: str, pixel_mean: Sequence[float], pixel_std: Sequence[float]
    ) -> None:
        """
        Args:
            backbone: returns a dict of feature maps.
            feature: which of them.
            pixel_mean, pixel_std: of each channel, in 0-255.
        """
        super().__init__()
        self.backbone = backbone
        self.feature = feature
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) uint8 RGB, on any device -> (n, D)."""
        normalized = (images.to(self.pixel_mean) - self.pixel_mean) / self.pixel_std
        return F.normalize(self.backbone(normalized)[self.feature].mean(dim=(2, 3)))


def load_pooled_backbone(cfg: CfgNode, *, feature: str = "res5", seed: int = 0) -> PooledBackbone:
    """Build the bottom-up network of `cfg`, without an FPN, and fill all of it from MODEL.WEIGHTS.

    Args:
        cfg: of any model with `build_backbone`. INPUT.FORMAT must be RGB.
        feature: the feature map to pool.
        seed: of the random initialisation, if MODEL.WEIGHTS is empty.

    Raises:
        ValueError: if the backbone has no such feature, or the file does not fill it.
    """
    if cfg.INPUT.FORMAT != "RGB":
        raise ValueError(f'INPUT.FORMAT is "{cfg.INPUT.FORMAT}"; features are taken from RGB images')
    torch.manual_seed(seed)
    backbone = build_backbone(resolve_norms(cfg))
    backbone = getattr(backbone, "bottom_up", backbone)
    if feature not in backbone.output_shape():
        raise ValueError(
            f"the feature {feature} is not among those of the backbone, {', '.join(backbone.output_shape())} "
            "(MODEL.RESNETS.OUT_FEATURES)"
        )
    ObjSSLCheckpointer(backbone, metadata=checkpoint_metadata(cfg)).load(cfg.MODEL.WEIGHTS, [])
    return PooledBackbone(backbone, feature, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD).to(cfg.MODEL.DEVICE).eval()


@torch.no_grad()
def extract_features(
    model: PooledBackbone,
    dataset_dicts: Sequence[dict[str, Any]],
    *,
    short_side: int = 256,
    crop_size: int = 224,
    batch_size: int = 32,
    num_workers: int = 0,
    description: str = "",
) -> np.ndarray:
    """Pooled features of images, resized by their shorter side, of the central square.

    Args:
        model: in evaluation mode.
        dataset_dicts: with "file_name".
        short_side: of the resized image, pixels.
        crop_size: S.
        batch_size: images that go through the network together.
        num_workers: processes that read images; 0: this one.
        description: of the progress bar.

    Returns:
        (n, D) float32, rows of length 1, in the order of `dataset_dicts`.

    Raises:
        ValueError: if a feature is infinite or NaN.
    """
    assert not model.training
    images = CenterCrops(dataset_dicts, short_side=short_side, crop_size=crop_size)
    rows = []
    with tqdm(total=len(images), desc=description, unit="image") as bar:
        for batch in DataLoader(images, batch_size, num_workers=num_workers):
            rows.append(model(batch["image"]).float().cpu())
            bar.update(len(rows[-1]))
    features = torch.cat(rows)
    finite = features.isfinite().all(dim=1)
    if not finite.all():
        first = dataset_dicts[int((~finite).nonzero()[0])]["file_name"]
        raise ValueError(f"{int((~finite).sum())} images have infinite or NaN features, the first is {first}")
    return features.numpy()
