"""Pairs of SemCL: what an image is cut into, which pairs a data set has, the index and its cache, the views."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data.datasets import load_sem_seg
from detectron2.structures import BoxMode
from multiprocess import run_in_processes
from PIL import Image
from pycocotools import mask as coco_mask
from tiny_semcl import CLASSES, register_pairs, semcl_cfg, write_labelled

from d2_objssl.data import build_train_loader, collate_views, pair_index
from d2_objssl.data.augmentation import ColorJitter, RandomGaussianBlur, RandomGrayscale
from d2_objssl.data.label_map_datasets import load_listed_label_maps
from d2_objssl.data.pair_index import LabelSet, load_pair_index
from d2_objssl.data.pair_mapper import PairDatasetMapper, augment_pair
from d2_objssl.data.semantic_pairs import compose_pair, load_pair_dicts, read_pair_mask

HEIGHT, WIDTH = 48, 64
AREA = HEIGHT * WIDTH


def pair_cfg(folder: Path, *opts: Any) -> Any:
    return semcl_cfg(
        *("DATASETS.TRAIN", ("tiny_pairs",), "INPUT.PAIRS.CACHE_DIR", str(folder / "cache"), "SOLVER.IMS_PER_BATCH", 2),
        *("OUTPUT_DIR", str(folder / "out"), "SEED", 0, *opts),
    )


def instances(dicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same images, labelled by two overlapping polygons of category 0 and a run-length mask of category 1."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[40:44, 10:50] = 1
    rle = coco_mask.encode(mask)
    squares = [[x, 8, x + 10, 8, x + 10, 18, x, 18] for x in (5, 10)]
    shapes = [(0, [squares[0]]), (1, rle), (0, [squares[1]])]
    annotations = [
        {"bbox": [5, 8, 20, 18], "bbox_mode": BoxMode.XYXY_ABS, "category_id": c, "segmentation": s, "iscrowd": 0}
        for c, s in shapes
    ]
    return [{**d, "annotations": annotations} for d in dicts]


# ------------------------------------------------------------------------------------------------ composition


def test_members_show_their_pixels_and_black_elsewhere() -> None:
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8), rng.random((5, 7)) < 0.4
    before = image.copy()
    anchor, not_anchor = compose_pair(image, mask)
    assert anchor.dtype == not_anchor.dtype == np.uint8
    for y in range(5):
        for x in range(7):
            assert (anchor[y, x] == (image[y, x] if mask[y, x] else 0)).all()
            assert (not_anchor[y, x] == (0 if mask[y, x] else image[y, x])).all()
    assert (image == before).all()


def test_mask_of_a_label_map_and_of_annotations(tmp_path: Path) -> None:
    d = write_labelled(tmp_path)[1]
    label = np.array(Image.open(d["sem_seg_file_name"]))
    assert (read_pair_mask({**d, "pair_class": 2}, HEIGHT, WIDTH) == (label == 2)).all()
    annotated = instances([d])[0]
    objects = {k: v for k, v in annotated.items() if k != "sem_seg_file_name"}
    objects["annotations"] = [a for a in annotated["annotations"] if a["category_id"] == 0]
    union = np.zeros((HEIGHT, WIDTH), dtype=bool)
    union[8:18, 5:20] = True
    assert (read_pair_mask({**objects, "pair_class": 0}, HEIGHT, WIDTH) == union).all()


# ------------------------------------------------------------------------------------------------ which pairs


@pytest.mark.usefixtures("catalog")
def test_pairs_of_label_maps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The stripe covers 2 of 48 rows; the background and what is ignored are no objects."""
    dicts = write_labelled(tmp_path / "data")
    register_pairs("tiny_pairs", dicts)
    with caplog.at_level(logging.INFO):
        pairs = load_pair_dicts(pair_cfg(tmp_path))
    expected = [(i, c) for i in range(6) for c in ((1, 2) if i % 2 else (1,))]
    assert [(p["image_id"], p["pair_class"]) for p in pairs] == expected
    assert set(pairs[0]) == {"file_name", "image_id", "sem_seg_file_name", "pair_class"}
    assert (
        "9 pairs (image, class) of 6 images" in caplog.text
        and "6 of the classes ('background', 'things')" in caplog.text
    )
    assert not (tmp_path / "out").exists(), "the cache is where CACHE_DIR says"
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == sorted(
        os.path.basename(d[k]) for d in dicts for k in ("file_name", "sem_seg_file_name")
    ), "nothing is written beside the images"
    all_classes = load_pair_dicts(pair_cfg(tmp_path, "INPUT.PAIRS.SKIP_CLASSES", ()))
    assert [p["pair_class"] for p in all_classes] == [0, 1, 0, 1, 2] * 3


@pytest.mark.usefixtures("catalog")
def test_threshold_keeps_what_covers_exactly_that_share(tmp_path: Path) -> None:
    register_pairs("tiny_pairs", write_labelled(tmp_path / "data", count=2))
    for share, expected in ((2 * WIDTH / AREA, [1, 1, 2]), (2 * WIDTH / AREA + 1e-9, [1, 1]), (256 / AREA, [1, 1])):
        pairs = load_pair_dicts(pair_cfg(tmp_path, "INPUT.PAIRS.MIN_AREA", share))
        assert [p["pair_class"] for p in pairs] == expected, share
    with pytest.raises(ValueError, match="tiny_pairs has no pair"):
        load_pair_dicts(pair_cfg(tmp_path, "INPUT.PAIRS.MIN_AREA", 0.5))


@pytest.mark.usefixtures("catalog")
def test_pairs_of_annotations_and_of_both(tmp_path: Path) -> None:
    register_pairs("tiny_pairs", instances(write_labelled(tmp_path / "data", count=2)), thing_classes=["blob", "bar"])
    pairs = load_pair_dicts(pair_cfg(tmp_path, "INPUT.PAIRS.SOURCE", "instances"))
    assert [(p["image_id"], p["pair_class"], len(p["annotations"])) for p in pairs] == [
        (0, 0, 2), (0, 1, 1), (1, 0, 2), (1, 1, 1),
    ]  # fmt: skip
    assert "sem_seg_file_name" not in pairs[0] and list(pairs[0]["annotations"][0]) == ["segmentation"]
    labels = LabelSet("x", "instances", None, ("blob", "bar"), None)
    index = load_pair_index(
        instances(write_labelled(tmp_path / "data", count=1)), labels, cache_dir=str(tmp_path / "cache2")
    )
    assert index.shares.tolist() == [10 * 15 / AREA, 4 * 40 / AREA], "the union of the masks, not their sum"
    both = load_pair_dicts(pair_cfg(tmp_path, "INPUT.PAIRS.SOURCE", "both"))
    kinds = [("map" if "sem_seg_file_name" in p else "objects", p["pair_class"]) for p in both if p["image_id"] == 1]
    assert kinds == [("map", 1), ("map", 2), ("objects", 0), ("objects", 1)]


@pytest.mark.usefixtures("catalog")
def test_image_that_is_ignored_throughout_is_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dicts = write_labelled(tmp_path / "data", count=3)
    Image.fromarray(np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)).save(dicts[1]["sem_seg_file_name"])
    register_pairs("tiny_pairs", dicts)
    with caplog.at_level(logging.INFO):
        pairs = load_pair_dicts(pair_cfg(tmp_path))
    assert [p["image_id"] for p in pairs] == [0, 2]
    assert "1 image(s) without any label or with an ignored label throughout" in caplog.text


@pytest.mark.usefixtures("catalog")
def test_counts_of_the_paper_are_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr("d2_objssl.data.semantic_pairs.PAPER_COUNTS", {"tiny_pairs": (14_203, 10_582)})
    register_pairs("tiny_pairs", write_labelled(tmp_path / "data"))
    with caplog.at_level(logging.INFO):
        load_pair_dicts(pair_cfg(tmp_path))
    assert "9 pairs (image, class) of 6 images (paper: 14,203 pairs of 10,582 images)" in caplog.text


def test_real_driving_scenes(test_data: Path, tmp_path: Path) -> None:
    """CamVid: the shares of an image's classes add up to one, less what is unlabelled."""
    camvid = test_data / "camvid"
    dicts = load_sem_seg(str(camvid / "labels" / "val"), str(camvid / "images" / "val"), gt_ext="png", image_ext="jpg")[
        :20
    ]
    labels = LabelSet("camvid", "sem_seg", tuple(map(str, range(11))), None, 11)
    index = load_pair_index(dicts, labels, cache_dir=str(tmp_path))
    for i, d in enumerate(dicts):
        label = np.array(Image.open(d["sem_seg_file_name"]))
        own = index.images == i
        assert index.shares[own].sum() == pytest.approx((label != 11).mean())
        assert index.classes[own].tolist() == sorted(set(label[label != 11].tolist()))


# ------------------------------------------------------------------------------------------------ bad labels


def refuse(tmp_path: Path, message: str, *opts: Any, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message):
        load_pair_dicts(pair_cfg(tmp_path, *opts))


@pytest.mark.usefixtures("catalog")
def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    dicts = write_labelled(tmp_path / "data", count=3)
    register_pairs("tiny_pairs", dicts)
    label = dicts[1]["sem_seg_file_name"]
    good = np.array(Image.open(label))
    Image.fromarray(np.where(good == 2, 7, good).astype(np.uint8)).save(label)
    refuse(tmp_path, "1_label.png has the class 7, which tiny_pairs does not have: its 3 classes are 0 to 2")
    Image.fromarray(good[:40]).save(label)
    refuse(tmp_path, r"1_label.png of .*1.png: the size is 40 x 64 .* 48 x 64")
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)).save(label)
    refuse(tmp_path, "1_label.png is no label map")
    Path(label).write_bytes(b"no image")
    refuse(tmp_path, "1_label.png: cannot read this label map", error=OSError)
    os.remove(label)
    refuse(tmp_path, "1_label.png", error=FileNotFoundError)
    dicts[1].pop("sem_seg_file_name")
    refuse(tmp_path, r'1 image\(s\) without "sem_seg_file_name".*1.png')
    refuse(tmp_path, r'3 image\(s\) without "annotations"', "INPUT.PAIRS.SOURCE", "instances")


@pytest.mark.usefixtures("catalog")
def test_annotations_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    opts = ("INPUT.PAIRS.SOURCE", "instances")
    dicts = instances(write_labelled(tmp_path / "data", count=1))
    register_pairs("tiny_pairs", dicts, thing_classes=["blob", "bar"])
    good = dicts[0]["annotations"]
    dicts[0]["annotations"] = [{**good[0], "category_id": 2}]
    refuse(tmp_path, "An annotation of .*0.png has the class 2, which tiny_pairs does not have", *opts)
    dicts[0]["annotations"] = [{k: v for k, v in good[0].items() if k != "segmentation"}]
    refuse(tmp_path, "0.png has an annotation without a segmentation", *opts)
    dicts[0] |= {"annotations": good, "width": 99}
    refuse(tmp_path, "The annotations of .*0.png: the size is 48 x 99", *opts)


@pytest.mark.usefixtures("catalog")
@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("INPUT.PAIRS.SOURCE", "boxes"), 'INPUT.PAIRS.SOURCE is "boxes"'),
        (("INPUT.PAIRS.MIN_AREA", 1.0), "INPUT.PAIRS.MIN_AREA is 1.0"),
        (("INPUT.SSL.NUM_VIEWS", 5), "INPUT.SSL.NUM_VIEWS is 5; pairs .* need an even number"),
        (("INPUT.REGIONS.SOURCE", "grid"), 'INPUT.REGIONS.SOURCE is "grid"; pairs .* have no regions'),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, opts: tuple[Any, ...], message: str) -> None:
    register_pairs("tiny_pairs", write_labelled(tmp_path / "data", count=2))
    with pytest.raises(ValueError, match=message):
        build_train_loader(pair_cfg(tmp_path, *opts))


# ------------------------------------------------------------------------------------------------ index and cache


@pytest.fixture
def count_measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images whose labels are read."""
    measured: list[str] = []
    original = pair_index.measure_image

    def counting(dataset_dict: dict[str, Any], labels: LabelSet) -> Any:
        measured.append(dataset_dict["file_name"])
        return original(dataset_dict, labels)

    monkeypatch.setattr(pair_index, "measure_image", counting)
    return measured


LABELS = LabelSet("tiny/pairs", "sem_seg", CLASSES, None, 255)


def test_index_is_measured_once_and_anew_when_the_labels_change(tmp_path: Path, count_measured: list[str]) -> None:
    dicts = write_labelled(tmp_path / "data", count=4)
    cache = tmp_path / "cache"

    def load(labels: LabelSet = LABELS, of: list[dict[str, Any]] = dicts) -> tuple[int, list[int]]:
        count_measured.clear()
        index = load_pair_index(of, labels, cache_dir=str(cache))
        return len(count_measured), index.classes.tolist()

    everything = [0, 1, 0, 1, 2] * 2
    assert load() == (4, everything)
    assert load() == (0, everything)
    assert [p.name for p in cache.iterdir() if p.suffix == ".npz"] == ["tiny_pairs.npz"]
    # The content of a label.
    label = dicts[3]["sem_seg_file_name"]
    changed = np.array(Image.open(label))
    changed[changed == 2] = 0
    Image.fromarray(changed).save(label)
    assert load() == (4, everything[:-1]) and load()[0] == 0
    # Its time alone.
    os.utime(label, ns=(1, 1))
    assert load()[0] == 4 and load()[0] == 0
    # What is ignored, the classes, the images.
    assert load(LabelSet("tiny/pairs", "sem_seg", None, None, None)) == (
        4,
        [*([0, 1, 255, 0, 1, 2, 255]), 0, 1, 255, 0, 1, 255],
    )
    assert load()[0] == 4
    assert load(LabelSet("tiny/pairs", "sem_seg", (*CLASSES, "more"), None, 255))[0] == 4
    assert load(of=dicts[:3])[0] == 3
    # The file.
    (cache / "tiny_pairs.npz").write_bytes(b"half a fi")
    assert load() == (4, everything[:-1]) and load()[0] == 0


def test_index_changes_with_the_annotations(tmp_path: Path, count_measured: list[str]) -> None:
    dicts = instances(write_labelled(tmp_path / "data", count=2))
    labels = LabelSet("tiny", "instances", None, None, None)
    load_pair_index(dicts, labels, cache_dir=str(tmp_path / "cache"))
    moved = [{**a, "segmentation": [[1, 1, 30, 1, 30, 30]]} for a in dicts[0]["annotations"]]
    load_pair_index([{**dicts[0], "annotations": moved}, dicts[1]], labels, cache_dir=str(tmp_path / "cache"))
    assert len(count_measured) == 4
    masks = np.zeros((2, HEIGHT, WIDTH), dtype=np.uint8)
    masks[:, 20:30, 20:30] = 1
    masks[1, 25, 25] = 0
    for mask in masks:  # one pixel in the middle, which is not in the text of an array
        annotated = {**dicts[0], "annotations": [{**dicts[0]["annotations"][0], "segmentation": mask}]}
        index = load_pair_index([annotated], labels, cache_dir=str(tmp_path / "cache"))
        assert index.shares.tolist() == [mask.sum() / AREA]


def test_unreadable_image_is_left_to_the_loader(tmp_path: Path) -> None:
    """It replaces and counts it."""
    dicts = write_labelled(tmp_path / "data", count=2)
    Path(dicts[0]["file_name"]).write_bytes(b"")
    index = load_pair_index(dicts, LABELS, cache_dir=str(tmp_path / "cache"))
    assert index.images.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.slow
def test_several_processes_measure_the_same(tmp_path: Path) -> None:
    dicts = write_labelled(tmp_path / "data", count=5)
    alone = load_pair_index(dicts, LABELS, cache_dir=str(tmp_path / "a"))
    together = load_pair_index(dicts, LABELS, cache_dir=str(tmp_path / "b"), num_workers=2)
    for name in ("images", "classes", "is_instance", "shares"):
        a, b = getattr(alone, name), getattr(together, name)
        assert a.dtype == b.dtype and (a == b).all(), name


def load_at_once(dicts: list[dict[str, Any]], cache: str) -> int:
    load_pair_index(dicts, LABELS, cache_dir=cache)
    return os.stat(os.path.join(cache, "tiny_pairs.npz")).st_mtime_ns


@pytest.mark.slow
def test_one_of_several_processes_measures(tmp_path: Path) -> None:
    dicts = write_labelled(tmp_path / "data")
    first, second = run_in_processes(load_at_once, dicts, str(tmp_path / "cache"))
    assert first == second


# ------------------------------------------------------------------------------------------------ views


def make_mapper(folder: Path, *opts: Any) -> PairDatasetMapper:
    return PairDatasetMapper(pair_cfg(folder, *opts), True)


PLAIN = ("INPUT.SSL.COLOR_JITTER_PROB", 0.0, "INPUT.SSL.GRAYSCALE_PROB", 0.0, "INPUT.SSL.BLUR_PROB", [0.0])
PLAIN += ("INPUT.SSL.SOLARIZE_PROB", [0.0])


def test_views_of_both_members_share_crop_and_flip(tmp_path: Path) -> None:
    """A ramp of coordinates: where a pixel is not black it tells where it comes from."""
    d = write_labelled(tmp_path, count=1)[0]
    ramp = np.full((HEIGHT, WIDTH, 3), 200, dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = 40 + 3 * np.arange(WIDTH), 40 + 3 * np.arange(HEIGHT)[:, None]
    Image.fromarray(ramp).save(d["file_name"])
    mapper = make_mapper(tmp_path, *PLAIN)
    np.random.seed(0)
    num_flipped = num_both = 0
    for _ in range(20):
        mapped = mapper({**d, "pair_class": 1})
        assert (mapped["height"], mapped["width"], mapped["file_name"]) == (HEIGHT, WIDTH, d["file_name"])
        views = mapped["views"]
        assert len(views) == 6
        for anchor, other in zip(views[:3], views[3:], strict=True):
            assert torch.equal(anchor["crop_box"], other["crop_box"]) and anchor["hflip"] == other["hflip"]
            a, b = anchor["image"].numpy().astype(int), other["image"].numpy().astype(int)
            whole = a + b  # of which bicubic resizing leaves edges that over- and undershoot
            seen = (a[2] > 195) | (b[2] > 195)
            x0, y0, x1, y1 = anchor["crop_box"].tolist()
            xs = x0 + (np.arange(64) + 0.5) * (x1 - x0) / 64 - 0.5
            ys = y0 + (np.arange(64) + 0.5) * (y1 - y0) / 64 - 0.5
            xs = xs[::-1] if anchor["hflip"] else xs
            inner = seen & ((a[2] < 2) | (b[2] < 2))
            assert np.abs(whole[0] - (40 + 3 * xs[None]))[inner].max() < 20
            assert np.abs(whole[1] - (40 + 3 * ys[:, None]))[inner].max() < 20
            num_flipped += anchor["hflip"]
            num_both += (a[2] > 195).any() and (b[2] > 195).any()
        assert not torch.equal(views[0]["crop_box"], views[1]["crop_box"])
    assert 10 < num_flipped < 50 and num_both > 10


def test_whole_image_is_cut_pixel_by_pixel(tmp_path: Path) -> None:
    """With crops of the whole image at its own size the views are the members themselves."""
    d = write_labelled(tmp_path, count=1, size=(64, 64))[0]
    whole = ("INPUT.SSL.CROP_SCALE", (1.0, 1.0), "INPUT.SSL.CROP_RATIO", (1.0, 1.0), "INPUT.SSL.FLIP_PROB", 0.0)
    views = make_mapper(tmp_path, *PLAIN, *whole)({**d, "pair_class": 1})["views"]
    image, label = (np.array(Image.open(d[k])) for k in ("file_name", "sem_seg_file_name"))
    anchor, not_anchor = compose_pair(image, label == 1)
    for v in range(3):
        assert (views[v]["image"].permute(1, 2, 0).numpy() == anchor).all()
        assert (views[3 + v]["image"].permute(1, 2, 0).numpy() == not_anchor).all()


def test_decisions_are_shared_and_strengths_are_not() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.random.seed(0)
    for augmentation in (ColorJitter(0.4, 0.4, 0.2, 0.1, 0.5), RandomGaussianBlur(0.5), RandomGrayscale(0.5)):
        outcomes = []
        for _ in range(40):
            a, b = augment_pair([image, image], [augmentation])
            outcomes.append(((a != image).any(), (b != image).any()))
            if isinstance(augmentation, RandomGrayscale):
                assert (a == b).all()
            elif outcomes[-1][0]:
                assert (a != b).any(), augmentation
        assert set(outcomes) == {(True, True), (False, False)}, augmentation
        assert augmentation.prob == 0.5


def test_probabilities_are_those_of_one_members_views(tmp_path: Path) -> None:
    mapper = make_mapper(tmp_path, "INPUT.SSL.BLUR_PROB", [1.0, 0.1, 0.3], "INPUT.SSL.SOLARIZE_PROB", [0.0, 0.2])
    blur, solarize = ([view[i].prob for view in mapper.view_augmentations] for i in (2, 3))
    assert blur == [1.0, 0.1, 0.3] * 2 and solarize == [0.0, 0.2, 0.2] * 2


@pytest.mark.usefixtures("catalog")
def test_loader_counts_pairs_and_batches_six_views(tmp_path: Path) -> None:
    register_pairs("tiny_pairs", write_labelled(tmp_path / "data"))
    loader = build_train_loader(pair_cfg(tmp_path))
    assert loader.num_images == 9, "an epoch is nine pairs"
    batch = next(iter(loader))
    assert len(batch.views) == 6 and batch.views[5].images.shape == (2, 3, 64, 64)
    again = next(iter(build_train_loader(pair_cfg(tmp_path))))
    assert all(torch.equal(a.images, b.images) for a, b in zip(batch.views, again.views, strict=True))


@pytest.mark.usefixtures("catalog")
def test_pair_of_annotations_becomes_views(tmp_path: Path) -> None:
    register_pairs("tiny_pairs", instances(write_labelled(tmp_path / "data")), thing_classes=["blob", "bar"])
    cfg = pair_cfg(tmp_path, "INPUT.PAIRS.SOURCE", "instances", *PLAIN)
    pair = load_pair_dicts(cfg)[0]
    batch = collate_views([PairDatasetMapper(cfg, True)(pair)])
    shown = [(view.images > 0).any(dim=1).float().mean().item() for view in batch.views]
    assert all(a < 0.5 < b for a, b in zip(shown[:3], shown[3:], strict=True))


def test_label_maps_that_a_list_names(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maps").mkdir()
    for name in ("2007_000032", "2007_000039"):
        (tmp_path / "maps" / f"{name}.png").touch()
    (tmp_path / "list.txt").write_text("2007_000032\n2007_000039\n")
    dicts = load_listed_label_maps(str(tmp_path / "list.txt"), "images", "maps")
    assert [d["sem_seg_file_name"] for d in dicts] == ["maps/2007_000032.png", "maps/2007_000039.png"]
    assert dicts[1]["file_name"] == "images/2007_000039.jpg" and dicts[1]["image_id"] == "2007_000039"
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(ValueError, match="names no image"):
        load_listed_label_maps(str(tmp_path / "list.txt"), "images", "maps")
