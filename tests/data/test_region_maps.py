"""Sources of region maps: what each gives an image, and what it refuses."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import Metadata
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as coco_mask
from stored_maps import store_maps

from d2_objssl.config import add_objssl_config
from d2_objssl.data.region_maps import (
    FelzenszwalbRegions,
    FileRegions,
    GlobalRegions,
    GridRegions,
    InstanceRegions,
    RegionSource,
    SelectiveSearchRegions,
    SemSegRegions,
    build_region_source,
    limit_region_ids,
)
from d2_objssl.proposals import felzenszwalb_regions
from d2_objssl.structures import NO_REGION

HEIGHT, WIDTH = 40, 60


def make_cfg(*opts: object) -> CfgNode:
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.merge_from_list(["INPUT.FORMAT", "RGB", *opts])
    return cfg


@pytest.fixture
def image() -> np.ndarray:
    """A bright rectangle, rows 10 to 29 and columns 20 to 39, on soft noise."""
    image = np.random.default_rng(0).integers(60, 80, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    image[10:30, 20:40] += 150
    return image


def box(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    """(H, W) bool mask."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def polygon(x0: int, y0: int, x1: int, y1: int) -> list[list[float]]:
    return [[float(v) for v in (x0, y0, x1, y0, x1, y1, x0, y1)]]


def assert_map(region_map: np.ndarray, expected: np.ndarray) -> None:
    assert region_map.dtype == np.int32
    np.testing.assert_array_equal(region_map, expected)


# ------------------------------------------------------------------------------------------------------ computed


def test_the_grid(image):
    region_map = GridRegions(4)(image, {})
    rows, columns = np.arange(HEIGHT) // 10, np.arange(WIDTH) // 15
    assert_map(region_map, rows[:, None] * 4 + columns)


def test_the_whole_image(image):
    assert_map(GlobalRegions()(image, {}), np.zeros((HEIGHT, WIDTH)))


def test_felzenszwalb_draws_one_setting_an_image(image):
    settings = ((5.0, 4), (400.0, 100))
    expected = [felzenszwalb_regions(image, *s) for s in settings]
    assert expected[0].max() > expected[1].max() > 0
    source = FelzenszwalbRegions(settings)

    def draw(count: int) -> list[int]:
        np.random.seed(0)
        maps = [source(image, {}) for _ in range(count)]
        return [next(i for i in (0, 1) if np.array_equal(region_map, expected[i])) for region_map in maps]

    drawn = draw(12)
    assert set(drawn) == {0, 1}
    assert draw(4) == drawn[:4], "it follows from numpy's seed"


def test_one_setting_of_felzenszwalb_draws_nothing(image):
    np.random.seed(0)
    assert_map(FelzenszwalbRegions(((400.0, 100),))(image, {}), felzenszwalb_regions(image, 400.0, 100))
    after = np.random.rand()
    np.random.seed(0)
    assert after == np.random.rand()


def test_selective_search_gives_overlapping_boxes(image):
    source = SelectiveSearchRegions(3)
    bits = source(image, {})
    assert source.overlapping and bits.dtype == np.int32 and bits.shape == (HEIGHT, WIDTH)
    assert 0 < bits.max() < 2**3
    rectangle = box(20, 10, 40, 30)
    overlaps = [((bits >> r & 1 == 1) & rectangle).sum() / ((bits >> r & 1 == 1) | rectangle).sum() for r in range(3)]
    assert max(overlaps) > 0.8, "one of the boxes is the rectangle"


def test_too_many_regions_keep_the_largest():
    region_map = np.repeat(np.arange(6), [1, 5, 2, 4, 3, 6])[None].astype(np.int32)
    limited, num_dropped = limit_region_ids(region_map, 4)
    assert num_dropped == 2
    new = {1: 1, 3: 2, 4: 3, 5: 0}
    assert_map(limited, [[new.get(i, NO_REGION) for i in region_map[0]]])
    same, num_dropped = limit_region_ids(region_map, 6)
    assert same is region_map and num_dropped == 0
    sparse = np.array([[NO_REGION, 900, 900, 7]], dtype=np.int32)
    limited, num_dropped = limit_region_ids(sparse, 256)
    assert num_dropped == 0, "few regions with large ids are renumbered"
    assert_map(limited, [[NO_REGION, 0, 0, 1]])


# ----------------------------------------------------------------------------------------------------- instances


def instances(*annotations: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {"file_name": "a.jpg", "height": HEIGHT, "width": WIDTH, "annotations": list(annotations), **extra}


def shapes() -> list[tuple[dict[str, Any], np.ndarray]]:
    """Annotations in all forms of a segmentation, and their masks."""
    masks = [box(0, 0, 30, 20), box(5, 5, 15, 15), box(40, 20, 60, 40), box(50, 30, 55, 35), box(2, 30, 12, 38)]
    compressed = coco_mask.encode(np.asfortranarray(masks[1].astype(np.uint8)))
    runs = np.flatnonzero(np.diff(masks[2].ravel(order="F"), prepend=False, append=False))
    counts = np.diff(runs, prepend=0, append=HEIGHT * WIDTH).tolist()
    annotations: list[dict[str, Any]] = [
        {"segmentation": polygon(0, 0, 30, 20)},
        {"segmentation": compressed},
        {"segmentation": {"counts": counts, "size": [HEIGHT, WIDTH]}},
        {"segmentation": masks[3].astype(np.uint8)},
        {"bbox": [2, 30, 10, 8], "bbox_mode": BoxMode.XYWH_ABS},
    ]
    return list(zip(annotations, masks, strict=True))


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 3, 1, 4]])
def test_small_objects_lie_on_large_ones_whatever_their_order(image, order):
    items = [shapes()[i] for i in order]
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.int32)
    for y in range(HEIGHT):
        for x in range(WIDTH):
            covering = [(mask.sum(), i + 1) for i, (_, mask) in enumerate(items) if mask[y, x]]
            expected[y, x] = min(covering)[1] if covering else 0
    assert len(np.unique(expected)) == 6
    assert_map(InstanceRegions()(image, instances(*(a for a, _ in items))), expected)


def test_an_image_without_objects_is_one_region(image):
    assert_map(InstanceRegions()(image, instances()), np.zeros((HEIGHT, WIDTH)))


def test_only_shapes_are_kept_of_annotations(image):
    source = InstanceRegions()
    full = instances(*({**a, "category_id": 1, "iscrowd": 0, "area": 3.0} for a, _ in shapes()), license=3)
    full["annotations"][0] |= {"bbox": [0, 0, 30, 20], "bbox_mode": BoxMode.XYXY_ABS}
    (kept,) = source.prepare([full], Metadata())
    assert kept.keys() == {"file_name", "height", "width", "annotations"}
    assert [a.keys() for a in kept["annotations"]] == [{"segmentation"}] * 4 + [{"bbox", "bbox_mode"}]
    assert_map(source(image, kept), source(image, full))
    assert full["license"] == 3 and full["annotations"][0]["category_id"] == 1, "the catalog's dicts are not changed"


def test_images_without_annotations_are_counted_and_named():
    dicts = [instances(file_name=f"{i}.jpg") for i in range(9)]
    for d in dicts[2:]:
        del d["annotations"]
    with pytest.raises(ValueError, match=r'7 image.*"annotations".*SOURCE "instances".*2\.jpg.*6\.jpg') as error:
        InstanceRegions().check(dicts)
    assert "7.jpg" not in str(error.value)
    InstanceRegions().check(dicts[:2])


def test_annotations_without_a_shape_are_refused(caplog):
    good = {"bbox": [0, 0, 5, 5], "bbox_mode": BoxMode.XYXY_ABS}
    bad = instances({"category_id": 3, "segmentation": []}, file_name="bad.jpg")
    with pytest.raises(ValueError, match=r'1 image.*neither "segmentation" nor "bbox".*bad\.jpg'):
        InstanceRegions().check([instances(good), bad])
    with caplog.at_level(logging.WARNING, "d2_objssl"):
        InstanceRegions().check([instances(good, {"segmentation": polygon(0, 0, 4, 4)})])
    assert "1 of 2 objects have no segmentation" in caplog.text


@pytest.mark.parametrize(
    "bad",
    [
        instances(height=WIDTH, width=HEIGHT),
        instances({"segmentation": np.zeros((WIDTH, HEIGHT), dtype=bool)}),
        instances({"segmentation": coco_mask.encode(np.zeros((WIDTH, HEIGHT), dtype=np.uint8, order="F"))}),
    ],
    ids=["image size", "mask", "run lengths"],
)
def test_annotations_of_another_size_are_refused(image, bad):
    with pytest.raises(ValueError, match=r"annotations of a\.jpg.* 60 x 40 .* 40 x 60.*EXIF"):
        InstanceRegions()(image, bad)


# ------------------------------------------------------------------------------------------------------- sem_seg


@pytest.fixture
def labels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 12, (HEIGHT, WIDTH))


def save_labels(folder: Path, labels: np.ndarray, mode: str, **options: Any) -> dict[str, Any]:
    file = folder / "labels.png"
    if mode == "palette":
        stored = Image.fromarray(labels.astype(np.uint8), "P")
        stored.putpalette([(7 * i) % 256 for i in range(768)])
    else:
        stored = Image.fromarray(labels.astype({"8 bits": np.uint8, "16 bits": np.uint16}[mode]))
    stored.save(file, **options)
    return {"file_name": "a.jpg", "sem_seg_file_name": str(file)}


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("mode", ["8 bits", "16 bits", "palette"])
def test_semantic_labels_are_the_ids(image, labels, tmp_path, mode):
    assert_map(SemSegRegions()(image, save_labels(tmp_path, labels, mode)), labels)


def test_the_ignored_label_is_no_region(image, labels, tmp_path):
    expected = np.where(labels == 11, NO_REGION, labels)
    d = save_labels(tmp_path, labels, "8 bits")
    assert_map(SemSegRegions(ignore_label=11)(image, d), expected)
    source = SemSegRegions(max_region_ids=11)
    (kept,) = source.prepare([{**d, "height": HEIGHT}], Metadata(ignore_label=11))
    assert kept == {**d, "ignore_label": 11}
    assert_map(source(image, kept), expected)
    (kept,) = SemSegRegions().prepare([d], Metadata())
    assert_map(SemSegRegions()(image, kept), labels)


def test_labels_beyond_the_maximum_are_refused(image, labels, tmp_path):
    labels[3, 4] = 300
    d = save_labels(tmp_path, labels, "16 bits")
    with pytest.raises(ValueError, match=r"labels\.png .*label 300.*MODEL\.SSL\.DETCON\.MAX_REGION_IDS is 300"):
        SemSegRegions(300)(image, d)
    assert_map(SemSegRegions(301)(image, d), labels)


def test_a_label_map_of_another_size_is_refused(image, labels, tmp_path):
    d = save_labels(tmp_path, labels.T, "8 bits")
    with pytest.raises(ValueError, match=r"labels\.png of a\.jpg: the size is 60 x 40 .* 40 x 60"):
        SemSegRegions()(image, d)


def test_a_coloured_label_map_is_refused(image, tmp_path):
    Image.fromarray(image).save(tmp_path / "colours.png")
    with pytest.raises(ValueError, match=r"colours\.png is no label map: .*\(40, 60, 3\)"):
        SemSegRegions()(image, {"file_name": "a.jpg", "sem_seg_file_name": str(tmp_path / "colours.png")})


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_a_label_map_that_cannot_be_read_is_an_os_error_with_its_name(image, labels, tmp_path, how):
    d = save_labels(tmp_path, labels, "8 bits")
    file = tmp_path / "labels.png"
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(OSError, match=r"labels\.png: cannot read this label map"):
        SemSegRegions()(image, d)


def test_images_without_a_label_map_are_counted_and_named():
    dicts = [{"file_name": "a.jpg", "sem_seg_file_name": "a.png"}, {"file_name": "b.jpg"}]
    with pytest.raises(ValueError, match=r'1 image.*"sem_seg_file_name".*SOURCE "sem_seg".*b\.jpg'):
        SemSegRegions().check(dicts)


# --------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def stored(image: np.ndarray, tmp_path: Path) -> dict[str, Any]:
    """Dataset dict of the image, with a key."""
    Image.fromarray(image).save(tmp_path / "a.png")
    return {"file_name": str(tmp_path / "a.png"), "region_key": "images/a.png"}


def test_stored_label_maps(image, labels, stored, tmp_path):
    labels[0] = NO_REGION
    source = FileRegions(store_maps(tmp_path / "maps", [stored], [labels]))
    assert source.ready and not source.overlapping
    source.check([stored])
    assert_map(source(image, stored), labels)


def test_stored_bit_sets(image, stored, tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**16, (HEIGHT, WIDTH))
    source = FileRegions(store_maps(tmp_path / "maps", [stored], [bits], overlapping=True))
    assert source.overlapping
    source.check([stored])
    assert_map(source(image, stored), bits)


def test_stored_maps_of_features_are_small(image, stored, tmp_path):
    small = np.arange(6).reshape(2, 3)
    source = FileRegions(store_maps(tmp_path / "maps", [stored], [small], resolution="features"))
    assert_map(source(image, stored), small)


def test_a_small_map_is_refused_where_maps_are_those_of_the_image(image, stored, tmp_path):
    source = FileRegions(store_maps(tmp_path / "maps", [stored], [np.zeros((20, 30), dtype=int)]))
    with pytest.raises(ValueError, match=r"maps/images/a\.png\.png is 20 x 30 .* 40 x 60"):
        source(image, stored)


def test_ids_of_files_beyond_the_maximum_are_found_at_the_start(labels, stored, tmp_path):
    root = store_maps(tmp_path / "maps", [stored], [labels])
    FileRegions(root, 12).check([stored])
    with pytest.raises(ValueError, match=r"MODEL\.SSL\.DETCON\.MAX_REGION_IDS to 12"):
        FileRegions(root, 11).check([stored])


def test_without_a_root_there_are_no_maps_yet(image, labels, stored, tmp_path):
    source = FileRegions(None)
    source.check([stored])
    assert not source.ready and not source.overlapping and source.root is None
    first = store_maps(tmp_path / "1", [stored], [labels])
    second = store_maps(tmp_path / "2", [stored], [labels + 1])
    for root, expected in ((first, labels), (second, labels + 1)):
        source.set_root(root)
        assert source.ready and source.root == root
        assert_map(source(image, stored), expected)
    source.set_root(None)
    assert not source.ready


# -------------------------------------------------------------------------------------------------- configuration

KINDS: dict[str, type[RegionSource]] = {
    "grid": GridRegions,
    "global": GlobalRegions,
    "felzenszwalb": FelzenszwalbRegions,
    "selective_search": SelectiveSearchRegions,
    "instances": InstanceRegions,
    "sem_seg": SemSegRegions,
    "bootstrap": FileRegions,
}


@pytest.mark.parametrize("name", KINDS)
def test_sources_by_name(name):
    source = build_region_source(make_cfg("INPUT.REGIONS.SOURCE", name))
    assert type(source) is KINDS[name]
    assert source.ready == (name != "bootstrap")
    assert source.overlapping == (name == "selective_search")


def test_settings_reach_their_source(labels, stored, tmp_path):
    def build(*opts: object) -> Any:
        return build_region_source(make_cfg(*(f"INPUT.REGIONS.{o}" if i % 2 == 0 else o for i, o in enumerate(opts))))

    assert build() is None and build("SOURCE", "none") is None
    assert build("SOURCE", "grid", "GRID_SIZE", 7).size == 7
    pairs = ((500.0, 400), (1000.0, 1000))
    assert build("SOURCE", "felzenszwalb", "FELZENSZWALB", pairs).settings == list(pairs)
    assert build("SOURCE", "selective_search", "NUM_PROPOSALS", 4).num_proposals == 4
    root = store_maps(tmp_path / "maps", [stored], [labels])
    assert build("SOURCE", "file", "ROOT", root).root == root
    for name in ("sem_seg", "bootstrap"):
        cfg = make_cfg("INPUT.REGIONS.SOURCE", name, "MODEL.SSL.DETCON.MAX_REGION_IDS", 99)
        source: Any = build_region_source(cfg)
        assert source.max_region_ids == 99


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("SOURCE", "superpixels"), r'INPUT\.REGIONS\.SOURCE is "superpixels"; .*felzenszwalb'),
        (("SOURCE", "grid", "GRID_SIZE", 0), r"INPUT\.REGIONS\.GRID_SIZE is 0"),
        (("SOURCE", "grid", "GRID_SIZE", 17), r"INPUT\.REGIONS\.GRID_SIZE is 17: these are 289 .*MAX_REGION_IDS 256"),
        (("SOURCE", "felzenszwalb", "FELZENSZWALB", ()), r"INPUT\.REGIONS\.FELZENSZWALB is \(\)"),
        (
            ("SOURCE", "felzenszwalb", "FELZENSZWALB", (1000.0, 1000)),
            r"INPUT\.REGIONS\.FELZENSZWALB is \(1000\.0, 1000",
        ),
        (("SOURCE", "felzenszwalb", "FELZENSZWALB", ((1.0, 2, 3),)), r"INPUT\.REGIONS\.FELZENSZWALB is \(\(1\.0, 2, 3"),
        (("SOURCE", "felzenszwalb", "FELZENSZWALB", ((0.0, 100),)), r"INPUT\.REGIONS\.FELZENSZWALB is \(\(0\.0, 100"),
        (("SOURCE", "selective_search", "NUM_PROPOSALS", 0), r"INPUT\.REGIONS\.NUM_PROPOSALS is 0; .* 1 to 16"),
        (("SOURCE", "selective_search", "NUM_PROPOSALS", 17), r"INPUT\.REGIONS\.NUM_PROPOSALS is 17"),
        (("SOURCE", "file"), r"INPUT\.REGIONS\.ROOT is empty"),
        (("SOURCE", "file", "ROOT", "/nowhere/at/all"), r"/nowhere/at/all.*generate_masks"),
    ],
)
def test_bad_settings_are_refused_with_their_key(opts, message):
    pairs = [f"INPUT.REGIONS.{o}" if i % 2 == 0 else o for i, o in enumerate(opts)]
    with pytest.raises(ValueError, match=message):
        build_region_source(make_cfg(*pairs))


@pytest.mark.parametrize("value", [0, 40000])
def test_the_number_of_ids_must_fit_a_batch(value):
    with pytest.raises(ValueError, match=f"MODEL.SSL.DETCON.MAX_REGION_IDS is {value}"):
        build_region_source(make_cfg("MODEL.SSL.DETCON.MAX_REGION_IDS", value))
