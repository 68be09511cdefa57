"""Large-scale jitter: the size of images, their scale, and objects at the border of the crop."""

from pathlib import Path

import numpy as np
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import BoxMode
from PIL import Image

from d2_objssl.config import add_objssl_config
from d2_objssl.data import ObjSSLDatasetMapper

SIZE = 64


def make_cfg(min_scale: float = 0.8, max_scale: float = 1.25) -> CfgNode:
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.INPUT.AUGMENTATION, cfg.INPUT.FORMAT, cfg.MODEL.MASK_ON = "large_scale_jitter", "RGB", True
    cfg.INPUT.LSJ.IMAGE_SIZE, cfg.INPUT.LSJ.MIN_SCALE, cfg.INPUT.LSJ.MAX_SCALE = SIZE, min_scale, max_scale
    return cfg


@pytest.fixture
def image(tmp_path: Path) -> dict:
    """White, 32 pixels high and 48 wide, with a triangle (0, 0) (12, 0) (0, 12) and a square in the right upper corner."""
    Image.new("RGB", (48, 32), "white").save(tmp_path / "a.png")
    polygons = [[0, 0, 12, 0, 0, 12], [40, 0, 48, 0, 48, 8, 40, 8]]
    boxes = [[0, 0, 12, 12], [40, 0, 48, 8]]
    objects = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "segmentation": [polygon], "category_id": 0}
        for box, polygon in zip(boxes, polygons, strict=True)
    ]
    return {"file_name": str(tmp_path / "a.png"), "image_id": 0, "height": 32, "width": 48, "annotations": objects}


def test_images_are_square_and_their_longest_side_is_that_of_the_scale(image):
    mapper, widths = ObjSSLDatasetMapper(make_cfg(), True), []
    np.random.seed(0)
    for _ in range(60):
        pixels = mapper(image)["image"]
        assert pixels.shape == (3, SIZE, SIZE)
        is_image = (pixels == 255).all(dim=0)  # the rest is padding
        assert (pixels[:, ~is_image] == 128).all()
        widths.append(int(is_image.any(dim=0).sum()))
        height = int(is_image.any(dim=1).sum())
        if widths[-1] < SIZE:
            assert height == pytest.approx(widths[-1] * 32 / 48, abs=1), "the aspect ratio stays"
    assert min(widths) in range(round(0.8 * SIZE), round(0.9 * SIZE)) and max(widths) == SIZE
    assert sum(w == SIZE for w in widths) == pytest.approx(60 * 0.25 / 0.45, abs=12), (
        "scales are uniform in [0.8, 1.25]"
    )


def test_boxes_are_those_of_the_masks_that_the_crop_has_left(image):
    """At scale 2 the image is 128 x 85, the triangle has legs of 32, and the crop is 64 x 64 of that."""
    mapper, num_cut = ObjSSLDatasetMapper(make_cfg(2.0, 2.0), True), 0
    np.random.seed(0)
    for _ in range(40):
        instances = mapper(image)["instances"]
        boxes, masks = instances.gt_boxes.tensor.numpy(), instances.gt_masks.polygons
        assert (boxes >= 0).all() and (boxes <= SIZE).all()
        for box, polygons in zip(boxes, masks, strict=True):
            points = np.concatenate(polygons).reshape(-1, 2)
            np.testing.assert_allclose(box, [*points.min(axis=0), *points.max(axis=0)], atol=1e-4)
            sides = box[2:] - box[:2]
            num_cut += bool(sides.max() < 31)
        assert len(instances) < 2, "the objects are further apart than the crop is wide"
    assert num_cut > 3, "some objects must have been cut"


def test_at_test_time_the_longest_side_is_the_size_and_nothing_is_padded(image):
    mapped = ObjSSLDatasetMapper(make_cfg(), False)(image)
    assert mapped["image"].shape == (3, round(SIZE * 32 / 48), SIZE) and (mapped["image"] == 255).all()
    assert (mapped["height"], mapped["width"]) == (32, 48)


def test_without_masks_boxes_are_cut_at_the_crop(image):
    cfg = make_cfg(2.0, 2.0)
    cfg.MODEL.MASK_ON = False
    instances = ObjSSLDatasetMapper(cfg, True)(image)["instances"]
    assert not instances.has("gt_masks") and (instances.gt_boxes.tensor <= SIZE).all()


@pytest.mark.parametrize(("low", "high"), [(1.25, 0.8), (0.0, 1.0)])
def test_an_empty_range_is_refused(low, high):
    with pytest.raises(ValueError, match=rf"MIN_SCALE {low} and MAX_SCALE {high}"):
        ObjSSLDatasetMapper(make_cfg(low, high), True)
