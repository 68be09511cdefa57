"""Semantic segmentation: labels move with the pixels, padding does not count, labels are read as they are stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from PIL import Image

from d2_objssl import add_objssl_config
from d2_objssl.data import build_test_loader, build_train_loader
from d2_objssl.data.finetune_augmentation import build_augmentation
from d2_objssl.data.sem_seg_mapper import SemSegDatasetMapper

NAME = "a_sem_seg_set"
IGNORED = 11
COLORS = np.random.default_rng(0).integers(0, 256, (11, 3), dtype=np.uint8)


def make_cfg(*opts: Any) -> CfgNode:
    """11 classes, label 11 ignored, crops of 48 pixels of images with a shorter side of 40 times 0.5 to 2."""
    cfg = get_cfg()
    add_objssl_config(cfg)
    keys: list[Any] = ["MODEL.META_ARCHITECTURE", "SlidingWindowSegmentor", "MODEL.DEVICE", "cpu"]
    keys += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 11, "MODEL.SEM_SEG_HEAD.IGNORE_VALUE", IGNORED]
    keys += ["INPUT.AUGMENTATION", "sem_seg", "INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53]]
    keys += ["INPUT.SEM_SEG.BASE_SIZE", 40, "INPUT.SEM_SEG.CROP_SIZE", 48, "DATALOADER.NUM_WORKERS", 0]
    cfg.merge_from_list([*keys, "DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,), "SEED", 0, *opts])
    return cfg


def blocks(height: int, width: int, num_classes: int = 11) -> np.ndarray:
    """A label map of squares of 20 pixels."""
    y, x = np.mgrid[:height, :width] // 20
    return ((3 * y + x) % num_classes).astype(np.uint8)


Write = Callable[..., dict[str, Any]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a label map, and an image whose colours follow from the labels; returns the dataset dict."""

    def write(labels: np.ndarray, palette: bool = False, size: tuple[int, int] | None = None) -> dict[str, Any]:
        index = len(list(tmp_path.glob("*.png")))
        image_file, label_file = (str(tmp_path / f"{kind}{index}.png") for kind in ("image", "labels"))
        Image.fromarray(COLORS[labels % 11]).save(image_file)
        stored = Image.fromarray(labels)
        if palette:
            stored.putpalette(bytes(COLORS.reshape(-1)))
        (stored if size is None else stored.resize(size)).save(label_file)
        return {"file_name": image_file, "sem_seg_file_name": label_file, "image_id": index}

    return write


@pytest.fixture
def register(write: Write):
    """Enters dataset dicts into the catalogs."""

    def enter(dicts: list[dict[str, Any]], **metadata: Any) -> None:
        DatasetCatalog.register(NAME, lambda: dicts)
        MetadataCatalog.get(NAME).set(**metadata)

    yield enter
    if NAME in DatasetCatalog:
        DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME, None)


def test_labels_move_with_the_pixels_and_the_rest_is_ignored(write: Write) -> None:
    mapper = SemSegDatasetMapper(make_cfg(), True)
    record = write(blocks(60, 70))
    sizes, flips = [], 0
    for seed in range(30):
        np.random.seed(seed)
        mapped = mapper(record)
        image, labels = mapped["image"].permute(1, 2, 0).numpy(), mapped["sem_seg"].numpy()
        assert image.shape == (48, 48, 3) and image.dtype == np.uint8
        assert labels.shape == (48, 48) and labels.dtype == np.int64
        padded = labels == IGNORED
        assert (image[padded] == [124, 116, 104]).all(), "padding has the mean colour"
        # Interpolation mixes colours at borders between squares only.
        nearest = np.abs(image[..., None, :].astype(int) - COLORS.astype(int)).sum(-1).argmin(-1)
        assert (nearest == labels)[~padded].mean() > 0.85
        columns = np.flatnonzero(~padded.all(axis=0))
        flips += columns[0] > 0  # padding is on the right, before the flip
        sizes.append(int((~padded.all(axis=1)).sum()))
    assert min(sizes) < 30 and max(sizes) == 48 and flips > 0


def test_scales_are_those_of_the_shorter_side(write: Write) -> None:
    image = np.zeros((60, 100, 3), dtype=np.uint8)
    for base, opts in ((40, ()), (60, ("INPUT.SEM_SEG.BASE_SIZE", 0))):
        scale = build_augmentation(make_cfg(*opts), True)["augmentations"][0]
        np.random.seed(0)
        shapes = np.array([scale.get_transform(image).apply_image(image).shape[:2] for _ in range(200)])
        assert np.abs(shapes[:, 1] / shapes[:, 0] - 100 / 60).max() < 0.05, "the aspect ratio stays"
        assert shapes[:, 0].min() == pytest.approx(base * 0.5, abs=2)
        assert shapes[:, 0].max() == pytest.approx(base * 2, abs=2)
        assert shapes[:, 0].mean() == pytest.approx(base * 1.25, rel=0.06), "uniform"


def test_in_tests_only_the_size_changes_and_labels_are_not_read(write: Write, register) -> None:
    record = write(blocks(60, 100))
    register([{**record, "sem_seg_file_name": "/nowhere.png"}])
    (mapped,) = next(iter(build_test_loader(make_cfg(), NAME)))
    assert mapped["image"].shape == (3, 40, 67) and (mapped["height"], mapped["width"]) == (60, 100)
    assert "sem_seg" not in mapped
    (mapped,) = next(iter(build_test_loader(make_cfg("INPUT.SEM_SEG.BASE_SIZE", 0), NAME)))
    assert mapped["image"].shape == (3, 60, 100)


def test_palette_indices_are_the_labels(write: Write) -> None:
    """Pascal VOC's label maps are coloured; Detectron2's mapper trains on the brightness of the colours."""
    labels = blocks(48, 48)
    cfg = make_cfg("INPUT.SEM_SEG.BASE_SIZE", 48, "INPUT.SEM_SEG.SCALE_RANGE", (1.0, 1.0), "INPUT.RANDOM_FLIP", "none")
    grey, colored = (SemSegDatasetMapper(cfg, True)(write(labels, palette=p))["sem_seg"] for p in (False, True))
    assert torch.equal(grey, torch.from_numpy(labels).long())
    assert torch.equal(colored, grey)


def test_with_detectron2s_augmentation_it_is_detectron2s_mapper(write: Write) -> None:
    record = write(blocks(60, 100))
    cfg = make_cfg("INPUT.AUGMENTATION", "detectron2", "INPUT.MIN_SIZE_TRAIN", (50, 70))
    results = []
    for cls in (SemSegDatasetMapper, DatasetMapper):
        np.random.seed(3)
        results.append(cls(cfg, True)(record))
    assert results[0].keys() == results[1].keys()
    for key in ("image", "sem_seg"):
        assert torch.equal(results[0][key], results[1][key])


def test_a_label_that_is_no_class_is_an_error_with_file_and_value(write: Write, register) -> None:
    labels = blocks(60, 100)
    labels[7, 9], labels[8, 9] = 200, 13
    record = write(labels)
    register([record])
    with pytest.raises(
        ValueError, match=rf"{record['sem_seg_file_name']} has the label\(s\) \[13, 200\].*IGNORE_VALUE 11"
    ):
        next(iter(build_train_loader(make_cfg("SOLVER.IMS_PER_BATCH", 1))))


def test_label_maps_of_another_size_or_none_are_errors(write: Write) -> None:
    mapper = SemSegDatasetMapper(make_cfg(), True)
    with pytest.raises(ValueError, match=r"labels0\.png.* the size is 30 x 50 .*60 x 100"):
        mapper(write(blocks(60, 100), size=(50, 30)))
    with pytest.raises(ValueError, match=r"image\d\.png has no label map"):
        mapper({"file_name": write(blocks(60, 100))["file_name"]})


@pytest.mark.parametrize(
    ("opts", "metadata", "message"),
    [
        ((), {"stuff_classes": ["a"] * 12}, f"NUM_CLASSES is 11, but {NAME} has 12 classes"),
        ((), {"ignore_label": 255}, f"IGNORE_VALUE is 11, but {NAME} ignores label 255"),
        (("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 300), {}, "NUM_CLASSES is 300"),
        (("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", -1), {}, "IGNORE_VALUE -1"),
        (("INPUT.SEM_SEG.SCALE_RANGE", (2.0, 0.5)), {}, "SCALE_RANGE is"),
        (("INPUT.SEM_SEG.CROP_SIZE", 0), {}, "CROP_SIZE is 0"),
        (("INPUT.RANDOM_FLIP", "vertical"), {}, 'RANDOM_FLIP is "vertical"'),
    ],
)
def test_settings_that_do_not_fit_are_refused(write: Write, register, opts, metadata, message) -> None:
    register([write(blocks(60, 100))], **metadata)
    with pytest.raises(ValueError, match=message):
        build_train_loader(make_cfg("SOLVER.IMS_PER_BATCH", 1, *opts))


def test_padding_is_undone_by_its_inverse() -> None:
    pad = build_augmentation(make_cfg(), True)["augmentations"][1].get_transform(np.zeros((30, 20, 3), np.uint8))
    assert isinstance(pad.inverse(), T.CropTransform)
    image = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    assert np.array_equal(pad.inverse().apply_image(pad.apply_image(image)), image)
