"""Where views lie in their image and in each other. N views; C channels; h, w cells."""

import numpy as np
import oracles
import pytest
import torch
from detectron2.data import transforms as T
from fvcore.transforms.transform import (
    CropTransform,
    HFlipTransform,
    NoOpTransform,
    ScaleTransform,
    Transform,
    TransformList,
    VFlipTransform,
)

from d2_objssl.geometry import align_features, image_to_view, overlap_rois
from d2_objssl.structures import ViewBatch

H, W = 480, 640  # of the original image


def make_view(boxes: torch.Tensor, hflip: torch.Tensor) -> ViewBatch:
    return ViewBatch(images=torch.zeros(len(boxes), 3, 2, 2), crop_boxes=boxes.float(), hflip=hflip)


def random_boxes(n: int, generator: torch.Generator, within: torch.Tensor | None = None) -> torch.Tensor:
    """(n, 4) integer boxes of at least one pixel, inside the image or inside `within` (n, 4)."""
    if within is None:
        within = torch.tensor([0, 0, W, H]).expand(n, 4)
    corners = []
    for low, high in ((within[:, 0], within[:, 2]), (within[:, 1], within[:, 3])):
        start = low + (torch.rand(n, generator=generator) * (high - low)).floor()
        end = start + 1 + (torch.rand(n, generator=generator) * (high - start)).floor()
        corners += [start, torch.minimum(end, high)]
    return torch.stack([corners[0], corners[2], corners[1], corners[3]], dim=1)


# ------------------------------------------------------------------------------------------------ overlap_rois


@pytest.mark.parametrize("own_flip", [False, True])
@pytest.mark.parametrize("other_flip", [False, True])
def test_contained_crop_is_identity(own_flip: bool, other_flip: bool) -> None:
    """A crop that lies in the other one is sampled cell by cell: ROIAlign must not see 7.0000005 cells."""
    generator = torch.Generator().manual_seed(0)
    n = 1000
    outer = random_boxes(n, generator)
    inner = random_boxes(n, generator, within=outer)
    inner[:50] = outer[:50]  # equal crops
    own = make_view(inner, torch.full((n,), own_flip))
    other = make_view(outer, torch.full((n,), other_flip))
    rois, valid = overlap_rois(own, other)
    assert valid.all()
    assert torch.equal(rois, torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(n, 4))
    x = torch.randn(n, 3, 7, 7, generator=generator)
    aligned = align_features(x, rois, own.hflip)
    assert torch.equal(aligned, x.flip(-1) if own_flip else x)


def test_contained_crop_with_fractional_corners_is_identity() -> None:
    """Crops of a resized image have corners between the pixels."""
    generator = torch.Generator().manual_seed(1)
    outer = random_boxes(500, generator)
    inner = random_boxes(500, generator, within=outer)
    own, other = (make_view(b / 3.7, torch.arange(500) % 2 == 0) for b in (inner, outer))
    rois, valid = overlap_rois(own, other)
    assert valid.all()
    assert torch.equal(rois, torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(500, 4))


def test_overlap_rois_equals_oracle() -> None:
    generator = torch.Generator().manual_seed(2)
    n = 300
    boxes = [random_boxes(n, generator) for _ in range(2)]
    flips = [torch.rand(n, generator=generator) < 0.5 for _ in range(2)]
    rois, valid = overlap_rois(make_view(boxes[0], flips[0]), make_view(boxes[1], flips[1]))
    assert rois.dtype == torch.float32 and rois.shape == (n, 4)
    assert valid.dtype == torch.bool and 0 < valid.sum() < n
    for i in range(n):
        roi, overlap = oracles.overlap_roi(boxes[0][i].tolist(), bool(flips[0][i]), boxes[1][i].tolist())
        assert bool(valid[i]) == overlap
        np.testing.assert_allclose(rois[i].numpy(), roi, rtol=1e-5, atol=1e-5)


def test_touching_crops_do_not_overlap() -> None:
    own = make_view(torch.tensor([[0, 0, 50, 50], [0, 0, 50, 50]]), torch.tensor([False, True]))
    other = make_view(torch.tensor([[50, 0, 90, 50], [0, 50, 50, 90]]), torch.tensor([False, False]))
    assert not overlap_rois(own, other)[1].any()


# ------------------------------------------------------------------------------------------------ align_features


def test_align_features_equals_oracle() -> None:
    generator = torch.Generator().manual_seed(3)
    boxes = [random_boxes(12, generator) for _ in range(2)]
    flips = torch.arange(12) % 2 == 0
    rois, valid = overlap_rois(make_view(boxes[0], flips), make_view(boxes[1], ~flips))
    assert 0 < valid.sum() < 12
    x = torch.randn(12, 2, 4, 5, generator=generator, dtype=torch.float64)
    expected = oracles.align_features(x, rois.tolist(), flips.tolist())
    torch.testing.assert_close(align_features(x, rois, flips), expected, rtol=1e-12, atol=1e-12)


def test_align_features_gradient() -> None:
    rois = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.25, 0.1, 0.7, 0.95], [0.5, 0.5, 0.4, 0.6]])
    flips = torch.tensor([True, False, False])
    x = torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: align_features(x, rois, flips), x)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        [0, 0, 50, 50],  # left of the view, in the same rows: its overlap is inverted in x only
        [900, 0, 950, 50],  # right
        [400, 500, 450, 550],  # below: inverted in y only
        [900, 500, 950, 550],  # inverted in both
        [450, 0, 500, 50],  # touching
    ],
)
def test_empty_overlap_gives_zeros_and_no_gradient(other: list[int], flip: bool) -> None:
    """Crops far apart made ROIAlign allocate a negative number of samples."""
    own = make_view(torch.tensor([[400, 0, 450, 50]]), torch.tensor([flip]))
    rois, valid = overlap_rois(own, make_view(torch.tensor([other]), torch.tensor([False])))
    assert not valid.any()
    x = torch.randn(1, 2, 7, 7, generator=torch.Generator().manual_seed(5)).requires_grad_()
    aligned = align_features(x, rois, own.hflip)
    assert torch.equal(aligned, torch.zeros(1, 2, 7, 7))
    (gradient,) = torch.autograd.grad(aligned.sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))


def test_inverted_boxes_give_zeros() -> None:
    rois = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0], [9.0, -4.0, -8.0, 3.0]])
    x = torch.randn(4, 2, 7, 7, generator=torch.Generator().manual_seed(6))
    assert not align_features(x, rois, torch.tensor([False, True, False, True])).any()


def test_aligned_features_show_the_same_place() -> None:
    """Features that hold the image coordinates they come from, taken through crop, resize and flip, and aligned."""
    size, cells = 56, 7
    # Pixel (i, j) of the image holds the continuous coordinates of its centre.
    ramp = np.stack(np.meshgrid(np.arange(W) + 0.5, np.arange(H) + 0.5), axis=-1).astype(np.float32)
    crops = [((100, 60, 400, 300), (180, 20, 333, 380)), ((0, 0, 300, 200), (40, 40, 120, 90)), ((9, 9, 99, 77),) * 2]
    features: list[list[torch.Tensor]] = [[], []]
    boxes: list[list[np.ndarray]] = [[], []]
    flips: list[list[bool]] = [[], []]
    for pair in crops:
        for own_flip, other_flip in ((False, False), (True, False), (False, True), (True, True)):
            for v, (crop, flip) in enumerate(zip(pair, (own_flip, other_flip), strict=True)):
                x, y, w, h = crop
                flip_transform = HFlipTransform(size) if flip else NoOpTransform()
                transforms = TransformList(
                    [CropTransform(x, y, w, h, W, H), ScaleTransform(h, w, size, size, "bilinear"), flip_transform]
                )
                box, seen_flip = image_to_view(transforms, (size, size))
                image = torch.from_numpy(transforms.apply_image(ramp).copy()).permute(2, 0, 1)
                features[v].append(torch.nn.functional.avg_pool2d(image, size // cells))
                boxes[v].append(box)
                flips[v].append(seen_flip)
    views = [make_view(torch.from_numpy(np.stack(boxes[v])), torch.tensor(flips[v])) for v in (0, 1)]
    aligned, inside = [], []
    place = None
    for v in (0, 1):
        rois, valid = overlap_rois(views[v], views[1 - v])
        assert valid.all()
        aligned.append(align_features(torch.stack(features[v]), rois, views[v].hflip))
        # Beyond the centres of the outer cells a feature map is constant, so only the cells within can be exact.
        own, other = views[v].crop_boxes, views[1 - v].crop_boxes
        low, high = torch.maximum(own[:, :2], other[:, :2]), torch.minimum(own[:, 2:], other[:, 2:])
        steps = (torch.arange(cells) + 0.5) / cells
        columns = low[:, :1] + steps * (high - low)[:, :1]
        rows = low[:, 1:] + steps * (high - low)[:, 1:]
        place = torch.stack([columns[:, None, :].expand(-1, cells, -1), rows[:, :, None].expand(-1, -1, cells)], dim=1)
        margin = (own[:, 2:] - own[:, :2])[:, :, None, None] / cells / 2 - 1e-3
        inside.append(((place > own[:, :2, None, None] + margin) & (place < own[:, 2:, None, None] - margin)).all(1))
    assert place is not None
    both = inside[0] & inside[1]
    assert both.float().mean() > 0.5
    for a, within in zip(aligned, inside, strict=True):
        assert ((a - place).abs().amax(dim=1)[within] < 0.02).all()
    assert ((aligned[0] - aligned[1]).abs().amax(dim=1)[both] < 0.02).all()


# ------------------------------------------------------------------------------------------------ image_to_view


@pytest.mark.parametrize(
    ("transforms", "box", "hflip"),
    [
        ([], [0, 0, 100, 100], False),
        ([HFlipTransform(W)], [540, 0, 640, 100], True),
        ([CropTransform(30, 40, 200, 150, W, H), ScaleTransform(150, 200, 100, 100)], [30, 40, 230, 190], False),
        (
            [CropTransform(30, 40, 200, 150, W, H), ScaleTransform(150, 200, 100, 100), HFlipTransform(100)],
            [30, 40, 230, 190],
            True,
        ),
        (
            [CropTransform(30, 40, 200, 150, W, H), HFlipTransform(200), ScaleTransform(150, 200, 100, 100)],
            [30, 40, 230, 190],
            True,
        ),
        # Flipped first, the crop comes from the other side: x from 640 - 230 to 640 - 30.
        (
            [HFlipTransform(W), CropTransform(30, 40, 200, 150, W, H), ScaleTransform(150, 200, 100, 100)],
            [410, 40, 610, 190],
            True,
        ),
        # Half as large first: pixels of the crop count double.
        (
            [ScaleTransform(H, W, H // 2, W // 2), CropTransform(30, 40, 100, 100, W // 2, H // 2)],
            [60, 80, 260, 280],
            False,
        ),
        # A crop of a flipped crop: x from 50 + 200 - 170 to 50 + 200 - 70, and back by the second flip.
        (
            [
                CropTransform(50, 10, 200, 200, W, H),
                HFlipTransform(200),
                CropTransform(70, 20, 100, 100, 200, 200),
                HFlipTransform(100),
            ],
            [80, 30, 180, 130],
            False,
        ),
        ([HFlipTransform(W), HFlipTransform(W)], [0, 0, 100, 100], False),
    ],
)
def test_image_to_view(transforms: list[Transform], box: list[float], hflip: bool) -> None:
    found, flipped = image_to_view(TransformList(transforms), (100, 100))
    assert found.dtype == np.float32
    assert found.tolist() == box  # exactly: equal crops have to compare equal
    assert flipped is hflip


@pytest.mark.parametrize("seed", range(5))
def test_detectron2_augmentations_are_understood(seed: int) -> None:
    rng = np.random.default_rng(seed)
    np.random.seed(seed)  # Detectron2's augmentations draw from NumPy's global generator
    flip = T.RandomFlip(prob=float(seed % 2))
    crop = T.RandomCrop("absolute", (int(rng.integers(50, 300)), int(rng.integers(50, 300))))
    image = np.zeros((H, W, 3), dtype=np.uint8)
    image[..., 0] = np.arange(W) // 4
    image[..., 1] = np.arange(H)[:, None] // 4
    aug_input = T.AugInput(image)
    transforms = T.AugmentationList([crop, T.Resize((64, 64)), flip])(aug_input)
    box, hflip = image_to_view(transforms, (64, 64))
    assert hflip is (seed % 2 == 1)
    applied = transforms.transforms[0]
    assert box.tolist() == [applied.x0, applied.y0, applied.x0 + applied.w, applied.y0 + applied.h]
    # The view's own pixels say where they come from.
    columns, rows = aug_input.image[32, :, 0] * 4.0, aug_input.image[:, 32, 1] * 4.0
    if hflip:
        columns = columns[::-1]
    for values, low, high in ((columns, box[0], box[2]), (rows, box[1], box[3])):
        expected = low + (np.arange(64) + 0.5) / 64 * (high - low)
        assert np.abs(values - expected).max() < 8


def test_detectron2_resize_before_crop_is_understood() -> None:
    np.random.seed(0)
    augmentations = [
        T.ResizeShortestEdge(240),
        T.RandomCrop("absolute", (100, 100)),
        T.RandomExtent((0.5, 0.5), (0.1, 0.1)),
    ]
    aug_input = T.AugInput(np.zeros((H, W, 3), dtype=np.uint8))
    transforms = T.AugmentationList(augmentations)(aug_input)
    box, hflip = image_to_view(transforms, aug_input.image.shape[:2])
    crop, extent = transforms.transforms[1], transforms.transforms[2]
    expected = (np.asarray(extent.src_rect) + [crop.x0, crop.y0, crop.x0, crop.y0]) * 2
    np.testing.assert_allclose(box, expected, atol=1e-4)
    assert not hflip


class Shear(Transform):
    """Moves rows sideways."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return img

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords + 0.1 * coords[:, ::-1] * [1, 0]


@pytest.mark.parametrize(
    "transforms",
    [
        [T.RotationTransform(H, W, 10)],
        [T.RotationTransform(H, W, 90)],
        [T.RotationTransform(H, W, 180)],
        # A slight rotation after a crop far from the origin is small beside the coordinates.
        [CropTransform(3000, 2000, 800, 800, 4000, 3000), T.RotationTransform(800, 800, 0.1, expand=False)],
        [VFlipTransform(H)],
        [VFlipTransform(H), HFlipTransform(W)],
        [Shear()],
    ],
    ids=["rotated", "quarter turn", "half turn", "slightly rotated", "upside down", "both flips", "sheared"],
)
def test_transforms_that_cannot_be_undone_are_refused(transforms: list[Transform]) -> None:
    with pytest.raises(ValueError, match="cropped, resized and flipped"):
        image_to_view(TransformList(transforms), (100, 100))
