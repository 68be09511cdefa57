"""Attention maps of a backbone by Score-CAM: the parts of an image by which its embedding is recognised.

    C, h, w   channels, height and width of the feature map that is explained; A_k its channel k
    H, W      height and width of the image X
    e(X)      embedding of an image: the average of its feature map over the cells, (C,)

Source: SemCL (Quan et al., ICCV Workshops 2023), section 4.4 and Fig. 7; Score-CAM (Wang et al., CVPR Workshops 2020):

    s_k = f(X * H_k)     H_k: A_k scaled to [0, 1] and upsampled to (H, W); pixels where it is 0 show the mean colour
    map = ReLU(sum_k softmax(s)_k A_k), scaled to [0, 1] and upsampled to (H, W)

torchcam's ScoreCAM computes this for any scalar score f. What is ours:

* f. Score-CAM explains the score of a class, and a backbone has none; SemCL does not say which score it took. Here it
  is how well the masked image is still recognised as this image, f(X') = cos(e(X'), e(X)) / temp: the logit that
  contrastive pretraining gives to an image and a view of it, with SemCL's temperature. It needs no head, so backbones
  of all methods are treated alike, and its range does not depend on the scale of the features.
* torchcam instead of the paper's grad-cam. grad-cam requires opencv-python-headless, which overwrites this package's
  OpenCV with one without selective search, and it holds all C masked images in memory at once.
"""

from __future__ import annotations

import sys
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm


class PooledFeature(nn.Module):
    """The embedding e of images, (N, 3, H, W) -> (N, C), with a submodule `feature_map` whose output is (N, C, h, w)."""

    def __init__(self, backbone: nn.Module, feature: str) -> None:
        """
        Args:
            backbone: returns a dict of feature maps, as Detectron2's do.
            feature: which of them.
        """
        super().__init__()
        self.backbone = backbone
        self.feature = feature
        self.feature_map = nn.Identity()  # a place to hook that every backbone has

    def forward(self, images: Tensor) -> Tensor:
        return self.feature_map(self.backbone(images)[self.feature]).mean(dim=(2, 3))


def attention_map(
    backbone: nn.Module,
    image: Tensor,
    *,
    feature: str,
    temp: float = 0.2,
    batch_size: int = 32,
    progress: bool = False,
) -> Tensor:
    """Score-CAM of an image for its own embedding; see the module.

    The backbone runs C + 2 times on the image.

    Args:
        backbone: returns a dict of feature maps, as Detectron2's do; in evaluation mode.
        image: (3, H, W) float32, normalised as the backbone expects it, on the backbone's device.
        feature: name of the feature map that is explained; usually the last one.
        temp: temperature of the score, SemCL's tau. The smaller it is, the fewer channels make the map.
        batch_size: masked images that are in memory at once.
        progress: show a progress bar.

    Returns:
        (H, W) float32 in [0, 1]; all zeros where no channel tells one place from another.

    Raises:
        ImportError: without torchcam.
    """
    assert not backbone.training
    methods = _import_torchcam()
    # Hooks go to this module and its `feature_map`: the backbone stays as it is.
    network = PooledFeature(backbone, feature).eval()
    with torch.no_grad(), methods.ScoreCAM(network, "feature_map", batch_size=batch_size) as score_cam:
        embedding = network(image[None])
        reference = F.normalize(embedding[0], dim=0)

        def score(masked_embedding: Tensor) -> Tensor:
            return F.normalize(masked_embedding, dim=0) @ reference / temp

        def count(module: nn.Module, inputs: tuple[Tensor, ...], embeddings: Tensor) -> None:
            bar.update(len(embeddings))

        with tqdm(total=embedding.shape[1] + 1, unit="mask", leave=False, disable=not progress) as bar:
            network.register_forward_hook(count)
            (heat,) = score_cam(targets=score, scores=embedding)
    return F.interpolate(heat[None], size=image.shape[1:], mode="bilinear", align_corners=False)[0, 0]


def overlay_attention(image: np.ndarray, heat: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Colour an image from blue, where the attention is 0, over green to red, where it is 1.

    Args:
        image: (H, W, 3) uint8 RGB.
        heat: (h, w) float in [0, 1], a map of the same area at any resolution.
        alpha: opacity of the colours, in [0, 1].

    Returns:
        (H, W, 3) uint8 RGB.
    """
    height, width = image.shape[:2]
    resized = cv2.resize(heat.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    levels = np.rint(resized * 255).astype(np.uint8)
    colors = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_JET), cv2.COLOR_BGR2RGB)
    return np.rint(image * (1 - alpha) + colors * alpha).astype(np.uint8)


def _import_torchcam() -> Any:
    try:
        import torchcam.methods
    except ImportError as error:
        hint = " It needs Python 3.11 or newer." if sys.version_info < (3, 11) else ""
        raise ImportError(f'Score-CAM needs torchcam: pip install "d2_objssl[attention]".{hint}') from error
    return torchcam.methods
