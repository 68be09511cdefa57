"""Images in, label maps of clustered features out: the computation behind a bootstrapping of region masks.

    H, W  size of an image, pixels      h, w  size of its feature map, cells      C  channels      K  clusters

Source: CYBORGS (Wang et al., ECCV 2022), section 3.3: the feature map of one block, its cells scaled to unit length and
clustered by spherical k-means over several images together, with K drawn for each such batch. Choices of ours, where the
paper does not say:

* Images are seen whole, at their own size and one at a time, without augmentation; those with a side above `MAX_SIDE` are
  reduced to it.
* Batch-norm layers use their running statistics.
* Label maps stay at the resolution of the features: the mapper resizes what it needs, to the nearest cell.
"""

from __future__ import annotations

import copy
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from detectron2.layers import Conv2d
from detectron2.modeling import Backbone
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..data.image_reading import read_rgb_image
from ..modeling.backbone import features_at
from ..proposals import spherical_kmeans

MAX_SIDE = 1024  # pixels; 16 such images have 262,144 cells of stride 8, which are 0.5 GB with 512 channels
_NUM_READERS = 4  # threads that decode images
_BATCHES_AHEAD = 2  # that are decoded while another one is clustered


@dataclass(frozen=True)
class ClusterSettings:
    """How label maps are made of features.

    Attributes:
        feature: name of the feature map, see `modeling.backbone.features_at`.
        min_clusters, max_clusters: K is drawn uniformly from these and what is between.
        kmeans_iters: iterations of k-means.
    """

    feature: str
    min_clusters: int
    max_clusters: int
    kmeans_iters: int


class FeatureClusterer:
    """Makes label maps of images from the features of a frozen copy of a network."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        normalize: Callable[[Tensor], Tensor],
        settings: ClusterSettings,
        device_type: str,
        dtype: torch.dtype | None,
    ) -> None:
        """
        Args:
            backbone: is copied, and stays as it is. To be called in all processes: the copies have the batch-norm
                statistics of the main process, which the checkpoints hold.
            normalize: what the network expects of (1, 3, H, W) uint8 RGB pixels, on its device.
            settings: see there.
            device_type: "cuda" or "cpu".
            dtype: of autocast; None: no autocast.
        """
        self._network = _copy_for_inference(backbone)
        self._normalize = normalize
        self._settings = settings
        self._device_type = device_type
        self._dtype = dtype

    def describe(self) -> dict[str, Any]:
        """All that label maps depend on beside images and seed, as JSON knows it; the network by a hash."""
        digest = hashlib.sha256()
        for name, value in self._network.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return asdict(self._settings) | {
            "max_side": MAX_SIDE,
            "precision": str(self._dtype or torch.float32),
            "network": digest.hexdigest(),
        }

    @torch.no_grad()
    def cluster(self, images: list[np.ndarray], seed: tuple[int, ...]) -> list[np.ndarray]:
        """Cluster images together.

        Args:
            images: (H, W, 3) uint8 RGB, of any sizes.
            seed: decides, with images and network, the result; global random generators are neither read nor changed.

        Returns:
            (h, w) int32 label maps; a label means the same in all of them.
        """
        if not images:
            return []
        features = [self._features(image) for image in images]
        rng = np.random.default_rng(seed)
        s = self._settings
        num_clusters = int(rng.integers(s.min_clusters, s.max_clusters, endpoint=True))
        cells = torch.cat([f.flatten(1).T for f in features])
        _, labels = spherical_kmeans(cells, num_clusters, s.kmeans_iters, int(rng.integers(2**31)))
        parts = labels.to("cpu", torch.int32).split([f[0].numel() for f in features])
        return [part.reshape(f.shape[1:]).numpy() for part, f in zip(parts, features, strict=True)]

    def _features(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 RGB -> (C, h, w) float32."""
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        # Hardly two images have the same size: to search for the fastest convolution takes longer than to use any.
        with (
            torch.backends.cudnn.flags(benchmark=False, deterministic=torch.backends.cudnn.deterministic),
            torch.autocast(self._device_type, dtype=self._dtype, enabled=self._dtype is not None),
        ):
            return features_at(self._network, self._normalize(pixels), self._settings.feature)[0].float()


def _copy_for_inference(backbone: Backbone) -> nn.Module:
    """A copy in eval mode, with the buffers of the main process."""
    network = copy.deepcopy(backbone).eval().requires_grad_(False)
    buffers = {name: b.cpu() for name, b in network.named_buffers()} if comm.is_main_process() else None
    main_buffers = comm.all_gather(buffers)[0]
    for name, buffer in network.named_buffers():
        buffer.copy_(main_buffers[name])
    _fold_batch_norm(network)
    return network


def _fold_batch_norm(network: nn.Module) -> None:
    """Let each convolution do what the batch norm behind it does, in place: fewer passes over memory."""
    for conv in network.modules():
        if isinstance(conv, Conv2d) and isinstance(conv.norm, _BatchNorm):
            norm = conv.norm
            assert norm.running_mean is not None and norm.running_var is not None
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            conv.requires_grad_(False)
            conv.norm = None


class BoundedImage(NamedTuple):
    """An image that was read, or the reason why not.

    Attributes:
        pixels: (H', W', 3) uint8 RGB with sides of at most MAX_SIDE; None: unreadable.
        size: (H, W) of the file.
        reason: why it is unreadable.
    """

    pixels: np.ndarray | None
    size: tuple[int, int] = (0, 0)
    reason: str = ""


def read_bounded(file_name: str) -> BoundedImage:
    """Read an image; what is larger than MAX_SIDE is reduced to it."""
    try:
        image = read_rgb_image(file_name)
    except OSError as error:
        return BoundedImage(None, reason=str(error))
    return BoundedImage(reduce_image(image, MAX_SIDE), image.shape[:2])


def reduce_image(image: np.ndarray, max_side: int) -> np.ndarray:
    """Make an (H, W, 3) uint8 image smaller where a side is longer than `max_side` pixels."""
    height, width = image.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return image
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def read_ahead(batches: Iterable[list[str]]) -> Iterator[list[BoundedImage]]:
    """Read batches of files one after the other; threads decode the next ones while the caller works on one."""
    waiting: deque[list[Future[BoundedImage]]] = deque()
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for files in batches:
            waiting.append([pool.submit(read_bounded, f) for f in files])
            if len(waiting) > _BATCHES_AHEAD:
                yield [image.result() for image in waiting.popleft()]
        for images in waiting:
            yield [image.result() for image in images]
