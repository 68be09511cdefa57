"""Synthetic scenes: deterministic, correctly labelled in all formats, not separable by colour, generated atomically."""

import importlib.util
import itertools
import json
import logging
import multiprocessing
import os
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances, read_image
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from d2_objssl.data import scene_labels, scenes
from d2_objssl.data.scene_labels import mask_to_polygons
from d2_objssl.data.scenes import PRESETS, SHAPES, generate_scenes, register_scenes, render_scene

SIZE = (64, 96)
NUM_IMAGES = 6
SEED = 3
SETTINGS: dict[str, Any] = {"num_images": NUM_IMAGES, "size": SIZE, "seed": SEED}
TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_scenes.py"


@pytest.fixture(autouse=True, scope="module")
def one_opencv_thread():
    """Forked children cannot use the parent's OpenCV threads."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    yield
    cv2.setNumThreads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One generated split, for tests that only read it."""
    return generate_scenes(tmp_path_factory.mktemp("scenes") / "split", **SETTINGS)


@pytest.fixture(scope="module")
def many_scenes() -> list[scenes.Scene]:
    return [render_scene(21, i, (128, 128)) for i in range(240)]


@pytest.fixture
def registered(tmp_path: Path):
    """The name of a split that is registered below `tmp_path` for the length of a test."""
    name = "scenes_of_a_test"
    register_scenes(name, **SETTINGS, root=str(tmp_path))
    yield name
    for suffix in ("", "_sem_seg", "_voc"):
        DatasetCatalog.remove(name + suffix)
        MetadataCatalog.remove(name + suffix)


def read_tree(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def leftovers(parent: Path) -> list[str]:
    return [f.name for f in parent.iterdir() if "partial" in f.name]


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_scenes", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Determinism


def test_two_runs_write_the_same_bytes(folder: Path, tmp_path: Path):
    again = read_tree(generate_scenes(tmp_path / "again", **SETTINGS))
    assert again == read_tree(folder)
    assert len([name for name in again if name.startswith("images/")]) == NUM_IMAGES


def test_a_scene_depends_neither_on_count_nor_on_order(folder: Path, tmp_path: Path):
    fewer = generate_scenes(tmp_path / "fewer", num_images=2, size=SIZE, seed=SEED)
    for name, content in read_tree(fewer).items():
        if not name.endswith((".json", ".txt")):
            assert (folder / name).read_bytes() == content, name
    annotations = [
        json.loads((f / "annotations" / "instances.json").read_text())["annotations"] for f in (fewer, folder)
    ]
    assert annotations[0] == [a for a in annotations[1] if a["image_id"] < 2]
    backwards = [render_scene(SEED, i, SIZE).image for i in reversed(range(4))]
    forwards = [render_scene(SEED, i, SIZE).image for i in range(4)]
    assert all(np.array_equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))


@pytest.mark.slow  # each worker imports the package
def test_worker_processes_write_the_same_bytes(folder: Path, tmp_path: Path):
    assert read_tree(generate_scenes(tmp_path / "parallel", **SETTINGS, num_workers=2)) == read_tree(folder)


def test_seeds_are_disjoint_splits():
    images = {render_scene(seed, i, (32, 32)).image.tobytes() for seed in range(8) for i in range(8)}
    assert len(images) == 64


def test_preset_seeds_differ():
    assert len({seed for _, _, seed in PRESETS.values()}) == len(PRESETS)


# Content


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (150, 70)])
def test_masks_are_the_visible_pixels_and_boxes_are_tight(size: tuple[int, int]):
    for i in range(30):
        scene = render_scene(5, i, size)
        assert scene.image.shape == (*size, 3) and scene.image.dtype == np.uint8
        for k, (mask, box) in enumerate(zip(scene.masks, scene.boxes, strict=True)):
            hidden = scene.amodal_masks[k + 1 :].any(0)  # later objects are in front
            assert np.array_equal(mask, scene.amodal_masks[k] & ~hidden)
            assert mask.sum() >= 0.5 * scene.amodal_masks[k].sum() > 0
            y, x = np.nonzero(mask)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert (scene.sem_seg[mask] == scene.category_ids[k]).all()
        assert np.array_equal(scene.sem_seg > 0, scene.amodal_masks.any(0))


def test_objects_overlap_by_a_quarter_at_most(many_scenes: list[scenes.Scene]):
    overlaps = [
        (a & b).sum() / min(a.sum(), b.sum())
        for scene in many_scenes
        for a, b in itertools.combinations(scene.amodal_masks, 2)
    ]
    assert 0.2 < max(overlaps) <= 0.25


def test_scenes_hold_two_to_six_objects_of_every_shape_and_scale(many_scenes: list[scenes.Scene]):
    assert {len(scene.category_ids) for scene in many_scenes} == {2, 3, 4, 5, 6}
    shares = np.bincount(np.concatenate([scene.category_ids for scene in many_scenes]), minlength=len(SHAPES) + 1)
    assert shares[0] == 0 and (shares[1:] > 0.12 * shares.sum()).all()  # 1/6 each is expected
    sides = np.concatenate([(s.boxes[:, 2:] - s.boxes[:, :2]).max(1) for s in many_scenes])
    assert sides.min() < 20 and sides.max() > 50


def test_objects_stand_out_exactly_where_their_masks_are(many_scenes: list[scenes.Scene]):
    def contrast(image: np.ndarray, mask: np.ndarray, others: np.ndarray) -> float:
        around = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool) & ~mask & ~others
        return float(np.linalg.norm(image[mask].mean(0) - image[around].mean(0)))

    at_mask, elsewhere = [], []
    for scene in many_scenes:
        for mask in scene.masks:
            others = (scene.instance_map > 0) & ~mask
            at_mask.append(contrast(scene.image.astype(float), mask, others))
            mirrored = mask[::-1, ::-1]
            elsewhere.append(contrast(scene.image.astype(float), mirrored, np.zeros_like(mask)))
    assert min(at_mask) > 30  # grey levels
    assert np.median(at_mask) > 4 * np.median(elsewhere)


def test_classes_are_not_separable_by_colour(many_scenes: list[scenes.Scene]):
    """A nearest-centroid classifier on the mean and deviation of colour stays within 3 sigma of chance (1/6)."""
    pixels = [(c, s.image[mask]) for s in many_scenes for c, mask in zip(s.category_ids, s.masks, strict=True)]
    labels = np.array([c for c, _ in pixels])
    features = np.array([np.concatenate([p.mean(0), p.std(0)]) for _, p in pixels])
    features = (features - features.mean(0)) / features.std(0)
    half = len(labels) // 2
    centroids = np.array([features[:half][labels[:half] == c].mean(0) for c in range(1, len(SHAPES) + 1)])
    guesses = 1 + np.linalg.norm(features[half:, None] - centroids, axis=2).argmin(1)
    chance = 1 / len(SHAPES)
    assert (guesses == labels[half:]).mean() < chance + 3 * np.sqrt(chance * (1 - chance) / half)


# Labels


def test_coco_api_reads_back_the_masks(folder: Path):
    coco = COCO(str(folder / "annotations" / "instances.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(SHAPES)
    assert min(coco.anns) > 0  # COCOeval takes 0 for "no match"
    for i in range(NUM_IMAGES):
        scene = render_scene(SEED, i, SIZE)
        annotations = coco.imgToAnns[i]
        assert [a["category_id"] for a in annotations] == scene.category_ids.tolist()
        for annotation, mask, box in zip(annotations, scene.masks, scene.boxes, strict=True):
            assert np.array_equal(coco.annToMask(annotation), mask)
            assert annotation["area"] == mask.sum() and annotation["iscrowd"] == 0
            assert BoxMode.convert(annotation["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) == box.tolist()


def test_jpegs_show_the_scenes(folder: Path):
    drawn = np.array([render_scene(SEED, i, SIZE).image for i in range(NUM_IMAGES)], float)
    read = np.array([read_image(str(folder / "images" / f"{i:06d}.jpg"), "RGB") for i in range(NUM_IMAGES)], float)
    assert np.abs(read - drawn).mean() < 0.25 * np.abs(read[..., ::-1] - drawn).mean()  # red stays red


def test_panoptic_and_semantic_maps_agree_with_the_instances(folder: Path):
    panoptic = json.loads((folder / "annotations" / "panoptic.json").read_text())
    assert [c["isthing"] for c in panoptic["categories"]] == [1] * len(SHAPES) + [0]
    for i, annotation in enumerate(panoptic["annotations"]):
        scene = render_scene(SEED, i, SIZE)
        colours = read_image(str(folder / "panoptic" / annotation["file_name"]), "RGB").astype(int)
        ids = colours @ (1, 256, 256**2)
        sem_seg = np.asarray(Image.open(folder / "sem_seg" / f"{i:06d}.png"))
        assert sem_seg.dtype == np.uint8 and np.array_equal(sem_seg, scene.sem_seg)
        background, *objects = annotation["segments_info"]
        assert set(np.unique(ids)) == {s["id"] for s in annotation["segments_info"]}
        assert np.array_equal(ids == background["id"], sem_seg == 0) and background["category_id"] == len(SHAPES) + 1
        for segment, mask, box in zip(objects, scene.masks, scene.boxes, strict=True):
            assert np.array_equal(ids == segment["id"], mask) and segment["area"] == mask.sum()
            assert (sem_seg[mask] == segment["category_id"]).all()
            assert BoxMode.convert(segment["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) == box.tolist()


def test_polygons_of_masks_with_holes_and_specks_are_exact():
    rng = np.random.default_rng(0)
    ring = np.zeros((9, 11), bool)
    ring[1:8, 2:9] = True
    ring[3:6, 4:7] = False
    masks = [ring, np.ones((3, 4), bool), np.eye(5, dtype=bool)]
    masks += [rng.random((12, 17)) < density for density in np.linspace(0.1, 0.95, 40)]
    for mask in masks:
        polygons = mask_to_polygons(mask)
        decoded = mask_util.decode(mask_util.merge(mask_util.frPyObjects(polygons, *mask.shape)))
        assert np.array_equal(decoded, mask)
    assert mask_to_polygons(np.ones((3, 4), bool)) == [[0, 0, 0, 3, 4, 3, 4, 0]]  # corners only


# Catalog


def test_catalog_generates_on_first_use_and_all_formats_agree(registered: str, tmp_path: Path):
    assert not any(tmp_path.iterdir())  # registering is cheap
    before = {s: MetadataCatalog.get(registered + s).as_dict() for s in ("", "_sem_seg", "_voc")}
    dicts = DatasetCatalog.get(registered)
    voc = DatasetCatalog.get(registered + "_voc")
    sem_seg = DatasetCatalog.get(registered + "_sem_seg")
    assert {s: MetadataCatalog.get(registered + s).as_dict() for s in before} == before
    assert [m["evaluator_type"] for m in before.values()] == ["coco", "sem_seg", "pascal_voc"]
    assert before["_sem_seg"]["stuff_classes"] == ["background", *SHAPES] and before["_sem_seg"]["ignore_label"] == 255
    assert len(dicts) == len(voc) == len(sem_seg) == NUM_IMAGES
    for i, (a, b, c) in enumerate(zip(dicts, voc, sem_seg, strict=True)):
        scene = render_scene(SEED, i, SIZE)
        assert (a["height"], a["width"]) == (b["height"], b["width"]) == SIZE
        assert Path(a["file_name"]).resolve() == Path(b["file_name"]).resolve() == Path(c["file_name"]).resolve()
        assert Path(c["sem_seg_file_name"]).stem == Path(a["file_name"]).stem
        for annotations in (a["annotations"], b["annotations"]):
            boxes = [BoxMode.convert(o["bbox"], o["bbox_mode"], BoxMode.XYXY_ABS) for o in annotations]
            assert np.array_equal(boxes, scene.boxes)
            assert [o["category_id"] + 1 for o in annotations] == scene.category_ids.tolist()


def test_default_mask_format_of_detectron2_takes_the_annotations(registered: str):
    record = DatasetCatalog.get(registered)[0]
    instances = annotations_to_instances(record["annotations"], SIZE, mask_format="polygon")
    assert len(instances.gt_masks) == len(render_scene(SEED, 0, SIZE).category_ids)


def test_voc_evaluator_gives_the_ground_truth_full_marks(registered: str):
    records = DatasetCatalog.get(registered + "_voc")
    evaluator = PascalVOCDetectionEvaluator(registered + "_voc")
    evaluator.reset()
    for record in records:
        instances = Instances(SIZE)
        instances.pred_boxes = Boxes(torch.tensor([a["bbox"] for a in record["annotations"]]))
        instances.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        instances.scores = torch.ones(len(instances))
        evaluator.process([record], [{"instances": instances}])
    present = {a["category_id"] for record in records for a in record["annotations"]}
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100 * len(present) / len(SHAPES))


def test_presets_are_in_the_catalog():
    assert {name + suffix for name in PRESETS for suffix in ("", "_sem_seg", "_voc")} <= set(DatasetCatalog.list())
    dicts = DatasetCatalog.get("scenes_tiny_val")
    assert len(dicts) == 8 and os.environ["DETECTRON2_DATASETS"] in dicts[0]["file_name"]


def test_a_registered_name_is_refused(registered: str):
    with pytest.raises(ValueError, match=registered):
        register_scenes(registered, **SETTINGS)


# Generation


def test_two_processes_at_once_generate_once(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    target, log = tmp_path / "split", tmp_path / "log"

    def generate() -> None:
        logger = logging.getLogger("d2_objssl")
        logger.addHandler(logging.FileHandler(log))
        logger.setLevel(logging.INFO)
        barrier.wait()
        generate_scenes(target, num_images=30, size=SIZE, seed=SEED)
        assert len(list((target / "images").iterdir())) == 30

    processes = [context.Process(target=generate) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert log.read_text().count("Generating 30 scenes") == 1
    assert read_tree(target) == read_tree(generate_scenes(tmp_path / "alone", num_images=30, size=SIZE, seed=SEED))
    assert not leftovers(tmp_path)


def test_a_killed_generator_leaves_nothing_that_is_accepted(tmp_path: Path, folder: Path):
    target = tmp_path / "split"
    endless = {"num_images": 10**6, "size": SIZE, "seed": SEED}
    process = multiprocessing.get_context("fork").Process(target=generate_scenes, args=(target,), kwargs=endless)
    process.start()
    try:
        while process.is_alive() and not list(tmp_path.glob("**/images/000002.jpg")):
            time.sleep(0.01)
    finally:
        process.kill()
        process.join()
    assert not target.exists() and leftovers(tmp_path)
    assert read_tree(generate_scenes(target, **SETTINGS)) == read_tree(folder)
    assert not leftovers(tmp_path)


def test_an_interrupted_generator_tidies_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(seed: int, index: int, size: tuple[int, int]) -> scenes.Scene:
        if index == 2:
            raise KeyboardInterrupt
        return render_scene(seed, index, size)

    monkeypatch.setattr(scene_labels, "render_scene", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate_scenes(tmp_path / "split", **SETTINGS)
    assert not (tmp_path / "split").exists() and not leftovers(tmp_path)


def test_a_complete_folder_is_kept(folder: Path):
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*")}
    assert generate_scenes(folder, **SETTINGS) == folder
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("*")} == before


def test_an_empty_folder_is_filled(tmp_path: Path):
    assert (generate_scenes(tmp_path, num_images=1, size=SIZE, seed=SEED) / "images" / "000000.jpg").is_file()


@pytest.mark.parametrize(
    "other",
    [{"num_images": 7}, {"size": (96, 64)}, {"seed": 4}, {"labels": ("instances",)}],
    ids=lambda o: next(iter(o)),
)
def test_other_settings_are_refused_naming_the_folder(folder: Path, other: dict):
    with pytest.raises(ValueError, match=rf"{folder}.*{next(iter(other))} is"):
        generate_scenes(folder, **{**SETTINGS, **other})


@pytest.mark.parametrize("manifest", [None, "", "[]", '{"scenes": 1}', '{"scenes": {}}'])
def test_a_foreign_folder_is_never_touched(tmp_path: Path, manifest: str | None):
    (tmp_path / "photo.jpg").write_bytes(b"precious")
    if manifest is not None:
        (tmp_path / "scenes.json").write_text(manifest)
    before = read_tree(tmp_path)
    with pytest.raises(ValueError, match=str(tmp_path)):
        generate_scenes(tmp_path, **SETTINGS)
    assert read_tree(tmp_path) == before


def test_a_damaged_folder_is_refused(tmp_path: Path):
    target = generate_scenes(tmp_path / "split", num_images=2, size=SIZE, seed=SEED)
    image = target / "images" / "000000.jpg"
    image.write_bytes(image.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"000000\.jpg"):
        generate_scenes(target, num_images=2, size=SIZE, seed=SEED)
    image.unlink()
    with pytest.raises(ValueError, match=r"000000\.jpg"):
        generate_scenes(target, num_images=2, size=SIZE, seed=SEED)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_images": 0}, "num_images is 0"),
        ({"num_images": -3}, "num_images is -3"),
        ({"size": (31, 64)}, r"size is \(31, 64\)"),
        ({"size": (64,)}, r"size is \(64,\)"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"labels": ("keypoints",)}, "keypoints"),
        ({"num_workers": -1}, "num_workers is -1"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        generate_scenes(tmp_path / "split", **{**SETTINGS, **wrong})
    assert not any(tmp_path.iterdir())


def test_an_unwritable_place_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "split"
    with pytest.raises(ValueError, match=str(target)):
        generate_scenes(target, **SETTINGS)


def test_labels_can_be_left_out(tmp_path: Path):
    target = generate_scenes(tmp_path / "split", **SETTINGS, labels=())
    assert {name.split("/")[0] for name in read_tree(target)} == {"images", "scenes.json"}


def test_long_generation_logs_an_eta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(scenes, "LOG_PERIOD_S", -1.0)
    logger = logging.getLogger("d2_objssl")
    monkeypatch.setattr(logger, "propagate", True)  # Detectron2's setup_logger may have turned it off
    with caplog.at_level(logging.INFO, logger="d2_objssl"):
        generate_scenes(tmp_path / "split", **SETTINGS)
    assert f"3 of {NUM_IMAGES} scenes, ETA" in caplog.text


# Tool


def test_tool_writes_scenes_and_a_preview(tmp_path: Path, folder: Path):
    target, preview = tmp_path / "split", tmp_path / "preview.png"
    arguments = (
        f"--output {target} --num-images {NUM_IMAGES} --size {SIZE[0]}x{SIZE[1]} --seed {SEED} --preview {preview}"
    )
    load_tool().main(arguments.split())
    assert read_tree(target) == read_tree(folder)
    assert Image.open(preview).size == (6 * 384, 256)


@pytest.mark.parametrize(
    "arguments", ["", "--output x --size 12y", "--output x --size 1x2x3", "--output x --num-images 0"]
)
def test_tool_refuses_bad_arguments(arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        load_tool().main(arguments.split())
    assert error.value.code not in (0, None)
    assert not any(tmp_path.iterdir())


def test_tool_help_has_an_example(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        load_tool().main(["--help"])
    assert "python tools/make_scenes.py --output" in capsys.readouterr().out
