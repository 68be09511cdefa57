"""The mapper of both phases: Detectron2's own outputs without views, geometry and colours of the views otherwise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode
from PIL import Image
from stored_maps import store_maps

from d2_objssl.config import add_objssl_config
from d2_objssl.data import ObjSSLDatasetMapper, collate_views

HEIGHT, WIDTH = 90, 120


def make_cfg(*opts: object) -> CfgNode:
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.merge_from_list(["INPUT.FORMAT", "RGB", *opts])
    return cfg


@pytest.fixture(scope="module")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coordinate ramp: red is 2 x, green is 2 y, blue is 80; stored without loss."""
    ramp = np.full((HEIGHT, WIDTH, 3), 80, dtype=np.uint8)
    ramp[..., 0] = 2 * np.arange(WIDTH)
    ramp[..., 1] = 2 * np.arange(HEIGHT)[:, None]
    file = tmp_path_factory.mktemp("ramp") / "ramp.png"
    Image.fromarray(ramp).save(file)
    return file


# ---------------------------------------------------------------------------------- without views: Detectron2's own


def labelled(file: Path) -> dict[str, Any]:
    polygons = [[10.0, 10.0, 70.0, 15.0, 60.0, 60.0, 12.0, 50.0], [80.0, 20.0, 110.0, 20.0, 110.0, 80.0]]
    annotations = [
        {
            "bbox": [min(p[::2]), min(p[1::2]), max(p[::2]), max(p[1::2])],
            "bbox_mode": BoxMode.XYXY_ABS,
            "segmentation": [p],
            "category_id": i,
            "iscrowd": 0,
        }
        for i, p in enumerate(polygons)
    ]
    size = {"height": HEIGHT, "width": WIDTH}
    return {"file_name": str(file), "image_id": 7, **size, "annotations": annotations}


def assert_equal_samples(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for key in theirs.keys() - {"image", "instances"}:
        assert ours[key] == theirs[key], key
    assert ours["image"].dtype == theirs["image"].dtype and torch.equal(ours["image"], theirs["image"])
    if "instances" not in theirs:
        return
    a, b = ours["instances"], theirs["instances"]
    assert a.image_size == b.image_size and a.get_fields().keys() == b.get_fields().keys()
    assert torch.equal(a.gt_boxes.tensor, b.gt_boxes.tensor) and torch.equal(a.gt_classes, b.gt_classes)
    if a.has("gt_masks") and hasattr(a.gt_masks, "polygons"):
        for p, q in zip(a.gt_masks.polygons, b.gt_masks.polygons, strict=True):
            assert all(np.array_equal(u, v) for u, v in zip(p, q, strict=True))
    elif a.has("gt_masks"):
        assert torch.equal(a.gt_masks.tensor, b.gt_masks.tensor)


@pytest.mark.parametrize("is_train", [True, False], ids=["train", "test"])
@pytest.mark.parametrize(
    "opts",
    [
        (),
        ("MODEL.MASK_ON", True),
        ("MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask"),
        ("MODEL.MASK_ON", True, "INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [0.6, 0.7]),
        ("INPUT.FORMAT", "BGR", "INPUT.RANDOM_FLIP", "vertical"),
    ],
    ids=["boxes", "polygons", "bitmasks", "crop", "bgr"],
)
def test_without_views_outputs_equal_detectron2s_bit_by_bit(image_file, is_train, opts):
    cfg = make_cfg("INPUT.MIN_SIZE_TRAIN", (64, 80, 100), "INPUT.MIN_SIZE_TEST", 70, *opts)
    ours, theirs = ObjSSLDatasetMapper(cfg, is_train), DatasetMapper(cfg, is_train)
    shapes = set()
    for seed in range(8):
        samples = []
        for mapper in (ours, theirs):
            np.random.seed(seed)
            samples.append((mapper(labelled(image_file)), np.random.rand()))
        (mine, my_next), (reference, next_) = samples
        assert_equal_samples(mine, reference)
        assert my_next == next_, "the same number of random draws"
        shapes.add(tuple(mine["image"].shape))
    assert (len(shapes) > 1) == is_train
    assert ("instances" in mine) == is_train


def test_evaluation_sees_whole_images_of_a_pretraining_config(image_file):
    cfg = make_cfg("INPUT.SSL.NUM_VIEWS", 2, "INPUT.MIN_SIZE_TEST", 70)
    ours, theirs = ObjSSLDatasetMapper(cfg, False), DatasetMapper(cfg, False)
    assert_equal_samples(ours(labelled(image_file)), theirs(labelled(image_file)))


# ------------------------------------------------------------------------------------------------------- geometry

PLAIN = (  # no colours: what remains of a view is its geometry
    *("INPUT.SSL.NUM_VIEWS", 2, "INPUT.SSL.CROP_SIZE", 48, "INPUT.SSL.COLOR_JITTER_PROB", 0.0),
    *("INPUT.SSL.GRAYSCALE_PROB", 0.0, "INPUT.SSL.BLUR_PROB", [0.0], "INPUT.SSL.SOLARIZE_PROB", [0.0]),
)
Sample = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def sample(image_file: Path) -> Sample:
    """Map the ramp `count` times with a config."""

    def draw(*opts: object, count: int = 60, file: Path = image_file) -> list[dict[str, Any]]:
        mapper = ObjSSLDatasetMapper(make_cfg(*opts), True)
        np.random.seed(0)
        return [mapper({"file_name": str(file), "image_id": 3}) for _ in range(count)]

    return draw


def test_what_a_mapped_image_consists_of(sample):
    mapped = sample("INPUT.SSL.NUM_VIEWS", 3, "INPUT.SSL.CROP_SIZE", 40, count=1)[0]
    assert mapped["image_id"] == 3 and mapped["file_name"].endswith("ramp.png")
    assert (mapped["height"], mapped["width"]) == (HEIGHT, WIDTH)
    assert len(mapped["views"]) == 3
    for view in mapped["views"]:
        assert (view["image"].shape, view["image"].dtype) == ((3, 40, 40), torch.uint8)
        assert (view["crop_box"].shape, view["crop_box"].dtype) == ((4,), torch.float32)
        assert isinstance(view["hflip"], bool)


def test_samples_follow_from_numpys_seed(image_file):
    mapper = ObjSSLDatasetMapper(make_cfg("INPUT.SSL.NUM_VIEWS", 2, "INPUT.SSL.CROP_SIZE", 32), True)
    samples = []
    for seed, torch_seed in ((1, 1), (1, 2), (2, 2)):
        np.random.seed(seed)
        torch.manual_seed(torch_seed)
        samples.append(mapper({"file_name": str(image_file)})["views"][0]["image"])
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_crops_have_integer_corners_inside_the_image(sample):
    boxes = torch.stack([v["crop_box"] for s in sample(*PLAIN) for v in s["views"]])
    assert torch.equal(boxes, boxes.round())
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= WIDTH).all() and (boxes[:, 3] <= HEIGHT).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert len(boxes.unique(dim=0)) > 100


def test_crops_keep_to_scale_and_ratio(sample):
    opts = ("INPUT.SSL.CROP_SCALE", (0.2, 0.5), "INPUT.SSL.CROP_RATIO", (0.8, 1.2))
    boxes = torch.stack([v["crop_box"] for s in sample(*PLAIN, *opts) for v in s["views"]])
    w, h = (boxes[:, 2] - boxes[:, 0]), (boxes[:, 3] - boxes[:, 1])
    area = w * h / (WIDTH * HEIGHT)
    assert area.min() > 0.19 and area.max() < 0.51
    assert (w / h).min() > 0.77 and (w / h).max() < 1.24


def covered(box: torch.Tensor, other: torch.Tensor) -> float:
    """Share of `box` that lies in `other`."""
    size = (torch.minimum(box[2:], other[2:]) - torch.maximum(box[:2], other[:2])).clamp(min=0)
    return float(size.prod() / (box[2:] - box[:2]).prod())


@pytest.mark.parametrize("minimum", [0.01, 0.3])
def test_later_crops_overlap_the_first_one(sample, minimum):
    opts = ("INPUT.SSL.MIN_OVERLAP", minimum, "INPUT.SSL.NUM_VIEWS", 3, "INPUT.SSL.CROP_SCALE", (0.08, 0.4))
    shares = [
        covered(view["crop_box"], s["views"][0]["crop_box"])
        for s in sample(*PLAIN, *opts, count=150)
        for view in s["views"][1:]
    ]
    assert np.mean(np.array(shares) >= minimum) > 0.97
    assert min(shares) < minimum + 0.2, "no more is asked than the minimum"


def test_flips_have_their_probability(sample):
    flips = np.array([[v["hflip"] for v in s["views"]] for s in sample(*PLAIN, count=400)])
    assert flips.mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.08)
    assert (flips[:, 0] == flips[:, 1]).mean() == pytest.approx(0.5, abs=0.08), "views flip independently"
    for probability in (0.0, 1.0):
        flips = np.array([v["hflip"] for s in sample(*PLAIN, "INPUT.SSL.FLIP_PROB", probability) for v in s["views"]])
        assert (flips == bool(probability)).all()


def test_without_geometry_all_views_show_one_unflipped_crop(sample):
    samples = sample(*PLAIN, "INPUT.SSL.GEOMETRIC", False, "INPUT.SSL.FLIP_PROB", 1.0, "INPUT.SSL.NUM_VIEWS", 3)
    for s in samples:
        first = s["views"][0]
        assert not any(v["hflip"] for v in s["views"])
        assert all(torch.equal(v["crop_box"], first["crop_box"]) for v in s["views"])
        assert all(torch.equal(v["image"], first["image"]) for v in s["views"])
    assert len({tuple(s["views"][0]["crop_box"].tolist()) for s in samples}) > 50, "another crop for every image"


def test_crop_box_and_flip_say_what_the_pixels_show(sample):
    """Red and green of the ramp are the coordinates of the image pixel that a view's pixel shows."""
    side = 48
    centres = (torch.arange(side) + 0.5) / side
    inner = slice(3, -3)  # bicubic resampling bends the ramp at the border of the crop
    for s in sample(*PLAIN, "INPUT.SSL.CROP_SCALE", (0.2, 1.0), count=40):
        for view in s["views"]:
            x0, y0, x1, y1 = view["crop_box"]
            x = x0 + (x1 - x0) * (centres.flip(0) if view["hflip"] else centres)
            y = y0 + (y1 - y0) * centres
            shown = view["image"].float()
            expected_red = (2 * (x - 0.5)).expand(side, side)  # pixel i covers [i, i + 1] and holds 2 i
            expected_green = (2 * (y - 0.5))[:, None].expand(side, side)
            assert (shown[0] - expected_red)[inner, inner].abs().max() < 1.0
            assert (shown[1] - expected_green)[inner, inner].abs().max() < 1.0
            assert (shown[2] - 80).abs().max() <= 1


# -------------------------------------------------------------------------------------------------------- colours


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine chequerboard of 20 and 235: blur leaves values between, solarisation none above 127."""
    board = np.where(np.indices((64, 64)).sum(axis=0) % 2, 235, 20).astype(np.uint8)
    file = tmp_path_factory.mktemp("checks") / "checks.png"
    Image.fromarray(np.repeat(board[..., None], 3, axis=2)).save(file)
    return file


WHOLE = (  # the whole image at its own size: no resampling
    *PLAIN,
    *("INPUT.SSL.CROP_SIZE", 64, "INPUT.SSL.CROP_SCALE", (1.0, 1.0), "INPUT.SSL.CROP_RATIO", (1.0, 1.0)),
)


def shares(samples: list[dict[str, Any]], test: Callable[[torch.Tensor], Any]) -> list[float]:
    """In which share of the samples each view passes a test."""
    return [float(np.mean([bool(test(s["views"][v]["image"])) for s in samples])) for v in range(2)]


def is_blurred(image: torch.Tensor) -> bool:
    return bool(((image > 40) & (image < 215)).float().mean() > 0.5)


def is_solarized(image: torch.Tensor) -> bool:
    return bool(image.max() < 128)


def test_without_colours_the_pixels_are_the_images(sample, checks):
    samples = sample(*WHOLE, "INPUT.SSL.FLIP_PROB", 0.0, file=checks, count=3)
    original = torch.from_numpy(np.array(Image.open(checks))).permute(2, 0, 1)
    assert all(torch.equal(v["image"], original) for s in samples for v in s["views"])


def test_blur_and_solarisation_have_a_probability_per_view(sample, checks):
    sigma = ("INPUT.SSL.BLUR_SIGMA", (1.5, 2.0))
    samples = sample(*WHOLE, *sigma, "INPUT.SSL.BLUR_PROB", [1.0, 0.1], file=checks, count=200)
    assert shares(samples, is_blurred) == pytest.approx([1.0, 0.1], abs=0.07)
    samples = sample(*WHOLE, "INPUT.SSL.SOLARIZE_PROB", [0.0, 0.2], file=checks, count=200)
    assert shares(samples, is_solarized) == pytest.approx([0.0, 0.2], abs=0.09)


def test_the_last_probability_serves_the_views_beyond_the_list(sample, checks):
    opts = ("INPUT.SSL.NUM_VIEWS", 3, "INPUT.SSL.SOLARIZE_PROB", [0.0, 1.0])
    for s in sample(*WHOLE, *opts, file=checks, count=10):
        assert [is_solarized(v["image"]) for v in s["views"]] == [False, True, True]


def test_grey_and_jitter_have_their_probability(sample):
    whole = (*WHOLE, "INPUT.SSL.CROP_RATIO", (WIDTH / HEIGHT, WIDTH / HEIGHT), "INPUT.SSL.FLIP_PROB", 0.0)
    samples = sample(*whole, "INPUT.SSL.GRAYSCALE_PROB", 0.2, count=200)
    grey = shares(samples, lambda image: torch.equal(image[0], image[1]) and torch.equal(image[1], image[2]))
    assert grey == pytest.approx([0.2, 0.2], abs=0.09)
    plain = sample(*whole, count=1)[0]["views"][0]["image"]
    jittered = shares(
        sample(*whole, "INPUT.SSL.COLOR_JITTER_PROB", 0.8, count=200), lambda x: not torch.equal(x, plain)
    )
    assert jittered == pytest.approx([0.8, 0.8], abs=0.09)


@pytest.mark.parametrize("key", ["BLUR_PROB", "SOLARIZE_PROB"])
def test_an_empty_list_of_probabilities_is_refused(key):
    with pytest.raises(ValueError, match=f"INPUT.SSL.{key} is empty"):
        ObjSSLDatasetMapper(make_cfg("INPUT.SSL.NUM_VIEWS", 2, f"INPUT.SSL.{key}", []), True)


@pytest.mark.parametrize("opts", [("BLUR_PROB", [1.5]), ("HUE", 0.7), ("GRAYSCALE_PROB", -0.1)])
def test_strengths_out_of_range_are_refused_with_their_key(opts):
    key, value = opts
    with pytest.raises(ValueError, match=f"INPUT.SSL.{key}"):
        ObjSSLDatasetMapper(make_cfg("INPUT.SSL.NUM_VIEWS", 2, f"INPUT.SSL.{key}", value), True)


def test_bgr_is_refused_in_pretraining():
    with pytest.raises(ValueError, match=r'INPUT\.FORMAT is "BGR"'):
        ObjSSLDatasetMapper(make_cfg("INPUT.SSL.NUM_VIEWS", 2, "INPUT.FORMAT", "BGR"), True)
    ObjSSLDatasetMapper(make_cfg("INPUT.FORMAT", "BGR"), True)  # fine-tuning of a BGR model is allowed


# -------------------------------------------------------------------------------------------------------- regions


def save_rectangle(folder: Path, *, turned: bool) -> tuple[dict[str, Any], np.ndarray]:
    """A bright rectangle on black, and its labels in all forms; `turned`: stored on its side, with an EXIF orientation.

    Returns:
        its dataset dict, and the (H, W) region map.
    """
    region_map = np.zeros((HEIGHT, WIDTH), dtype=np.int32)
    region_map[20:50, 40:100] = 1
    pixels = np.repeat((200 * region_map).astype(np.uint8)[..., None], 3, axis=2)
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6  # turn it clockwise to see it
        pixels = np.rot90(pixels)
    Image.fromarray(np.ascontiguousarray(pixels)).save(folder / "image.jpg", quality=95, exif=exif)
    Image.fromarray(region_map.astype(np.uint8)).save(folder / "labels.png")
    dataset_dict = {
        "file_name": str(folder / "image.jpg"),
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": [{"segmentation": [[40.0, 20.0, 100.0, 20.0, 100.0, 50.0, 40.0, 50.0]]}],
        "sem_seg_file_name": str(folder / "labels.png"),
        "region_key": "images/image.jpg",
    }
    return dataset_dict, region_map


def map_often(mapper: ObjSSLDatasetMapper, dataset_dict: dict[str, Any], count: int) -> list[dict[str, Any]]:
    np.random.seed(0)
    return [mapper(dataset_dict) for _ in range(count)]


def shown_pixels(view: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns (S,) of the image whose centres, or pixels, the centres of the view's pixels hit."""
    x0, y0, x1, y1 = (int(v) for v in view["crop_box"])
    side = view["image"].shape[1]
    steps = 2 * np.arange(side) + 1
    rows, columns = y0 + steps * (y1 - y0) // (2 * side), x0 + steps * (x1 - x0) // (2 * side)
    return rows, columns[::-1] if view["hflip"] else columns


@pytest.mark.parametrize("turned", [False, True], ids=["upright", "exif"])
@pytest.mark.parametrize("source", ["instances", "sem_seg", "file", "features"])
def test_region_maps_move_with_the_image(tmp_path, source, turned):
    """Where a view is bright there is the object's region, but for the pixels at its border, which are blurred."""
    dataset_dict, region_map = save_rectangle(tmp_path, turned=turned)
    opts: list[object] = [*PLAIN, "INPUT.SSL.CROP_SCALE", (0.3, 1.0), "INPUT.REGIONS.SOURCE", source]
    if source in ("file", "features"):
        stored = region_map if source == "file" else region_map[5::10, 5::10]
        resolution = "image" if source == "file" else source
        root = store_maps(tmp_path / "maps", [dataset_dict], [stored], resolution=resolution)
        opts += ["INPUT.REGIONS.SOURCE", "file", "INPUT.REGIONS.ROOT", root]
    seen = 0
    for mapped in map_often(ObjSSLDatasetMapper(make_cfg(*opts), True), dataset_dict, 20):
        assert mapped["overlapping_regions"] is False and "num_dropped_regions" not in mapped
        for view in mapped["views"]:
            moved = view["region_map"]
            assert (moved.shape, moved.dtype) == ((48, 48), torch.int16)
            rows, columns = shown_pixels(view)
            np.testing.assert_array_equal(moved.numpy(), region_map[rows][:, columns])
            windows = moved.unfold(0, 5, 1).unfold(1, 5, 1).flatten(2)
            uniform = windows.amin(dim=2) == windows.amax(dim=2)
            bright = view["image"][0, 2:-2, 2:-2] > 100
            assert torch.equal(bright[uniform], moved[2:-2, 2:-2][uniform] == 1)
            seen += int(bright[uniform].any() and not bright[uniform].all())
    assert seen > 20


def test_bit_sets_move_with_the_image(image_file, tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**16, (HEIGHT, WIDTH)).astype(np.int32)
    dataset_dict = {"file_name": str(image_file), "region_key": "ramp.png"}
    root = store_maps(tmp_path / "maps", [dataset_dict], [bits], overlapping=True)
    cfg = make_cfg(*PLAIN, "INPUT.REGIONS.SOURCE", "file", "INPUT.REGIONS.ROOT", root)
    for mapped in map_often(ObjSSLDatasetMapper(cfg, True), dataset_dict, 5):
        assert mapped["overlapping_regions"] is True
        for view in mapped["views"]:
            assert view["region_map"].dtype == torch.int32
            rows, columns = shown_pixels(view)
            np.testing.assert_array_equal(view["region_map"].numpy(), bits[rows][:, columns])


@pytest.mark.parametrize("source", ["grid", "felzenszwalb", "bootstrap"])
def test_the_views_are_the_same_with_any_source(image_file, source):
    """A source may draw random numbers; only what it draws itself differs."""
    regions = ("INPUT.REGIONS.SOURCE", source, "INPUT.REGIONS.FELZENSZWALB", ((500.0, 500), (1000.0, 1000)))
    plain = ("INPUT.SSL.NUM_VIEWS", 2, "INPUT.SSL.CROP_SIZE", 32)
    for seed in range(3):
        samples = []
        for opts in (plain, (*plain, *regions)):
            np.random.seed(seed)
            samples.append(ObjSSLDatasetMapper(make_cfg(*opts), True)({"file_name": str(image_file)}))
        without, with_regions = samples
        for a, b in zip(without["views"], with_regions["views"], strict=True):
            assert torch.equal(a["image"], b["image"]) and torch.equal(a["crop_box"], b["crop_box"])
            assert a["hflip"] == b["hflip"]
            assert "region_map" not in a and ("region_map" in b) == (source != "bootstrap")
        assert "overlapping_regions" not in without
        assert ("overlapping_regions" in with_regions) == (source != "bootstrap")


def test_an_image_with_too_many_objects_keeps_the_largest(image_file):
    boxes = [{"bbox": [12 * i, 0, 12 * i + 5 + i % 3, 8], "bbox_mode": BoxMode.XYXY_ABS} for i in range(9)]
    opts = (*WHOLE, "INPUT.SSL.CROP_RATIO", (WIDTH / HEIGHT, WIDTH / HEIGHT), "INPUT.SSL.CROP_SIZE", 120)
    cfg = make_cfg(*opts, "INPUT.REGIONS.SOURCE", "instances", "MODEL.SSL.DETCON.MAX_REGION_IDS", 4)
    mapped = ObjSSLDatasetMapper(cfg, True)({"file_name": str(image_file), "annotations": boxes})
    assert mapped["num_dropped_regions"] == 6
    ids, areas = mapped["views"][0]["region_map"].unique(return_counts=True)
    assert ids.tolist() == [-1, 0, 1, 2, 3]
    assert areas[1] > 100 * areas[2], "the pixels of no object"
    assert collate_views([mapped, mapped]).dropped_regions == [(str(image_file), 6)] * 2


def test_fine_tuning_and_evaluation_read_no_regions(image_file):
    cfg = make_cfg("INPUT.REGIONS.SOURCE", "file", "INPUT.REGIONS.ROOT", "/nowhere/at/all")
    assert ObjSSLDatasetMapper(cfg, True).region_source is None
    cfg.INPUT.SSL.NUM_VIEWS = 2
    assert ObjSSLDatasetMapper(cfg, False).region_source is None


# -------------------------------------------------------------------------------------------------------- collation


def test_collation_keeps_the_order(sample):
    samples = sample("INPUT.SSL.NUM_VIEWS", 2, "INPUT.SSL.CROP_SIZE", 32, count=3)
    samples[1]["replaced"] = [("bad.jpg", "OSError: truncated")]
    batch = collate_views(samples)
    assert len(batch) == 3
    assert batch.replaced == [("bad.jpg", "OSError: truncated")]
    for v, view in enumerate(batch.views):
        for n, s in enumerate(samples):
            assert torch.equal(view.images[n], s["views"][v]["image"])
            assert torch.equal(view.crop_boxes[n], s["views"][v]["crop_box"])
            assert bool(view.hflip[n]) == s["views"][v]["hflip"]
