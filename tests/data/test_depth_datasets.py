"""Depth maps: how files are decoded, lists read, and that depths move with their pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog

from d2_objssl import add_objssl_config
from d2_objssl.data import build_train_loader
from d2_objssl.data.build import _build_mapper
from d2_objssl.data.depth_datasets import load_cityscapes_depths, load_listed_depths
from d2_objssl.data.depth_mapper import DepthDatasetMapper, read_depth_map

CAMERA = {"extrinsic": {"baseline": 0.25}, "intrinsic": {"fx": 2048.0}}


def write_png(path: Path, values: Any, dtype: Any = np.uint16) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.asarray(values, dtype=dtype))
    return str(path)


# ------------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize(("scale", "expected"), [(256, [0, 2, 80]), (1000, [0, 0.512, 20.48])], ids=["kitti", "nyu"])
def test_depths_are_values_over_the_scale(tmp_path, scale, expected):
    file = write_png(tmp_path / "d.png", [[0, 512, 20480]])
    depth = read_depth_map({"file_name": "a.png", "depth_file_name": file, "depth_scale": scale})
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, [expected], rtol=1e-6)


def test_disparities_of_cityscapes(tmp_path):
    """(value - 1) / 256 pixels; 0 is no measurement, 1 infinitely far; baseline times focal length is 512 here."""
    file = write_png(tmp_path / "d.png", [[0, 1, 257, 2561, 32769]])
    (tmp_path / "c.json").write_text(json.dumps(CAMERA))
    image = {"file_name": "a.png", "depth_file_name": file, "camera_file_name": str(tmp_path / "c.json")}
    np.testing.assert_allclose(read_depth_map(image), [[0, 0, 512, 51.2, 4]], rtol=1e-6)
    (tmp_path / "c.json").write_text('{"extrinsic": {}}')
    with pytest.raises(ValueError, match=r"c\.json is no camera file"):
        read_depth_map(image)


def test_what_is_no_depth_map_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jpg has no depth map"):
        read_depth_map({"file_name": "a.jpg"})
    image = {"file_name": "a.jpg", "depth_file_name": write_png(tmp_path / "grey.png", [[7, 200]], np.uint8)}
    with pytest.raises(ValueError, match=r"grey\.png.*largest value is 200.*16 bits"):
        read_depth_map({**image, "depth_scale": 256})


# --------------------------------------------------------------------------------------------------------- lists


def test_lists_of_bts(tmp_path):
    """With and without leading slashes; images without a depth map are left out."""
    for name in ("raw/x/1.png", "raw/x/2.png", "gts/x/1.png", "gts/x/2.png"):
        write_png(tmp_path / name, [[1]])
    listed = tmp_path / "list.txt"
    listed.write_text("/x/2.png /x/2.png 721.5\nx/1.png x/1.png 721.5\nx/3.png None 721.5\n\n")
    dicts = load_listed_depths(str(listed), str(tmp_path / "raw"), str(tmp_path / "gts"), 256)
    assert [d["file_name"] for d in dicts] == [str(tmp_path / f"raw/x/{i}.png") for i in (2, 1)]
    assert [d["depth_file_name"] for d in dicts] == [str(tmp_path / f"gts/x/{i}.png") for i in (2, 1)]
    assert len({d["image_id"] for d in dicts}) == 2 and {d["depth_scale"] for d in dicts} == {256}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"list\.txt does not exist.*cleinc/bts"),
        ("x/1.png None 1\n", r"list\.txt names no image with a depth map"),
        ("x/1.png x/1.png 1\nx/2.png\n", r"list\.txt, line 2.*no depth map"),
        ("x/1.png x/1.png 1\nx/1.png x/9.png 1\n", r"1 of the 4 files.*x/9\.png"),
    ],
)
def test_a_wrong_list_is_explained(tmp_path, text, message):
    write_png(tmp_path / "x/1.png", [[1]])
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_listed_depths(str(tmp_path / "list.txt"), str(tmp_path), str(tmp_path), 256)


def test_files_of_cityscapes_belong_together(tmp_path):
    for frame in ("ulm/ulm_000001_000019", "bonn/bonn_000000_000019"):
        write_png(tmp_path / "leftImg8bit" / f"{frame}_leftImg8bit.png", [[1]])
        write_png(tmp_path / "disparity" / f"{frame}_disparity.png", [[1]])
    roots = [str(tmp_path / kind) for kind in ("leftImg8bit", "disparity", "camera")]
    with pytest.raises(FileNotFoundError, match=r"2 of the 6 files.*bonn_000000_000019_camera\.json"):
        load_cityscapes_depths(*roots)
    for frame in ("ulm/ulm_000001_000019", "bonn/bonn_000000_000019"):
        (tmp_path / "camera" / f"{frame}_camera.json").parent.mkdir(parents=True)
        (tmp_path / "camera" / f"{frame}_camera.json").write_text(json.dumps(CAMERA))
    dicts = load_cityscapes_depths(*roots)
    assert [d["image_id"] for d in dicts] == ["bonn/bonn_000000_000019", "ulm/ulm_000001_000019"]
    assert all(d["image_id"] in path for d in dicts for path in d.values())


@pytest.mark.parametrize(
    ("name", "num_images", "max_depth"),
    [
        ("nyu_depth_v2_train", 24_231, 10),
        ("nyu_depth_v2_test", 654, 10),
        ("kitti_eigen_train", 23_158, 80),
        ("kitti_eigen_test", 652, 80),
        ("cityscapes_depth_train", 2_975, 80),
        ("cityscapes_depth_val", 500, 80),
    ],
)
def test_catalog(name, num_images, max_depth):
    metadata = MetadataCatalog.get(name)
    assert (metadata.num_images, metadata.max_depth, metadata.evaluator_type) == (num_images, max_depth, "depth")


def test_a_missing_data_set_is_found_before_the_run():
    cfg = make_cfg("DATASETS.TRAIN", ("kitti_eigen_train",))
    with pytest.raises(FileNotFoundError, match=r"kitti_eigen_train_files_with_gt\.txt.*DETECTRON2_DATASETS"):
        build_train_loader(cfg)


# ---------------------------------------------------------------------------------------------------- the mapper


def make_cfg(*opts: Any) -> CfgNode:
    cfg = get_cfg()
    add_objssl_config(cfg)
    size: list[Any] = ["INPUT.MIN_SIZE_TRAIN", (0,), "INPUT.MIN_SIZE_TEST", 0, "INPUT.FORMAT", "RGB"]
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "DepthEstimator", "DATASETS.TEST", (), *size, *opts])
    return cfg


@pytest.fixture
def slope(tmp_path: Path) -> dict[str, Any]:
    """An image of 64 x 96 pixels, whose depth is 1 m plus a metre per 8 levels of its red, which grows to the right."""
    red = np.broadcast_to(2 * np.arange(96), (64, 96))
    green = np.broadcast_to(2 * np.arange(64)[:, None], (64, 96))
    write_png(tmp_path / "a.png", np.stack([green * 0, green, red], axis=2), np.uint8)
    file = write_png(tmp_path / "d.png", 256 * (1 + red / 8 + green))
    return {"file_name": str(tmp_path / "a.png"), "image_id": 0, "depth_file_name": file, "depth_scale": 256}


@pytest.mark.parametrize(
    ("opts", "tolerance"),
    [
        (("INPUT.RANDOM_FLIP", "none"), 0),
        (("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", (32, 40)), 0),
        # Bilinear and nearest pixels agree to half a pixel of the larger grid, 1.1 m here; a shift by one is 2 m and more.
        (("INPUT.MIN_SIZE_TRAIN", (48,)), 1.2),
        (("INPUT.MIN_SIZE_TRAIN", (128,)), 1.2),
    ],
    ids=["as it is", "crop and flip", "smaller", "larger"],
)
def test_depth_moves_with_the_pixels(slope, opts, tolerance):
    mapper = _build_mapper(make_cfg(*opts), True)
    assert isinstance(mapper, DepthDatasetMapper)
    np.random.seed(0)
    flipped = set()
    for _ in range(10):
        mapped = mapper(slope)
        red, green, _ = mapped["image"].numpy().astype(float)
        depth = mapped["depth"].numpy()
        assert depth.dtype == np.float32 and depth.shape == red.shape
        inner = np.s_[2:-2, 2:-2]  # bilinear resizing repeats the edges
        difference = (depth - (1 + red / 8 + green))[inner]
        assert np.abs(difference).max() <= tolerance and abs(difference.mean()) <= 0.5 * tolerance
        flipped.add(bool(red[0, 0] > red[0, -1]))
    assert flipped == ({False} if "none" in opts else {True, False})


def test_padding_is_not_measured(slope):
    """Large-scale jitter pads labels with another value than 0."""
    keys = ["INPUT.AUGMENTATION", "large_scale_jitter", "INPUT.LSJ.IMAGE_SIZE", 128]
    mapped = DepthDatasetMapper(make_cfg(*keys), is_train=True)(slope)
    depth = mapped["depth"].numpy()
    assert depth.shape == (128, 128) and (depth[-20:] == 0).all() and depth[:60].max() > 0


def test_tests_need_no_depth_and_other_sizes_are_errors(slope, tmp_path):
    mapped = DepthDatasetMapper(make_cfg(), is_train=False)({**slope, "depth_file_name": "nowhere.png"})
    assert "depth" not in mapped and (mapped["height"], mapped["width"]) == (64, 96)
    wrong = write_png(tmp_path / "small.png", np.full((64, 95), 1000))
    with pytest.raises(ValueError, match=r"small\.png, the depth map of .*a\.png: the size is 64 x 95"):
        DepthDatasetMapper(make_cfg(), is_train=True)({**slope, "depth_file_name": wrong})
