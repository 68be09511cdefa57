"""Regions without labels: what they cover, their order, and that the same input gives the same regions."""

import random
import sys

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.segmentation import felzenszwalb

from d2_objssl import proposals
from d2_objssl.proposals import (
    boxes_to_bits,
    felzenszwalb_regions,
    grid_regions,
    kmeans_regions,
    largest_regions,
    masks_to_bits,
    resize_regions,
    selective_search_boxes,
    spherical_kmeans,
)
from d2_objssl.structures import MAX_OVERLAPPING, NO_REGION


def colored_shapes(height: int = 96, width: int = 128) -> np.ndarray:
    """A noisy scene of three objects: (H, W, 3) uint8 RGB."""
    image = np.full((height, width, 3), (90, 140, 90), dtype=np.uint8)
    cv2.rectangle(image, (12, 20), (51, 69), (220, 40, 30), -1)
    cv2.circle(image, (92, 48), 22, (30, 50, 210), -1)
    cv2.rectangle(image, (60, 76), (110, 90), (240, 220, 60), -1)
    noise = np.random.default_rng(0).normal(0, 4, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)


def box_iou(a: np.ndarray, b: np.ndarray) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(w, 0) * max(h, 0)
    return intersection / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection)


# ------------------------------------------------------------------------------------------ from the image


def test_grid_is_numbered_row_by_row():
    grid = grid_regions(4, 5, 2)
    # Pixel x of W belongs to column floor(x n / W): of 5 pixels, 0-2 are the first half.
    expected = [[0, 0, 0, 1, 1]] * 2 + [[2, 2, 2, 3, 3]] * 2
    assert grid.tolist() == expected and grid.dtype == np.int32


@pytest.mark.parametrize(
    ("height", "width", "size"), [(480, 640, 5), (7, 100, 10), (1, 1, 5), (33, 34, 16), (20, 3, 1)]
)
def test_grid_cells_are_equal_rectangles(height, width, size):
    grid = grid_regions(height, width, size)
    num_rows, num_cols = min(size, height), min(size, width)
    assert grid.shape == (height, width)
    assert np.unique(grid).tolist() == list(range(num_rows * num_cols))
    for i in range(num_rows * num_cols):
        y, x = np.nonzero(grid == i)
        assert (np.ptp(y) + 1) * (np.ptp(x) + 1) == len(y), "a filled rectangle"
        assert np.ptp(y) + 1 in (height // num_rows, -(-height // num_rows))
        assert np.ptp(x) + 1 in (width // num_cols, -(-width // num_cols))


def test_grid_without_cells_is_refused():
    with pytest.raises(ValueError, match=r"0 x 0.*INPUT\.REGIONS\.GRID_SIZE"):
        grid_regions(10, 10, 0)


def test_felzenszwalb_finds_the_objects():
    regions = felzenszwalb_regions(colored_shapes(), 500, 200)
    assert regions.dtype == np.int32 and regions.shape == (96, 128)
    assert np.unique(regions).tolist() == list(range(regions.max() + 1))
    objects = [regions[30:60, 20:45], regions[40:56, 84:100], regions[79:88, 64:106], regions[:10]]
    assert all(len(np.unique(o)) == 1 for o in objects)
    assert len({int(o[0, 0]) for o in objects}) == 4


def test_felzenszwalb_scale_is_that_of_grey_levels_to_255():
    """scikit-image divides the scale by 255 and takes floats as they are: those of 0-255 would give other segments."""
    image = colored_shapes()
    expected = felzenszwalb(image / 255.0, scale=300, sigma=0.8, min_size=20)
    assert np.array_equal(felzenszwalb_regions(image, 300, 20), expected)
    assert not np.array_equal(felzenszwalb(image.astype(float), scale=300, sigma=0.8, min_size=20), expected)


def test_felzenszwalb_min_size():
    image = np.random.default_rng(1).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    sizes = np.bincount(felzenszwalb_regions(image, 1, 50).ravel())
    assert sizes.min() >= 50 and len(sizes) > 3
    assert np.bincount(felzenszwalb_regions(image, 1, 0).ravel()).min() < 50
    assert (felzenszwalb_regions(image, 1, 60 * 70 + 1) == 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2)])
def test_felzenszwalb_of_a_tiny_image(shape):
    assert (felzenszwalb_regions(np.zeros((*shape, 3), np.uint8), 1000, 1000) == np.zeros(shape)).all()


@pytest.mark.parametrize(("scale", "min_size"), [(0, 10), (-1.0, 10), (100, -1)])
def test_felzenszwalb_settings_out_of_range_are_named(scale, min_size):
    with pytest.raises(ValueError, match=rf"{scale}.*{min_size}.*INPUT\.REGIONS\.FELZENSZWALB"):
        felzenszwalb_regions(np.zeros((8, 8, 3), np.uint8), scale, min_size)


@pytest.fixture(scope="module")
def proposed() -> np.ndarray:
    return selective_search_boxes(colored_shapes(), 16)


def test_selective_search_finds_the_objects(proposed):
    for box in ([12, 20, 52, 70], [70, 26, 115, 71], [60, 76, 111, 91]):
        assert max(box_iou(np.array(box), p) for p in proposed) > 0.8, box


def test_selective_search_boxes_lie_in_the_image(proposed):
    assert proposed.dtype == np.float32 and proposed.ndim == 2 and 3 <= len(proposed) <= 16
    assert (proposed[:, :2] >= 0).all() and (proposed[:, :2] < proposed[:, 2:]).all()
    assert (proposed[:, 2] <= 128).all() and (proposed[:, 3] <= 96).all()


def test_selective_search_is_repeatable_and_best_first(proposed):
    """OpenCV shuffles its boxes by a random number that cannot be seeded."""
    image = colored_shapes()
    orders = [proposals._selective_search(image) for _ in range(2)]
    assert not np.array_equal(*orders), "the comparison must mean something"
    assert np.array_equal(selective_search_boxes(image, 4), proposed[:4])
    assert selective_search_boxes(image, 0).shape == (0, 4)


def test_selective_search_order_equals_a_naive_one(monkeypatch):
    rng = np.random.default_rng(0)
    corners, sides = rng.integers(0, 12, (60, 2)), rng.integers(1, 9, (60, 2))
    boxes = np.unique(np.hstack([corners, corners + sides]), axis=0).astype(np.float32)
    monkeypatch.setattr(proposals, "_selective_search", lambda image: rng.permutation(boxes))
    score = {tuple(b): sum(box_iou(b, c) >= 0.7 for c in boxes) for b in boxes}
    area = {tuple(b): (b[2] - b[0]) * (b[3] - b[1]) for b in boxes}
    kept: list[np.ndarray] = []
    for b in sorted(boxes, key=lambda b: (-score[tuple(b)], -area[tuple(b)], *b[::-1])):
        if all(box_iou(b, k) <= 0.5 for k in kept):
            kept.append(b)
    assert max(score.values()) > 1 and 10 < len(kept) < len(boxes)
    for num in (1, 7, 100):
        assert selective_search_boxes(np.zeros((20, 20, 3), np.uint8), num).tolist() == np.array(kept[:num]).tolist()


def test_selective_search_without_opencv_contrib(monkeypatch):
    monkeypatch.delattr(cv2, "ximgproc")
    with pytest.raises(ImportError, match="opencv-contrib-python-headless"):
        selective_search_boxes(colored_shapes(), 16)


# ------------------------------------------------------------------------------------------ between forms


@pytest.mark.parametrize("num_masks", [1, 3, 16, 20])
def test_bits_of_masks(num_masks):
    masks = np.random.default_rng(0).random((num_masks, 6, 7)) < 0.4
    bits = masks_to_bits(mask for mask in masks)
    assert bits.dtype == np.int32 and bits.shape == (6, 7) and bits.min() >= 0 and bits.max() < 2**MAX_OVERLAPPING
    for y in range(6):
        for x in range(7):
            assert bits[y, x] == sum(2**r for r in range(min(num_masks, 16)) if masks[r, y, x])


def test_bits_of_boxes_are_those_of_pixel_centres():
    boxes = np.array([[0, 0, 7, 5], [1.4, 0.5, 3.5, 2.6], [-3, 2, 2, 99], [6.6, 0, 6.9, 5], [3, 3, 3, 3]])
    bits = boxes_to_bits(boxes, 5, 7)
    assert bits.dtype == np.int32
    for y in range(5):
        for x in range(7):
            inside = [x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1 for x0, y0, x1, y1 in boxes]
            assert bits[y, x] == sum(2**r for r, i in enumerate(inside) if i), (x, y)
    assert (boxes_to_bits([[0, 0, 7, 5]] * 20, 5, 7) == 2**16 - 1).all()
    assert (boxes_to_bits(np.zeros((0, 4), np.float32), 5, 7) == 0).all()


@pytest.mark.parametrize(
    ("size", "new"), [((3, 4), (12, 12)), ((7, 5), (3, 9)), ((1, 1), (4, 3)), ((28, 40), (224, 333))]
)
def test_resized_regions_are_those_at_the_pixel_centres(size, new):
    region_map = np.random.default_rng(0).integers(-1, 300, size).astype(np.int32)
    resized = resize_regions(region_map, *new)
    assert resized.dtype == np.int32 and resized.shape == new
    for y in range(new[0]):
        for x in range(new[1]):
            assert resized[y, x] == region_map[int((y + 0.5) / new[0] * size[0]), int((x + 0.5) / new[1] * size[1])]


@pytest.mark.parametrize("max_regions", [0, 1, 3, 5, 9])
def test_largest_regions(max_regions):
    # Areas: id 2 has 3 pixels, 7 has 4, 5 has 3, 0 has 1, 9 has 2.
    region_map = np.array([[7, 7, 2, 2, 5], [7, 7, 2, 5, 5], [-1, 0, 9, 9, -1]], dtype=np.int64)
    order = [7, 2, 5, 9, 0]
    renumbered, num_dropped = largest_regions(region_map, max_regions)
    expected = [[order.index(i) if i in order[:max_regions] else NO_REGION for i in row] for row in region_map.tolist()]
    assert renumbered.tolist() == expected and renumbered.dtype == np.int32
    assert num_dropped == max(5 - max_regions, 0)


def test_largest_regions_of_a_map_without_any():
    empty = np.full((2, 3), NO_REGION)
    renumbered, num_dropped = largest_regions(empty, 4)
    assert np.array_equal(renumbered, empty) and num_dropped == 0


# ------------------------------------------------------------------------------------------ from features


def random_points(n: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "num_clusters"), [(200, 5), (97, 20), (60, 1)])
def test_kmeans_is_a_fixed_point_of_spherical_kmeans(n, num_clusters):
    """Labels are the nearest directions; each centroid is the mean direction of its points."""
    x = random_points(n)
    centroids, labels = spherical_kmeans(x, num_clusters, 100, seed=3)
    assert centroids.shape == (num_clusters, 8) and centroids.dtype == torch.float32
    assert labels.shape == (n,) and labels.dtype == torch.int64
    unit = F.normalize(x, dim=1)
    for i in range(n):
        assert labels[i] == max(range(num_clusters), key=lambda k: float(unit[i] @ centroids[k]))
    for k in range(num_clusters):
        mean = unit[labels == k].sum(dim=0)
        assert torch.allclose(centroids[k], mean / mean.norm(), atol=1e-5)


def test_kmeans_learns_from_a_sample_of_many_points():
    """512 of 4,000 points: directions are found, not as exactly as from all."""
    directions = F.normalize(random_points(2, 16), dim=1)
    truth = torch.arange(4000) % 2
    x = directions[truth] * 5 + random_points(4000, 16, seed=1)
    centroids, labels = spherical_kmeans(x, 2, 20, seed=0)
    assert max((labels == truth).float().mean(), (labels != truth).float().mean()) > 0.999
    means = torch.stack([F.normalize(F.normalize(x[labels == k], dim=1).sum(dim=0), dim=0) for k in range(2)])
    assert 1e-7 < (1 - (means * centroids).sum(dim=1)).max() < 0.01


def test_kmeans_looks_at_directions_alone():
    x = random_points(120)
    lengths = torch.logspace(-6, 6, 120)[torch.randperm(120, generator=torch.Generator().manual_seed(0))]
    expected = spherical_kmeans(x, 6, 20, seed=0)[1]
    assert torch.equal(spherical_kmeans(x * lengths[:, None], 6, 20, seed=0)[1], expected)


@pytest.mark.parametrize("num_clusters", [5, 6, 300])
def test_kmeans_of_fewer_points_than_clusters(num_clusters):
    x = random_points(5)
    centroids, labels = spherical_kmeans(x, num_clusters, 20, seed=0)
    assert centroids.shape == (5, 8) and sorted(labels.tolist()) == list(range(5))


@pytest.mark.parametrize("num_zero", [1, 37, 40])
def test_zero_vectors_join_cluster_0(num_zero):
    x = random_points(40)
    x[:num_zero] = 0
    centroids, labels = spherical_kmeans(x, 6, 20, seed=0)
    assert len(centroids) == max(min(6, 40 - num_zero), 1)
    assert torch.allclose(centroids.norm(dim=1), torch.ones(len(centroids)))
    assert (labels[:num_zero] == 0).all()
    if num_zero < 40:
        kept = spherical_kmeans(x[num_zero:], 6, 20, seed=0)
        assert torch.equal(centroids, kept[0]) and torch.equal(labels[num_zero:], kept[1])


def test_kmeans_of_equal_points():
    centroids, labels = spherical_kmeans(torch.ones(30, 4), 5, 20, seed=0)
    assert torch.allclose(centroids.norm(dim=1), torch.ones(5)) and labels.max() < 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_kmeans_refuses_what_is_not_finite(bad):
    x = random_points(20)
    x[3, 2] = bad
    with pytest.raises(FloatingPointError, match=r"\(20, 8\).*NaN or infinity"):
        spherical_kmeans(x, 4, 20, seed=0)


def test_kmeans_depends_on_the_seed_alone():
    x = random_points(300, 4)
    first = spherical_kmeans(x, 12, 5, seed=1)
    torch.manual_seed(99)
    np.random.seed(99)
    again = spherical_kmeans(x, 12, 5, seed=1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], spherical_kmeans(x, 12, 5, seed=2)[0])


def test_kmeans_leaves_global_random_numbers_alone():
    def draw() -> list:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    for module in (random, np.random):
        module.seed(7)
    torch.manual_seed(7)
    expected = draw()
    for module in (random, np.random):
        module.seed(7)
    torch.manual_seed(7)
    spherical_kmeans(random_points(50), 4, 20, seed=0)
    assert draw() == expected


def test_kmeans_uses_no_more_threads_than_pytorch(monkeypatch):
    faiss = pytest.importorskip("faiss")
    used = []
    train = faiss.Clustering.train
    monkeypatch.setattr(
        faiss.Clustering, "train", lambda *args: (used.append(faiss.omp_get_max_threads()), train(*args))[1]
    )
    before, faiss_before = torch.get_num_threads(), faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(4)
        torch.set_num_threads(1)
        allowed = faiss.omp_get_max_threads()  # 4, or 1 where both use one OpenMP library
        spherical_kmeans(random_points(50), 4, 20, seed=0)
        assert used == [1] and faiss.omp_get_max_threads() == allowed
    finally:
        torch.set_num_threads(before)
        faiss.omp_set_num_threads(faiss_before)


def test_kmeans_is_silent(capfd):
    """FAISS warns when there are fewer than 39 points a centroid; in bootstrapping there often are."""
    spherical_kmeans(random_points(50), 20, 20, seed=0)
    assert capfd.readouterr() == ("", "")


def test_kmeans_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"d2_objssl\[faiss\]"):
        spherical_kmeans(random_points(50), 4, 20, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kmeans_regions_puts_the_labels_where_the_features_are(dtype):
    """Three directions, in both images: one clustering, so an id means the same in both."""
    ids = torch.randint(3, (2, 5, 7), generator=torch.Generator().manual_seed(0))
    directions = torch.eye(6)[:3]
    features = directions[ids].permute(0, 3, 1, 2).to(dtype).requires_grad_()
    regions = kmeans_regions(features, 3, 20, seed=0)
    assert regions.shape == (2, 5, 7) and regions.dtype == torch.int64
    names = {int(i): int(k) for i, k in zip(ids.ravel(), regions.ravel(), strict=True)}
    assert sorted(names.values()) == [0, 1, 2]
    assert all(names[int(i)] == int(k) for i, k in zip(ids.ravel(), regions.ravel(), strict=True))


@pytest.mark.gpu
def test_kmeans_on_the_gpu():
    directions = torch.eye(16)[:4]
    x = (directions[torch.arange(400) % 4] * 5 + random_points(400, 16) * 0.1).cuda()
    centroids, labels = spherical_kmeans(x, 4, 20, seed=0)
    assert centroids.is_cuda and labels.is_cuda
    expected = F.normalize(x, dim=1) @ centroids.T
    assert torch.equal(labels, expected.argmax(dim=1))
    assert torch.allclose(centroids.norm(dim=1), torch.ones(4).cuda())
