"""Reading images, crops and colour augmentations, against Pillow, torchvision and naive loops."""

import io
import itertools
import random
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from fvcore.transforms.transform import HFlipTransform, NoOpTransform
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as F

from d2_objssl.data import augmentation, color_transforms, image_reading
from d2_objssl.data.augmentation import (
    ColorJitter,
    FastHFlipTransform,
    RandomGaussianBlur,
    RandomGrayscale,
    RandomSolarize,
    ResizedCropTransform,
    build_view_augmentations,
    sample_crop_boxes,
)
from d2_objssl.data.color_transforms import (
    ColorJitterTransform,
    GaussianBlurTransform,
    GrayscaleTransform,
    SolarizeTransform,
)
from d2_objssl.data.image_reading import read_rgb_image

VIEW_ARGUMENTS = {
    "num_views": 2,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "jitter_prob": 0.8,
    "grayscale_prob": 0.2,
    "blur_probs": [1.0, 0.1],
    "blur_sigma": (0.1, 2.0),
    "solarize_probs": [0.0, 0.2],
}
ALL_TRANSFORMS = [
    ColorJitterTransform([("brightness", 1.3), ("contrast", 1.4), ("saturation", 0.8), ("hue", -0.1)]),
    GrayscaleTransform(),
    GaussianBlurTransform(1.7),
    SolarizeTransform(),
]


def make_photograph(height: int, width: int, seed: int) -> np.ndarray:
    """Noise of all scales and a few discs: detail, edges and colours as in a photograph."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), rng.uniform(60, 200, 3), dtype=np.float32)
    for octave in range(6):
        noise = rng.normal(0, 1, (max(height >> octave, 2), max(width >> octave, 2), 3)).astype(np.float32)
        noise = 1.5 * noise.mean(axis=2, keepdims=True) + 0.4 * noise
        image += 5 * 1.4**octave * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(6):
        center = rng.integers((0, 0), (width, height)).tolist()
        color = rng.uniform(0, 255, 3).tolist()
        cv2.circle(image, center, int(rng.integers(3, max(height // 4, 4))), color, -1, cv2.LINE_AA)
    return image.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    return [make_photograph(224, 224, seed) for seed in range(6)]


@pytest.fixture(scope="module")
def real_photographs(test_data: Path) -> list[np.ndarray]:
    files = sorted((test_data / "coco128" / "train2017").glob("*.jpg"))[:24]
    if not files:
        pytest.skip("no coco128 in the test data")
    return [np.asarray(Image.open(f).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)) for f in files]


def mean_difference(transform, images, reference) -> float:
    """Mean absolute difference over all pixels, grey levels, from what `reference` does to Pillow images."""
    return float(
        np.mean(
            [
                np.abs(transform.apply_image(image).astype(int) - np.asarray(reference(Image.fromarray(image)))).mean()
                for image in images
            ]
        )
    )


def ks_distance(a, b) -> float:
    """Two-sample Kolmogorov-Smirnov statistic."""
    points = np.concatenate([a, b])
    return float(
        np.abs(
            np.searchsorted(np.sort(a), points, side="right") / len(a)
            - np.searchsorted(np.sort(b), points, side="right") / len(b)
        ).max()
    )


# --- Reading -----------------------------------------------------------------------------------------------------


@pytest.fixture
def image_file(tmp_path):
    """Write an image with Pillow's options and return its path."""

    def write(image: Image.Image, name: str, **options) -> str:
        path = tmp_path / name
        image.save(path, **options)
        return str(path)

    return write


def assert_almost_as_read_image(path: str) -> None:
    image, expected = read_rgb_image(path), read_image(path, "RGB")
    assert image.shape == expected.shape and image.dtype == np.uint8
    assert image.flags.c_contiguous and image.flags.writeable
    difference = np.abs(image.astype(int) - expected)
    assert difference.max() <= 2 and difference.mean() < 0.1


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"exif": Image.Exif().tobytes()}])
def test_ordinary_jpegs_take_the_fast_path(image_file, monkeypatch, mode, options):
    path = image_file(Image.fromarray(make_photograph(61, 83, 0)).convert(mode), "a.jpg", quality=90, **options)
    monkeypatch.setattr(image_reading, "_read_with_pillow", None)
    assert_almost_as_read_image(path)


def test_fast_path_without_opencvs_rgb_flag(image_file, monkeypatch):
    path = image_file(Image.fromarray(make_photograph(61, 83, 0)), "a.jpg")
    monkeypatch.delattr(cv2, "IMREAD_COLOR_RGB", raising=False)
    monkeypatch.setattr(image_reading, "_read_with_pillow", None)
    assert_almost_as_read_image(path)


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(image_file, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_almost_as_read_image(image_file(Image.fromarray(make_photograph(40, 60, 1)), "a.jpg", exif=exif))


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("RGB", "a.png"),
        ("RGBA", "a.png"),
        ("P", "a.png"),
        ("L", "a.png"),
        ("LA", "a.png"),
        ("1", "a.png"),
        ("RGB", "a.bmp"),
        ("P", "a.gif"),
        ("RGBA", "a.tif"),
        ("CMYK", "a.jpg"),
        ("RGB", "a.webp"),
    ],
)
def test_other_formats_equal_read_image(image_file, mode, name):
    rgba = Image.fromarray(np.dstack([make_photograph(33, 47, 2), np.arange(33 * 47).reshape(33, 47).astype(np.uint8)]))
    path = image_file(rgba.quantize() if mode == "P" else rgba.convert(mode), name)
    result = read_rgb_image(path)
    np.testing.assert_array_equal(result, read_image(path, "RGB"))
    assert result.flags.c_contiguous and result.flags.writeable


def test_16_bit_grey_is_scaled_instead_of_clipped(image_file):
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = read_rgb_image(image_file(Image.fromarray(deep), "a.png"))
    np.testing.assert_array_equal(image, np.repeat((deep // 256).astype(np.uint8)[:, :, None], 3, axis=2))


def test_values_beyond_16_bits_are_refused(image_file):
    path = image_file(Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)), "deep.tif")
    with pytest.raises(OSError, match=r"deep\.tif.*70000"):
        read_rgb_image(path)


def jpeg_bytes() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(make_photograph(60, 80, 3)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def png_bytes() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(make_photograph(60, 80, 3)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"this is text",
        b"\xff\xd8",
        b"\xff\xd8\xff\xd9",
        jpeg_bytes()[: len(jpeg_bytes()) // 2],
        jpeg_bytes()[:-2],
        jpeg_bytes()[: len(jpeg_bytes()) // 2] + bytes(len(jpeg_bytes()) // 2),
        png_bytes()[: len(png_bytes()) // 2],
    ],
    ids=["empty", "text", "start", "start and end", "half", "no end marker", "half, padded with zeros", "half a png"],
)
def test_broken_files_raise_with_their_name(tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises((OSError, ValueError), match=r"broken\.jpg"):
        read_rgb_image(str(path))


def test_missing_file_raises_with_its_name(tmp_path):
    with pytest.raises(OSError, match=r"absent\.jpg"):
        read_rgb_image(str(tmp_path / "absent.jpg"))


@pytest.mark.parametrize("junk", [b"\0\0\0", b"appended by a camera"])
def test_bytes_after_the_end_of_a_jpeg_are_ignored(tmp_path, junk):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_bytes() + junk)
    assert_almost_as_read_image(str(path))


def test_decompression_bombs_are_refused(image_file, monkeypatch):
    path = image_file(Image.fromarray(make_photograph(60, 80, 3)), "bomb.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(OSError, match=r"bomb\.jpg.*decompression bomb"):
        read_rgb_image(path)


def test_real_jpegs_equal_read_image(test_data):
    for path in sorted((test_data / "coco128" / "train2017").glob("*.jpg"))[:6]:
        assert_almost_as_read_image(str(path))


# --- Where crops lie ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(480, 640), (90, 300)])  # in the second many draws do not fit
def test_crops_are_distributed_as_torchvisions(shape):
    height, width = shape
    n, scale, ratio = 2500, (0.08, 1.0), (3 / 4, 4 / 3)
    np.random.seed(0)
    torch.manual_seed(0)
    ours = np.concatenate(
        [sample_crop_boxes(height, width, num_views=1, scale=scale, ratio=ratio) for _ in range(n)]
    ).astype(float)
    image = torch.empty(3, height, width)
    ijhw = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)], dtype=float)
    theirs = np.stack([ijhw[:, 1], ijhw[:, 0], ijhw[:, 1] + ijhw[:, 3], ijhw[:, 0] + ijhw[:, 2]], axis=1)
    for statistic in (
        lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]),
        lambda b: (b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1]),
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 2],
        lambda b: b[:, 3],
    ):
        assert ks_distance(statistic(ours), statistic(theirs)) < 1.95 * np.sqrt(2 / n)  # passed by 99.9 % if equal


@pytest.mark.parametrize("shape", [(5, 7000), (7000, 5), (1, 1), (30, 31), (1, 300), (300, 100)])
def test_central_fallback_equals_torchvisions(shape):
    height, width = shape
    box = sample_crop_boxes(height, width, num_views=1, scale=(4.0, 4.0))[0]  # never fits
    i, j, h, w = RandomResizedCrop.get_params(torch.empty(3, height, width), [4.0, 4.0], [3 / 4, 4 / 3])
    assert box.tolist() == [j, i, j + w, i + h]


@pytest.mark.parametrize("shape", [(1, 1), (5, 7000), (2, 3), (480, 640)])
def test_crops_are_whole_pixels_inside_the_image(shape):
    np.random.seed(1)
    boxes = np.concatenate([sample_crop_boxes(*shape, num_views=3) for _ in range(200)])
    assert boxes.dtype == np.int64 and boxes.shape == (600, 4)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= shape[1]).all() and (boxes[:, 3] <= shape[0]).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def overlap_share(box, first):
    w = min(box[2], first[2]) - max(box[0], first[0])
    h = min(box[3], first[3]) - max(box[1], first[1])
    return max(w, 0) * max(h, 0) / ((box[2] - box[0]) * (box[3] - box[1]))


def test_later_crops_overlap_the_first():
    np.random.seed(2)

    def shares(min_overlap):
        crops = [sample_crop_boxes(480, 640, num_views=3, min_overlap=min_overlap) for _ in range(500)]
        return np.array([overlap_share(boxes[v], boxes[0]) for boxes in crops for v in (1, 2)])

    free = shares(0.0)
    assert 0.01 < (free < 0.01).mean() < 0.1 and (shares(0.01) >= 0.01).all()
    assert (shares(0.3) < 0.3).mean() < 0.2 * (free < 0.3).mean()


def test_the_overlap_rule_gives_up_after_num_tries(monkeypatch):
    draws = itertools.count()
    monkeypatch.setattr(augmentation, "_sample_crop_box", lambda *_: (next(draws), 0, next(draws) + 1, 1))
    # Disjoint from the first one throughout: ten draws fail, the eleventh is taken as it is.
    boxes = sample_crop_boxes(10, 100, num_views=2, min_overlap=0.01)
    assert boxes.tolist() == [[0, 0, 2, 1], [22, 0, 24, 1]]
    draws = itertools.count()
    boxes = sample_crop_boxes(10, 100, num_views=2, min_overlap=0.01, num_tries=3)
    assert boxes[1].tolist() == [8, 0, 10, 1]
    draws = itertools.count()
    assert sample_crop_boxes(10, 100, num_views=2, min_overlap=0.0)[1].tolist() == [2, 0, 4, 1]


def test_the_first_crop_is_unconditional():
    np.random.seed(3)
    first = [sample_crop_boxes(300, 400, num_views=2, min_overlap=0.9)[0] for _ in range(1500)]
    alone = [sample_crop_boxes(300, 400, num_views=1)[0] for _ in range(1500)]
    areas = [[(b[2] - b[0]) * (b[3] - b[1]) for b in boxes] for boxes in (first, alone)]
    assert ks_distance(*areas) < 1.95 * np.sqrt(2 / 1500)


def test_same_crop_gives_all_views_one_crop():
    boxes = sample_crop_boxes(300, 400, num_views=4, same_crop=True)
    assert boxes.shape == (4, 4) and (boxes == boxes[0]).all()


# --- Cropping and resizing ---------------------------------------------------------------------------------------


def random_crop_transform(image: np.ndarray, size: int) -> ResizedCropTransform:
    height, width = image.shape[:2]
    x0, y0, x1, y1 = sample_crop_boxes(height, width, num_views=1)[0].tolist()
    return ResizedCropTransform(x0, y0, x1 - x0, y1 - y0, size, height, width)


def pil_crop(image: np.ndarray, t: ResizedCropTransform) -> np.ndarray:
    size = [t.size, t.size]
    return np.asarray(F.resized_crop(Image.fromarray(image), t.y0, t.x0, t.h, t.w, size, F.InterpolationMode.BICUBIC))


def assert_crops_as_pillow(images) -> None:
    np.random.seed(4)
    for image in images:
        transform = random_crop_transform(image, 96)
        result = transform.apply_image(image)
        assert result.shape == (96, 96, 3) and result.dtype == np.uint8 and result.flags.c_contiguous
        difference = np.abs(result.astype(int) - pil_crop(image, transform))
        # The two clip overshooting values between their passes differently: a few pixels differ by more than one.
        assert difference.mean() < 0.3 and (difference > 1).mean() < 0.01


def test_crop_equals_pillow():
    assert_crops_as_pillow([make_photograph(240, 320, seed) for seed in range(8)])


def test_crop_equals_pillow_on_real_images(real_photographs):
    assert_crops_as_pillow(real_photographs)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7000), (7000, 5), (1, 40), (3, 2)])
@pytest.mark.parametrize("size", [1, 64])
def test_crop_of_extreme_shapes(shape, size):
    height, width = shape
    image = make_photograph(height, width, 5)
    transform = ResizedCropTransform(0, 0, width, height, size, height, width)
    result = transform.apply_image(image)
    assert result.shape == (size, size, 3) and result.flags.c_contiguous
    assert np.abs(result.astype(int) - pil_crop(image, transform)).max() <= 2


def test_crop_of_the_same_size_is_a_copy():
    image = make_photograph(64, 64, 6)
    image.flags.writeable = False
    result = ResizedCropTransform(0, 0, 64, 64, 64, 64, 64).apply_image(image)
    np.testing.assert_array_equal(result, image)
    assert not np.shares_memory(result, image)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, bool])
@pytest.mark.parametrize("size", [7, 50])
def test_region_maps_are_sampled_at_pixel_centres(dtype, size):
    rng = np.random.default_rng(0)
    x0, y0, w, h = 3, 5, 31, 23
    maps = rng.integers(0, 200, (40, 60, 2)).astype(dtype)
    transform = ResizedCropTransform(x0, y0, w, h, size, 40, 60)
    expected = np.zeros((size, size, 2), dtype=dtype)
    for row, column in itertools.product(range(size), repeat=2):
        y, x = y0 + (row + 0.5) * h / size, x0 + (column + 0.5) * w / size
        expected[row, column] = maps[int(y), int(x)]
    stacked = transform.apply_segmentation(maps)
    assert stacked.dtype == dtype and stacked.flags.c_contiguous
    np.testing.assert_array_equal(stacked, expected)
    np.testing.assert_array_equal(transform.apply_segmentation(maps[:, :, 0]), expected[:, :, 0])


def test_small_region_map_equals_the_enlarged_one():
    small = np.random.default_rng(1).integers(0, 256, (13, 17))
    enlarged = np.array(
        [[small[(2 * y + 1) * 13 // 160, (2 * x + 1) * 17 // 240] for x in range(120)] for y in range(80)]
    )
    transform = ResizedCropTransform(7, 9, 80, 60, 48, 80, 120)
    np.testing.assert_array_equal(transform.apply_segmentation(small), transform.apply_segmentation(enlarged))


def test_region_maps_move_with_the_image():
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    image[10:30, 20:45] = 200
    transform = ResizedCropTransform(5, 5, 50, 32, 64, 40, 60)
    seen = transform.apply_image(image)[:, :, 0] > 100
    region = transform.apply_segmentation((image[:, :, 0] > 100).astype(np.int64)).astype(bool)
    assert (seen != region).mean() < 0.01
    x0, y0, x1, y1 = transform.apply_box(np.array([[20.0, 10.0, 45.0, 30.0]]))[0]
    rows, columns = np.nonzero(region)
    np.testing.assert_allclose([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], [x0, y0, x1, y1], atol=1)


def test_crop_coordinates_and_inverse():
    transform = ResizedCropTransform(10, 20, 50, 25, 100, 200, 300)
    points = np.array([[10.0, 20.0], [60.0, 45.0], [35.0, 20.0], [0.0, 0.0]])
    moved = transform.apply_coords(points)
    np.testing.assert_allclose(moved, [[0, 0], [100, 100], [50, 0], [-20, -80]])
    np.testing.assert_array_equal(points[0], [10.0, 20.0])
    np.testing.assert_allclose(transform.inverse().apply_coords(moved.copy()), points)
    view = np.full((100, 100), 7, dtype=np.uint8)
    restored = transform.inverse().apply_segmentation(view)
    assert restored.shape == (200, 300)
    expected = np.zeros((200, 300), dtype=np.uint8)
    expected[20:45, 10:60] = 7
    np.testing.assert_array_equal(restored, expected)


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 0, 0, 5), (6, 0, 5, 5), (0, 6, 5, 5)])
def test_crops_outside_the_image_are_a_bug(box):
    with pytest.raises(AssertionError):
        ResizedCropTransform(*box, 8, 10, 10)


def test_flip_equals_fvcores(photographs):
    ours, reference = FastHFlipTransform(224), HFlipTransform(224)
    assert isinstance(ours, HFlipTransform)  # Detectron2 asks for the class when it flips key points
    result = ours.apply_image(photographs[0])
    np.testing.assert_array_equal(result, reference.apply_image(photographs[0]))
    assert result.flags.c_contiguous
    maps = np.random.default_rng(0).integers(0, 9, (224, 224, 2))
    np.testing.assert_array_equal(ours.apply_segmentation(maps), reference.apply_segmentation(maps))
    points = np.array([[3.0, 4.0]])
    np.testing.assert_array_equal(ours.apply_coords(points.copy()), reference.apply_coords(points.copy()))


# --- Colours -----------------------------------------------------------------------------------------------------

# (operation, value, the largest mean difference from torchvision on Pillow images)
COLOR_CASES = [
    *(("brightness", value, F.adjust_brightness, 0.03) for value in (0.6, 0.87, 1.0, 1.13, 1.4)),
    *(("contrast", value, F.adjust_contrast, 0.03) for value in (0.6, 0.9, 1.0, 1.1, 1.4)),
    *(("saturation", value, F.adjust_saturation, 0.03) for value in (0.8, 0.93, 1.0, 1.2, 1.8)),
    *(("hue", value, F.adjust_hue, 0.4) for value in (-0.5, -0.1, -0.03, 0.0, 0.05, 0.1)),
]


@pytest.mark.parametrize(("name", "value", "reference", "bound"), COLOR_CASES)
def test_color_operations_equal_torchvision(photographs, name, value, reference, bound):
    transform = ColorJitterTransform([(name, value)])
    assert mean_difference(transform, photographs, lambda image: reference(image, value)) < bound


@pytest.mark.parametrize(("name", "value", "reference", "bound"), COLOR_CASES)
def test_color_operations_equal_torchvision_on_real_images(real_photographs, name, value, reference, bound):
    transform = ColorJitterTransform([(name, value)])
    assert mean_difference(transform, real_photographs, lambda image: reference(image, value)) < bound


@pytest.mark.parametrize("factor", [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0])  # exact in binary: no doubtful cases
def test_blends_equal_the_formula(photographs, factor):
    image = photographs[0].astype(int)

    def blend(other):
        return np.clip(np.trunc(other + factor * (image - other)), 0, 255)

    r, g, b = np.moveaxis(image, 2, 0)
    luma = (r * 19595 + g * 38470 + b * 7471 + 32768) >> 16
    mean = int(luma.mean() + 0.5)
    for name, other in (("brightness", 0), ("contrast", mean), ("saturation", luma[:, :, None])):
        result = ColorJitterTransform([(name, factor)]).apply_image(photographs[0])
        differs = result != blend(other)
        # OpenCV's luma differs from Pillow's by one level at one pixel in some thousands.
        assert differs.mean() < (0.002 if name == "saturation" else 1e-9), name


def test_jitter_applies_its_operations_in_order(photographs):
    operations = [("contrast", 1.4), ("hue", 0.1), ("brightness", 0.7), ("saturation", 1.2)]

    def reference(image):
        for name, value in operations:
            image = getattr(F, f"adjust_{name}")(image, value)
        return image

    assert mean_difference(ColorJitterTransform(operations), photographs, reference) < 0.5
    assert mean_difference(ColorJitterTransform(operations[::-1]), photographs, reference) > 1


def test_grayscale_equals_torchvision(photographs):
    assert mean_difference(GrayscaleTransform(), photographs, lambda image: F.to_grayscale(image, 3)) < 0.01


@pytest.mark.parametrize("threshold", [0, 1, 100, 128, 255, 256])
def test_solarize_equals_pillow(photographs, threshold):
    transform = SolarizeTransform(threshold)
    assert mean_difference(transform, photographs, lambda image: ImageOps.solarize(image, threshold)) == 0


BLUR_SIGMAS = [0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 1.41, 1.42, 1.7, 2.0, 3.0]


@pytest.mark.parametrize("sigma", BLUR_SIGMAS)
def test_blur_equals_pillow(photographs, sigma):
    gaussian = ImageFilter.GaussianBlur(sigma)
    assert mean_difference(GaussianBlurTransform(sigma), photographs, lambda image: image.filter(gaussian)) < 0.4
    image = photographs[0]
    largest = np.abs(
        GaussianBlurTransform(sigma).apply_image(image).astype(int)
        - np.asarray(Image.fromarray(image).filter(gaussian))
    ).max()
    assert largest <= 4  # at the border, too


@pytest.mark.parametrize("sigma", BLUR_SIGMAS)
def test_blur_equals_pillow_on_real_images(real_photographs, sigma):
    gaussian = ImageFilter.GaussianBlur(sigma)
    assert mean_difference(GaussianBlurTransform(sigma), real_photographs, lambda image: image.filter(gaussian)) < 0.4


@pytest.mark.parametrize("sigma", [0.0, 0.05, *np.arange(0.1, 3.0, 0.1), 5.0, 12.0])
def test_blur_kernel(sigma):
    kernel = color_transforms.extended_box(sigma)
    assert kernel.dtype == np.float32 and kernel.sum() == 1 and kernel.min() >= 0
    np.testing.assert_array_equal(kernel, kernel[::-1])
    reach = len(kernel) // 2
    variance = 3 * (kernel * np.arange(-reach, reach + 1) ** 2).sum()
    assert variance == pytest.approx(sigma**2, rel=0.02, abs=0.02)  # steps of 1/256


@pytest.mark.parametrize("value", [0, 1, 77, 254, 255])
def test_blur_keeps_a_plain_image(value):
    image = np.full((30, 40, 3), value, dtype=np.uint8)
    for sigma in np.arange(0.02, 3.0, 0.07):
        np.testing.assert_array_equal(GaussianBlurTransform(sigma).apply_image(image), image)


@pytest.mark.parametrize("transform", ALL_TRANSFORMS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("shape", [(1, 1), (5, 700), (700, 5), (64, 64)])
def test_photometric_transforms_keep_input_shape_and_geometry(transform, shape):
    image = make_photograph(*shape, 7)
    before = image.copy()
    image.flags.writeable = False
    result = transform.apply_image(image)
    np.testing.assert_array_equal(image, before)
    assert result.shape == image.shape and result.dtype == np.uint8 and result.flags.c_contiguous
    assert not np.shares_memory(result, image)
    if shape == (64, 64):
        assert (result != image).any()
    points, region_map = np.array([[1.0, 2.0]]), np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(transform.apply_coords(points), points)
    np.testing.assert_array_equal(transform.apply_segmentation(region_map), region_map)
    assert isinstance(transform.inverse(), NoOpTransform)


# --- Random colours ----------------------------------------------------------------------------------------------

IMAGE = np.zeros((4, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "make",
    [lambda p: ColorJitter(0.4, 0.4, 0.2, 0.1, p), RandomGrayscale, RandomGaussianBlur, RandomSolarize],
    ids=["jitter", "grey", "blur", "solarise"],
)
def test_probabilities(make, prob):
    np.random.seed(5)
    augmentation_ = make(prob)
    count = sum(not isinstance(augmentation_.get_transform(IMAGE), NoOpTransform) for _ in range(1000))
    assert count == 1000 * prob if prob in (0, 1) else abs(count - 300) < 50


def test_jitter_is_distributed_as_torchvisions():
    np.random.seed(6)
    jitter = ColorJitter(brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1, prob=1.0)
    drawn = [jitter.get_transform(IMAGE).operations for _ in range(3000)]
    orders = Counter(tuple(name for name, _ in operations) for operations in drawn)
    assert len(orders) == 24 and min(orders.values()) > 80  # 125 expected
    values = {name: np.array([dict(operations)[name] for operations in drawn]) for name in orders.most_common()[0][0]}
    for name, (low, high) in {
        "brightness": (0.6, 1.4),
        "contrast": (0.0, 2.5),
        "saturation": (0.8, 1.2),
        "hue": (-0.1, 0.1),
    }.items():
        uniform = low + (high - low) * (np.arange(3000) + 0.5) / 3000
        assert ks_distance(values[name], uniform) < 1.95 / np.sqrt(3000)
        # Strength and place in the order are drawn independently.
        first = np.array([operations[0][0] == name for operations in drawn])
        assert abs(values[name][first].mean() - (low + high) / 2) < 0.05 * (high - low)


def test_jitter_leaves_out_operations_of_no_strength():
    jitter = ColorJitter(brightness=0.4, contrast=0.0, saturation=0.0, hue=0.0, prob=1.0)
    assert [name for name, _ in jitter.get_transform(IMAGE).operations] == ["brightness"]
    assert ColorJitter(0.0, 0.0, 0.0, 0.0, 1.0).get_transform(IMAGE).operations == ()


def test_blur_sigma_is_uniform():
    np.random.seed(7)
    blur = RandomGaussianBlur(1.0, 0.1, 2.0)
    sigmas = [blur.get_transform(IMAGE).sigma for _ in range(2000)]
    assert ks_distance(sigmas, 0.1 + 1.9 * (np.arange(2000) + 0.5) / 2000) < 1.95 / np.sqrt(2000)


def test_randomness_is_numpys_alone(photographs):
    def make_views():
        np.random.seed(8)
        boxes = sample_crop_boxes(224, 224, num_views=2)
        inputs = [T.AugInput(photographs[0]) for _ in range(2)]
        for aug_input, augmentations in zip(inputs, build_view_augmentations(**VIEW_ARGUMENTS), strict=True):
            T.AugmentationList(augmentations)(aug_input)
        return [boxes, *(aug_input.image for aug_input in inputs)]

    first = make_views()
    torch.manual_seed(99)
    random.seed(99)
    states = torch.get_rng_state(), random.getstate()
    for a, b in zip(first, make_views(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()


# --- Pipelines ---------------------------------------------------------------------------------------------------


def test_views_get_their_augmentations_in_order():
    views = build_view_augmentations(**VIEW_ARGUMENTS)
    assert len(views) == 2
    for view, blur_prob, solarize_prob in zip(views, [1.0, 0.1], [0.0, 0.2], strict=True):
        assert [type(a) for a in view] == [ColorJitter, RandomGrayscale, RandomGaussianBlur, RandomSolarize]
        jitter, grayscale, blur, solarize = view
        assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (0.4, 0.4, 0.2, 0.1)
        assert (jitter.prob, grayscale.prob, blur.prob, solarize.prob) == (0.8, 0.2, blur_prob, solarize_prob)
        assert (blur.sigma_min, blur.sigma_max, solarize.threshold) == (0.1, 2.0, 128)


def test_views_leave_maps_and_boxes_alone(photographs):
    np.random.seed(9)
    region_map, boxes = np.arange(224 * 224).reshape(224, 224), np.array([[1.0, 2.0, 30.0, 40.0]])
    arguments = {**VIEW_ARGUMENTS, "jitter_prob": 1.0, "grayscale_prob": 1.0, "solarize_probs": [1.0, 1.0]}
    for augmentations in build_view_augmentations(**arguments):
        aug_input = T.AugInput(photographs[1], boxes=boxes.copy(), sem_seg=region_map)
        T.AugmentationList(augmentations)(aug_input)
        assert (aug_input.image != photographs[1]).any()
        np.testing.assert_array_equal(aug_input.sem_seg, region_map)
        np.testing.assert_array_equal(aug_input.boxes, boxes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blur_probs": [1.0]}, r"INPUT\.SSL\.BLUR_PROB has 1 values"),
        ({"solarize_probs": [0.0, 0.2, 0.2]}, r"INPUT\.SSL\.SOLARIZE_PROB has 3 values"),
        ({"hue": 0.6}, r"INPUT\.SSL\.HUE is 0\.6"),
        ({"brightness": -0.1}, r"INPUT\.SSL\.BRIGHTNESS is -0\.1"),
        ({"contrast": -1}, r"INPUT\.SSL\.CONTRAST is -1"),
        ({"saturation": float("nan")}, r"INPUT\.SSL\.SATURATION is nan"),
        ({"jitter_prob": 1.1}, r"INPUT\.SSL\.COLOR_JITTER_PROB is 1\.1"),
        ({"grayscale_prob": -0.2}, r"INPUT\.SSL\.GRAYSCALE_PROB is -0\.2"),
        ({"blur_probs": [0.5, 2.0]}, r"INPUT\.SSL\.BLUR_PROB is 2\.0"),
        ({"blur_sigma": (2.0, 0.1)}, r"INPUT\.SSL\.BLUR_SIGMA\[0\] is 2\.0"),
        ({"blur_sigma": (-1.0, 0.1)}, r"INPUT\.SSL\.BLUR_SIGMA\[0\] is -1\.0"),
        ({"solarize_probs": [0.5, 2.0]}, r"INPUT\.SSL\.SOLARIZE_PROB is 2\.0"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        build_view_augmentations(**{**VIEW_ARGUMENTS, **change})
