"""Regions without labels: from an image or its features to a region map. Pure functions; ids are integers from 0 on.

    n points, C features each, K clusters; N images, h, w cells of a feature map
    H, W  height and width of an image, pixels

An image is (H, W, 3) uint8 RGB. A region map is (H, W) int32 with the id of each pixel, NO_REGION where there is none. A
bit set is (H, W) int32 with bit r set where region r covers the pixel, for regions that overlap: at most MAX_OVERLAPPING
of them, best first. Boxes are (R, 4) XYXY_ABS, continuous coordinates.

Source: DetCon, section 3.2 (grid, Felzenszwalb-Huttenlocher, ranked proposals); CYBORGS, section 3.3 (k-means), figure 5a
(selective search). Deviations:

* Selective search has no scores, and OpenCV orders its boxes by C's rand(). Here the best are those on which most of its
  groupings agree, and none that is nearly the same as a better one; see `selective_search_boxes`.
* CYBORGS' released code does not renormalise centroids. Here they are, as in its paper: spherical k-means.

Nothing here draws from, or changes, the random numbers of Python, NumPy or PyTorch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .structures import MAX_OVERLAPPING, NO_REGION

try:
    from .fast_felzenszwalb import felzenszwalb
except ImportError:  # no numba (extra "fast-masks"): the same regions, several times slower
    from skimage.segmentation import felzenszwalb

_FELZENSZWALB_SIGMA = 0.8  # pixels; the authors' and scikit-image's own
_AGREEING_IOU = 0.7  # two boxes of selective search show the same thing
_REPEATED_IOU = 0.5  # a box is nearly the same as a better one
_POINTS_PER_CENTROID = 256  # k-means learns from a sample of at most this many points for each of its centroids
_GPU_SCRATCH_BYTES = 64 << 20  # FAISS would reserve 1.5 GB
_ROWS_AT_ONCE = 16384  # when points are assigned to centroids


# ------------------------------------------------------------------------------------------ from the image


def grid_regions(height: int, width: int, size: int) -> np.ndarray:
    """Divide an image into `size` x `size` rectangles, as equal as whole pixels allow.

    Args:
        height, width: of the image, pixels.
        size: n of the n x n grid. Sides shorter than n pixels have fewer rectangles.

    Returns:
        (height, width) int32 ids, row by row, without gaps.
    """
    assert height > 0 and width > 0
    if size < 1:
        raise ValueError(
            f"The grid of regions has {size} x {size} cells (INPUT.REGIONS.GRID_SIZE); it needs at least 1"
        )
    num_rows, num_cols = min(size, height), min(size, width)
    rows = np.arange(height, dtype=np.int32) * num_rows // height
    cols = np.arange(width, dtype=np.int32) * num_cols // width
    return rows[:, None] * num_cols + cols


def felzenszwalb_regions(image: np.ndarray, scale: float, min_size: int) -> np.ndarray:
    """Segment an image by Felzenszwalb and Huttenlocher's graph-based algorithm, with a blur of 0.8 pixels.

    Args:
        image: (H, W, 3) uint8 RGB. scikit-image maps it to [0, 1] and divides `scale` by 255, so `scale` is the k of the
            algorithm's paper, for grey levels of 0-255, as in DetCon.
        scale: the larger, the fewer and larger the segments.
        min_size: segments of fewer pixels are merged into a neighbour.

    Returns:
        (H, W) int32 ids without gaps.
    """
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    if scale <= 0 or min_size < 0:
        raise ValueError(
            f"Felzenszwalb's segmentation got scale {scale} and min_size {min_size} (INPUT.REGIONS.FELZENSZWALB); "
            "scale must be positive, min_size not negative"
        )
    return felzenszwalb(image, scale=scale, sigma=_FELZENSZWALB_SIGMA, min_size=min_size).astype(np.int32)


def selective_search_boxes(image: np.ndarray, max_boxes: int) -> np.ndarray:
    """Propose boxes by selective search (OpenCV's "fast" mode: 12 hierarchical groupings), best first.

    The score of a box is the number of boxes that show the same thing (IoU of at least 0.7, itself included): what is
    found in several colour spaces, at several scales and by several similarities stands out. Equal scores are ordered by
    area, the larger first, then by position. A box that overlaps a better one by an IoU of more than 0.5 is left out.

    Returns:
        (R, 4) float32 XYXY_ABS, R <= max_boxes.

    Raises:
        ImportError: if OpenCV is one without `ximgproc`.
    """
    assert image.dtype == np.uint8 and image.ndim == 3 and max_boxes >= 0
    boxes = _selective_search(image)
    overlaps = _box_iou(boxes)
    scores = (overlaps >= _AGREEING_IOU).sum(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    order = np.lexsort((*boxes.T, -areas, -scores))
    kept: list[int] = []
    for i in order:
        if len(kept) == max_boxes:
            break
        if not (overlaps[i, kept] > _REPEATED_IOU).any():
            kept.append(int(i))
    return boxes[kept]


def _selective_search(image: np.ndarray) -> np.ndarray:
    """All boxes of OpenCV's selective search: (R, 4) float32 XYXY_ABS, each once, in no particular order."""
    if not hasattr(cv2, "ximgproc"):
        raise ImportError(
            f"Selective search needs cv2.ximgproc, which this OpenCV {cv2.__version__} lacks. In place of the installed "
            "opencv-python package: pip install opencv-contrib-python-headless"
        )
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    search.switchToSelectiveSearchFast()
    boxes = np.asarray(search.process(), dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _box_iou(boxes: np.ndarray) -> np.ndarray:
    """IoU of every box with every other: (R, 4) -> (R, R) float32."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    intersections = np.ones((len(boxes), len(boxes)), dtype=np.float32)
    for low, high in ((0, 2), (1, 3)):
        sides = np.minimum.outer(boxes[:, high], boxes[:, high]) - np.maximum.outer(boxes[:, low], boxes[:, low])
        intersections *= sides.clip(min=0)
    return intersections / (areas[:, None] + areas - intersections)


# ------------------------------------------------------------------------------------------ between forms


def masks_to_bits(masks: Iterable[np.ndarray]) -> np.ndarray:
    """Put masks that may overlap into one bit set.

    Args:
        masks: at least one (H, W) bool mask, best first; those beyond MAX_OVERLAPPING are left out.

    Returns:
        (H, W) int32 bit set: bit r for the r-th mask.
    """
    first, *others = itertools.islice(masks, MAX_OVERLAPPING)
    bits = first.astype(np.int32)
    for r, mask in enumerate(others, start=1):
        bits |= mask.astype(np.int32) << r
    return bits


def boxes_to_bits(boxes: np.ndarray | Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """Put boxes into one bit set; a box covers the pixels whose centres lie in it.

    Args:
        boxes: (R, 4) XYXY_ABS, best first; those beyond MAX_OVERLAPPING are left out.
        height, width: of the image, pixels.

    Returns:
        (height, width) int32 bit set: bit r for the r-th box.
    """
    bits = np.zeros((height, width), dtype=np.int32)
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)[:MAX_OVERLAPPING]
    pixels = np.ceil(corners - 0.5).clip(0, [width, height, width, height]).astype(np.int64)
    for r, (x0, y0, x1, y1) in enumerate(pixels):
        bits[y0:y1, x0:x1] |= 1 << r
    return bits


def resize_regions(region_map: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bring a map of the whole image to another resolution: each pixel takes the cell in which its centre lies.

    Args:
        region_map: (h, w) of any dtype.
        height, width: of the result, pixels.

    Returns:
        (height, width) of the same dtype; the input itself where it has that size.
    """
    if region_map.shape == (height, width):
        return region_map
    h, w = region_map.shape
    rows = (2 * np.arange(height) + 1) * h // (2 * height)
    cols = (2 * np.arange(width) + 1) * w // (2 * width)
    return region_map[rows[:, None], cols]


def largest_regions(region_map: np.ndarray, max_regions: int) -> tuple[np.ndarray, int]:
    """Number the regions by descending area, the lower id first where areas are equal, and drop the smallest.

    Args:
        region_map: (H, W) integer ids, negative where there is no region.
        max_regions: how many regions stay.

    Returns:
        region_map: (H, W) int32 ids from 0 on; NO_REGION where there was none, and in place of what is dropped.
        num_dropped: how many regions were dropped.
    """
    ids, inverse, areas = np.unique(region_map, return_inverse=True, return_counts=True)
    regions = np.flatnonzero(ids >= 0)
    kept = regions[np.argsort(-areas[regions], kind="stable")][:max_regions]
    new_ids = np.full(len(ids), NO_REGION, dtype=np.int32)
    new_ids[kept] = np.arange(len(kept))
    return new_ids[inverse].reshape(region_map.shape), len(regions) - len(kept)


# ------------------------------------------------------------------------------------------ from features


def kmeans_regions(features: Tensor, num_clusters: int, iterations: int, seed: int) -> Tensor:
    """Cluster the cells of several images together, by the directions of their features.

    Args:
        features: (N, C, h, w) float, on any device.
        num_clusters, iterations, seed: see `spherical_kmeans`.

    Returns:
        (N, h, w) int64 ids in [0, num_clusters); an id means the same in all of the images.
    """
    n, c, h, w = features.shape
    points = features.permute(0, 2, 3, 1).reshape(-1, c)
    return spherical_kmeans(points, num_clusters, iterations, seed)[1].reshape(n, h, w)


def spherical_kmeans(features: Tensor, num_clusters: int, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cluster directions by FAISS' k-means: on the GPU where the features and faiss-gpu are, else on the CPU.

    On the CPU no more threads than PyTorch's are used. With more than 256 points a cluster, the centroids are learnt from
    a random sample of so many; all points are assigned. The same seed gives the same result.

    Args:
        features: (n, C) float, n > 0, of any length. A zero vector has no direction and is put into cluster 0.
        num_clusters: K; where there are fewer vectors with a direction, their number.
        iterations: at least 1.
        seed: of FAISS' own random numbers.

    Returns:
        centroids: (K, C) float32 of unit length, on the device of `features`.
        labels: (n,) int64, the centroid with the largest cosine.

    Raises:
        ImportError: without FAISS.
        FloatingPointError: if `features` holds NaN or infinity.
    """
    assert features.ndim == 2 and len(features) > 0 and num_clusters > 0 and iterations > 0
    features = features.detach().float()
    if not torch.isfinite(features).all():
        raise FloatingPointError(
            f"The features to be clustered, of shape {tuple(features.shape)}, hold NaN or infinity"
        )
    points = F.normalize(features, dim=1)
    directions = points[points.any(dim=1)]
    if len(directions) == 0:
        directions = torch.ones_like(points[:1]) / points.shape[1] ** 0.5
    centroids = _train_centroids(directions, min(num_clusters, len(directions)), iterations, seed)
    labels = torch.cat([(rows @ centroids.T).argmax(dim=1) for rows in points.split(_ROWS_AT_ONCE)])
    return centroids, labels


def _train_centroids(points: Tensor, num_clusters: int, iterations: int, seed: int) -> Tensor:
    """(n, C) float32 of unit length -> (K, C) likewise, K = num_clusters <= n."""
    faiss = _import_faiss()
    parameters = faiss.ClusteringParameters()
    parameters.niter, parameters.seed, parameters.spherical = iterations, seed, True
    parameters.min_points_per_centroid = 1  # no warning that there are few
    parameters.max_points_per_centroid = _POINTS_PER_CENTROID
    clustering = faiss.Clustering(points.shape[1], num_clusters, parameters)
    if points.is_cuda and faiss.get_num_gpus() > 0:
        config = faiss.GpuIndexFlatConfig()
        config.device = points.device.index
        index = faiss.GpuIndexFlatIP(_gpu_resources(), points.shape[1], config)
    else:
        index = faiss.IndexFlatIP(points.shape[1])
    num_threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(min(num_threads, torch.get_num_threads()))
    try:
        clustering.train(points.cpu().numpy(), index)
    finally:
        faiss.omp_set_num_threads(num_threads)
    centroids = faiss.vector_to_array(clustering.centroids).reshape(num_clusters, -1)
    return F.normalize(torch.from_numpy(centroids).to(points.device), dim=1)


@functools.cache
def _gpu_resources() -> Any:
    """FAISS' streams and scratch memory on the GPUs of this process, which take long to set up."""
    resources = _import_faiss().StandardGpuResources()
    resources.setTempMemory(_GPU_SCRATCH_BYTES)
    resources.setPinnedMemory(0)  # 256 MB, to copy and compute at a time
    return resources


def _import_faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            'K-means needs FAISS: pip install "d2_objssl[faiss]", or with a GPU pip install "d2_objssl[gpu]"'
        ) from error
    return faiss
