"""Pictures: what is drawn where, stable colours, files that are whole, and tools/visualize.py."""

import importlib.util
import stat
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from d2_objssl.detection_drawing import draw_detections, draw_ground_truth
from d2_objssl.structures import ViewBatch
from d2_objssl.visualization import (
    TILE_SIZE,
    contact_sheet,
    draw_pairs,
    draw_regions,
    draw_views,
    overlay_region_map,
    plot_curves,
    region_colors,
    save_png,
)

REPO_ROOT = Path(__file__).resolve().parent.parent
# Layout of a contact sheet, written down independently: margin, gap, caption.
MARGIN, GAP, CAPTION = 14, 10, 20
YELLOW = (255, 225, 30)


def smooth_image(height: int = 300, width: int = 400, seed: int = 0) -> np.ndarray:
    """An image without symmetry, smooth enough to be compared across resolutions."""
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


def make_view(image: np.ndarray, boxes: list[list[int]], hflip: list[bool], size: int = TILE_SIZE) -> ViewBatch:
    crops = []
    for (x0, y0, x1, y1), flip in zip(boxes, hflip, strict=True):
        crop = cv2.resize(image[y0:y1, x0:x1], (size, size), interpolation=cv2.INTER_AREA)
        crops.append(torch.from_numpy(np.ascontiguousarray(crop[:, ::-1] if flip else crop)).permute(2, 0, 1))
    return ViewBatch(torch.stack(crops), torch.tensor(boxes, dtype=torch.float32), torch.tensor(hflip))


def tile(sheet: torch.Tensor | np.ndarray, row: int, column: int) -> np.ndarray:
    """The picture in one cell of a sheet of captioned tiles."""
    array = sheet.permute(1, 2, 0).numpy() if isinstance(sheet, torch.Tensor) else sheet
    y = MARGIN + row * (CAPTION + TILE_SIZE + GAP) + CAPTION
    x = MARGIN + column * (TILE_SIZE + GAP)
    return array[y : y + TILE_SIZE, x : x + TILE_SIZE]


def mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).mean())


def box_of_color(image: np.ndarray, color: tuple[int, int, int]) -> tuple[int, ...]:
    """XYXY of the pixels that have this very colour."""
    y, x = np.nonzero((image == np.array(color)).all(axis=-1))
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


# ---------------------------------------------------------------------------------------------- draw_views


def test_draw_views_is_an_uint8_tensor_of_the_layout() -> None:
    view = make_view(smooth_image(), [[0, 0, 200, 200]] * 3, [False] * 3)
    sheet = draw_views([view, view], num_images=2)
    height = 2 * MARGIN + 2 * (CAPTION + TILE_SIZE) + GAP
    width = 2 * MARGIN + 4 * TILE_SIZE + 3 * GAP
    assert sheet.shape == (3, height, width)
    assert sheet.dtype == torch.uint8 and sheet.is_contiguous()


def test_draw_views_shows_fewer_images_than_asked_for() -> None:
    view = make_view(smooth_image(), [[0, 0, 200, 200]], [False])
    assert draw_views([view, view], num_images=4).shape[1] == 2 * MARGIN + CAPTION + TILE_SIZE


@pytest.mark.parametrize(
    ("flip", "expected"),
    [(False, (TILE_SIZE // 2, TILE_SIZE // 4, TILE_SIZE, TILE_SIZE)), (True, (0, TILE_SIZE // 4, TILE_SIZE // 2, 224))],
)
def test_overlap_box_is_drawn_around_the_shared_area(flip: bool, expected: tuple[int, ...]) -> None:
    image = np.zeros((300, 400, 3), dtype=np.uint8)
    first = make_view(image, [[0, 0, 200, 200]], [flip])
    second = make_view(image, [[100, 50, 300, 250]], [False])
    drawn = tile(draw_views([first, second]), 0, 0)
    x0, y0, x1, y1 = box_of_color(drawn, YELLOW)
    # One black pixel lies outside the colour.
    assert (x0 - 1, y0 - 1, x1 + 1, y1 + 1) == expected
    assert not drawn[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3].any(), "the inside is left as it was"


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
def test_aligned_overlaps_look_alike(flips: tuple[bool, bool]) -> None:
    image = smooth_image()
    first = make_view(image, [[20, 10, 220, 210]], [flips[0]])
    second = make_view(image, [[100, 60, 340, 280]], [flips[1]])
    sheet = draw_views([first, second])
    in_first, in_second = tile(sheet, 0, 2), tile(sheet, 0, 3)
    shared = cv2.resize(image[60:210, 100:220], (TILE_SIZE, TILE_SIZE), interpolation=cv2.INTER_LINEAR)
    assert mean_difference(in_first, in_second) < 2
    assert mean_difference(in_first, shared) < 2
    assert mean_difference(in_first, in_second[:, ::-1]) > 20, "the image has no symmetry that would hide a flip"


def test_pair_without_overlap_is_marked() -> None:
    image = smooth_image()
    first = make_view(image, [[0, 0, 100, 100], [0, 0, 200, 200]], [False, True])
    second = make_view(image, [[390, 290, 400, 300], [100, 100, 300, 300]], [False, False])
    sheet = draw_views([first, second])
    untouched = first.images[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(tile(sheet, 0, 0), untouched)
    assert (tile(sheet, 0, 2) == 225).all() and (tile(sheet, 0, 3) == 225).all(), "light grey"
    assert len(np.unique(tile(sheet, 1, 2))) > 50, "the other pair is drawn"


def test_captions_tell_flipped_views() -> None:
    image = smooth_image()
    plain, flipped = (draw_views([make_view(image, [[0, 0, 90, 90]], [f])] * 2).numpy() for f in (False, True))
    head = (slice(None), slice(MARGIN, MARGIN + CAPTION), slice(MARGIN, MARGIN + TILE_SIZE))
    ink = [int((sheet[head] < 128).sum()) for sheet in (plain, flipped)]
    assert 0 < ink[0] < ink[1], '"view 1" and "view 1, flipped"'


def test_three_views_are_paired_with_the_first() -> None:
    image = smooth_image()
    boxes = [[20, 10, 220, 210], [100, 60, 340, 280], [0, 100, 180, 290]]
    sheet = draw_views([make_view(image, [box], [flip]) for box, flip in zip(boxes, [True, False, True], strict=True)])
    for column, (x0, y0, x1, y1) in ((3, (100, 60, 220, 210)), (5, (20, 100, 180, 210))):
        shared = cv2.resize(image[y0:y1, x0:x1], (TILE_SIZE, TILE_SIZE), interpolation=cv2.INTER_LINEAR)
        assert mean_difference(tile(sheet, 0, column), shared) < 2
        assert mean_difference(tile(sheet, 0, column + 1), shared) < 2


def test_single_view_and_small_views_are_drawn() -> None:
    view = make_view(smooth_image(), [[0, 0, 200, 200]], [False], size=32)
    assert draw_views([view]).shape == (3, 2 * MARGIN + CAPTION + TILE_SIZE, 2 * MARGIN + TILE_SIZE)


def test_drawing_leaves_the_batch_and_the_random_state_alone() -> None:
    view = make_view(smooth_image(), [[0, 0, 200, 200], [10, 10, 90, 90]], [False, True])
    images, state, numpy_state = view.images.clone(), torch.get_rng_state(), np.random.get_state()[1].copy()
    maps = torch.zeros(2, 7, 7, dtype=torch.int64)
    draw_views([view, view])
    draw_regions([view, view], [maps, maps])
    assert torch.equal(view.images, images) and torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


@pytest.mark.gpu
def test_views_on_a_gpu_give_the_same_picture() -> None:
    view = make_view(smooth_image(), [[0, 0, 200, 200]], [True])
    maps = torch.arange(49).view(1, 7, 7)
    moved, gpu_maps = view.to("cuda"), maps.cuda()
    assert torch.equal(draw_views([moved, moved]), draw_views([view, view]))
    assert torch.equal(draw_regions([moved], [gpu_maps]), draw_regions([view], [maps]))


# ---------------------------------------------------------------------------------------------- regions


def test_region_colors_are_stable() -> None:
    colors = region_colors(256)
    assert colors.shape == (256, 3) and colors.dtype == np.uint8
    np.testing.assert_array_equal(region_colors(5), colors[:5])
    # Recorded: an id has the same colour in every run, on every machine.
    assert colors[:4].tolist() == [[255, 225, 30], [90, 0, 255], [0, 195, 255], [255, 0, 105]]
    assert region_colors(0).shape == (0, 3) and region_colors(2000).shape == (2000, 3)


@pytest.mark.parametrize(("num", "distance"), [(16, 40), (64, 20), (256, 10)])
def test_region_colors_are_distinguishable(num: int, distance: float) -> None:
    lab = cv2.cvtColor(region_colors(num)[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    assert distances[~np.eye(num, dtype=bool)].min() > distance


def test_overlay_blends_colors_and_separates_regions() -> None:
    image = np.full((8, 8, 3), 100, dtype=np.uint8)
    region_map = np.zeros((8, 8), dtype=np.int64)
    region_map[:, 4:] = 7
    overlay = overlay_region_map(image, region_map, alpha=0.5)
    colors = region_colors(8).astype(np.float64)
    np.testing.assert_array_equal(overlay[0, 0], np.rint(50 + colors[0] / 2))
    np.testing.assert_array_equal(overlay[0, 7], np.rint(50 + colors[7] / 2))
    assert (overlay[:, 4] == 255).all() and not (overlay[:, [3, 5]] == 255).all(axis=-1).any(), "one pixel of border"
    assert (image == 100).all()


def test_overlay_resizes_a_map_to_the_nearest_cell() -> None:
    image = np.zeros((10, 15, 3), dtype=np.uint8)
    cells = np.arange(6).reshape(2, 3)
    whole = overlay_region_map(image, cells.repeat(5, axis=0).repeat(5, axis=1))
    np.testing.assert_array_equal(overlay_region_map(image, cells), whole)


def test_overlay_leaves_negative_ids_uncolored() -> None:
    image = smooth_image(20, 20)
    np.testing.assert_array_equal(overlay_region_map(image, np.full((20, 20), -1)), image)


def test_draw_regions_gives_an_id_one_color_in_all_views() -> None:
    black = np.zeros((300, 400, 3), dtype=np.uint8)
    views = [make_view(black, [[0, 0, 90, 90]] * 2, [False, True]) for _ in range(2)]
    maps = [torch.tensor([0, 40, 3, 3]).view(1, 2, 2).repeat(2, 1, 1), torch.full((2, 2, 2), 40)]
    sheet = draw_regions(views, maps, num_images=2)
    assert sheet.shape == (3, 2 * MARGIN + 2 * (CAPTION + TILE_SIZE) + GAP, 2 * MARGIN + 4 * TILE_SIZE + 3 * GAP)
    expected = np.rint(region_colors(41)[40] / 2)
    np.testing.assert_array_equal(tile(sheet, 1, 1)[10, -10], expected)
    np.testing.assert_array_equal(tile(sheet, 1, 3)[10, 10], expected)
    assert not tile(sheet, 0, 0).any(), "the view itself stands beside it"


# ---------------------------------------------------------------------------------------------- sheets and files


def test_contact_sheet_places_images_of_several_sizes() -> None:
    images = [np.full((10, 30, 3), 10, np.uint8), np.full((20, 5, 3), 20, np.uint8), np.full((4, 4, 3), 30, np.uint8)]
    sheet = contact_sheet(images, num_columns=2)
    assert sheet.shape == (2 * MARGIN + 20 + GAP + 4, 2 * MARGIN + 2 * 30 + GAP, 3)
    assert (sheet[MARGIN : MARGIN + 10, MARGIN : MARGIN + 30] == 10).all()
    assert (sheet[MARGIN : MARGIN + 20, MARGIN + 40 : MARGIN + 45] == 20).all()
    assert (sheet[MARGIN + 30 : MARGIN + 34, MARGIN : MARGIN + 4] == 30).all()
    assert int((sheet != 255).any(axis=-1).sum()) == 10 * 30 + 20 * 5 + 4 * 4


def test_long_captions_stay_in_their_column() -> None:
    images = [np.zeros((10, 60, 3), np.uint8)] * 2
    sheet = contact_sheet(images, 2, ["a caption much longer than its picture is wide", ""])
    head = sheet[MARGIN : MARGIN + CAPTION]
    assert (head[:, MARGIN : MARGIN + 60] < 200).any()
    assert (head[:, MARGIN + 60 :] == 255).all()


def test_contact_sheet_refuses_what_it_cannot_lay_out() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="needs images"):
        contact_sheet([], 2)
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        contact_sheet([image, image], 2, ["one"])


def test_save_png_keeps_every_pixel_and_creates_folders(tmp_path: Path) -> None:
    image = smooth_image(20, 30)
    path = tmp_path / "new" / "folder" / "sheet.png"
    save_png(path, image)
    np.testing.assert_array_equal(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB), image)
    assert path.stat().st_mode & stat.S_IRUSR
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


def test_save_png_replaces_a_picture_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sheet.png"
    save_png(path, smooth_image(20, 30))
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match=r"sheet\.png"):
            save_png(path, smooth_image(40, 50))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_must_be_named_png(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'sheet\.jpg" does not end in "\.png"'):
        save_png(tmp_path / "sheet.jpg", smooth_image(4, 4))


def test_plot_curves_draws_lines_and_bands(tmp_path: Path) -> None:
    curves = {"SlotCon": [(50.0, 2.0), (100.0, 5.0)], "random": [(50.0, 1.0), (100.0, 2.0)]}
    texts = {"xlabel": "iteration", "ylabel": "box AP", "title": "AP"}
    plot_curves(tmp_path / "plain.png", curves, **texts)
    plot_curves(tmp_path / "bands.png", curves, **texts, bands={"SlotCon": [0.5, 1.0]})
    plain, bands = (cv2.imread(str(tmp_path / name)) for name in ("plain.png", "bands.png"))
    assert plain.shape == bands.shape and min(plain.shape[:2]) > 400
    blue_rgb, orange_rgb = (31, 119, 180), (255, 127, 14)
    for color in (blue_rgb, orange_rgb):
        assert (plain == np.array(color[::-1])).all(axis=-1).sum() > 100
    light_blue = (np.abs(bands.astype(int) - (240, 228, 210)).max(axis=-1) < 8).sum()
    assert light_blue > 1000 > (np.abs(plain.astype(int) - (240, 228, 210)).max(axis=-1) < 8).sum()


def test_plot_curves_refuses_a_band_of_another_length(tmp_path: Path) -> None:
    for bands in ({"a": [1.0, 2.0]}, {"b": [1.0]}):
        with pytest.raises(ValueError, match="has no curve of as many points"):
            plot_curves(tmp_path / "x.png", {"a": [(0, 0)]}, xlabel="", ylabel="", title="", bands=bands)


# ---------------------------------------------------------------------------------------------- detections


def make_instances() -> Instances:
    instances = Instances((128, 128))
    instances.pred_boxes = Boxes(torch.tensor([[20.0, 20.0, 60.0, 60.0], [80.0, 70.0, 110.0, 120.0]]))
    instances.scores = torch.tensor([0.9, 0.3])
    instances.pred_classes = torch.tensor([0, 1])
    masks = torch.zeros(2, 128, 128, dtype=torch.bool)
    masks[0, 20:60, 20:60] = masks[1, 70:120, 80:110] = True
    instances.pred_masks = masks
    return instances


def test_detections_are_drawn_from_the_threshold_on() -> None:
    metadata = Metadata(thing_classes=["circle", "square"])
    gray = np.full((128, 128, 3), 128, dtype=np.uint8)
    drawn = draw_detections(gray, make_instances(), metadata, score_threshold=0.5)
    assert drawn.shape == (384, 384, 3) and drawn.dtype == np.uint8
    inside = drawn[3 * 40, 3 * 30].astype(int)
    expected = 128 * 0.6 + 0.4 * region_colors(1)[0].astype(float)
    assert np.abs(inside - expected).max() < 3, "class 0 has colour 0"
    assert (drawn[3 * 100, 3 * 95] == 128).all(), "the second one is below the threshold"
    both = draw_detections(gray, make_instances(), metadata, score_threshold=0.2)
    assert not (both[3 * 100, 3 * 95] == 128).all()


def test_detections_without_masks_names_or_results() -> None:
    image = np.full((480, 640, 3), 128, dtype=np.uint8)
    instances = Instances((480, 640))
    instances.pred_boxes = Boxes(torch.tensor([[20.0, 20.0, 200.0, 200.0]]))
    instances.scores, instances.pred_classes = torch.tensor([0.9]), torch.tensor([5])
    drawn = draw_detections(image, instances, Metadata(), 0.5)
    assert drawn.shape == (480, 640, 3) and (drawn != 128).any()
    np.testing.assert_array_equal(draw_detections(image, instances, Metadata(), 0.95), image)


def write_annotated_image(folder: Path, name: str = "scene.png") -> dict:
    file = folder / name
    cv2.imwrite(str(file), np.full((128, 128, 3), 128, np.uint8))
    square = [20, 20, 60, 20, 60, 60, 20, 60]
    annotation = {"bbox": [20, 20, 40, 40], "bbox_mode": BoxMode.XYWH_ABS, "segmentation": [square], "category_id": 0}
    size = {"height": 128, "width": 128}
    return {"file_name": str(file), "image_id": name, **size, "annotations": [annotation]}


def test_ground_truth_has_the_colors_and_size_of_detections(tmp_path: Path) -> None:
    dataset_dict = write_annotated_image(tmp_path)
    metadata = Metadata(thing_classes=["circle", "square"])
    truth = draw_ground_truth(dataset_dict, metadata)
    detected = draw_detections(np.full((128, 128, 3), 128, np.uint8), make_instances(), metadata, 0.5)
    np.testing.assert_array_equal(truth[3 * 40, 3 * 30], detected[3 * 40, 3 * 30])
    assert truth.shape == detected.shape
    assert (draw_ground_truth({**dataset_dict, "annotations": []}, metadata) == 128).all()


# ---------------------------------------------------------------------------------------------- tools/visualize.py


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("visualize_tool", REPO_ROOT / "tools" / "visualize.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        cv2.imwrite(str(folder / f"{i}.png"), smooth_image(120, 160, seed=i))
    return folder


def save_untrained(config: str, path: Path, opts: list[str]) -> None:
    from detectron2.modeling import build_model

    from d2_objssl.checkpoint import checkpoint_metadata, write_checkpoint
    from d2_objssl.engine import resolve_norms, setup_cfg

    torch.manual_seed(0)
    cfg = resolve_norms(setup_cfg(config, opts))
    write_checkpoint({"model": build_model(cfg).state_dict(), "d2_objssl": checkpoint_metadata(cfg)}, str(path))


PRETRAIN = str(REPO_ROOT / "configs" / "quick" / "slotcon_R_18_scenes.yaml")
FINETUNE = str(REPO_ROOT / "configs" / "quick" / "mask_rcnn_R_18_FPN_scenes.yaml")


def test_tool_draws_views(tool: ModuleType, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "views.png"
    args = ["views", "--config-file", PRETRAIN, "--num-images", "2", "--output", str(output)]
    tool.main([*args, "DATASETS.TRAIN", f"('images:{photos}',)"])
    assert cv2.imread(str(output)).shape[0] == 2 * MARGIN + 2 * (CAPTION + TILE_SIZE) + GAP
    assert capsys.readouterr().out.strip() == str(output)


def test_tool_draws_regions_of_a_checkpoint(tool: ModuleType, photos: Path, tmp_path: Path) -> None:
    opts = ["DATASETS.TRAIN", f"('images:{photos}',)", "OUTPUT_DIR", str(tmp_path)]
    save_untrained(PRETRAIN, tmp_path / "model.pth", opts)
    common = ["regions", "--config-file", PRETRAIN, "--num-images", "3"]
    tool.main([*common, "--weights", str(tmp_path / "model.pth"), *opts])
    sheet = cv2.imread(str(tmp_path / "regions.png"))
    # Two pairs of image and overlay in a row, 384 x 288 each; the third image is in the second row.
    assert sheet.shape == (2 * MARGIN + 2 * (CAPTION + 288) + GAP, 2 * MARGIN + 4 * 384 + 3 * GAP, 3)
    row = sheet[MARGIN + CAPTION : MARGIN + CAPTION + 288, MARGIN:]
    assert mean_difference(row[:, :384], row[:, 384 + GAP : 2 * 384 + GAP]) > 5, "the overlay is coloured"


def test_tool_draws_detections_beside_ground_truth(tool: ModuleType, tmp_path: Path) -> None:
    name = "visualize_tool_scenes"
    DatasetCatalog.register(name, lambda: [write_annotated_image(tmp_path)])
    MetadataCatalog.get(name).set(thing_classes=["circle"])
    opts = ["DATASETS.TEST", f"('{name}',)", "MODEL.ROI_HEADS.NUM_CLASSES", "1"]
    try:
        save_untrained(FINETUNE, tmp_path / "model.pth", opts)
        args = ["--config-file", FINETUNE, "--weights", str(tmp_path / "model.pth"), "--score-threshold", "0.99"]
        tool.main(["detections", *args, "--output", str(tmp_path / "detections.png"), *opts])
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    sheet = cv2.imread(str(tmp_path / "detections.png"))
    assert sheet.shape == (2 * MARGIN + CAPTION + 384, 2 * MARGIN + 2 * 384 + GAP, 3)
    y = MARGIN + CAPTION + 3 * 40
    assert not (sheet[y, MARGIN + 3 * 30] == 128).all() and (sheet[y, MARGIN + 384 + GAP + 3 * 30] == 128).all()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["regions", "--config-file", PRETRAIN], "no weights were given: name a checkpoint with --weights"),
        (["regions", "--config-file", PRETRAIN, "--weights", "missing.pth"], "missing.pth: no such file"),
        (["regions", "--config-file", FINETUNE], "only the models of pretraining"),
        (["detections", "--config-file", PRETRAIN], "it detects nothing"),
        (["detections", "--config-file", FINETUNE, "MODEL.WEIGHTS", ""], "no weights were given"),
        (["views", "--config-file", FINETUNE], "only pretraining has views to show"),
        (["views", "--config-file", "missing.yaml"], "missing.yaml does not exist"),
        (["views", "--config-file", PRETRAIN, "DATASETS.TRAIN", "('images:/no/such/folder',)"], "does not exist"),
    ],
)
def test_tool_says_what_is_wrong(tool: ModuleType, args: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        tool.main(args)


@pytest.mark.parametrize("command", ["views", "regions", "detections", "attention"])
def test_tool_help_has_an_example(tool: ModuleType, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        tool.main([command, "--help"])
    assert stop.value.code == 0
    assert f"python tools/visualize.py {command} --config-file" in capsys.readouterr().out


@pytest.mark.parametrize("num_images", [1, 2])
def test_pairs_stand_side_by_side(num_images: int) -> None:
    """View v of the anchor is followed by view v of the not-anchor."""
    values = (10, 60, 110, 160)  # two views of the anchor, then two of the not-anchor
    views = [
        ViewBatch(
            images=torch.full((2, 3, TILE_SIZE, TILE_SIZE), value, dtype=torch.uint8),
            crop_boxes=torch.tensor([[0.0, 0.0, 9.0, 9.0]]).repeat(2, 1),
            hflip=torch.zeros(2, dtype=torch.bool),
        )
        for value in values
    ]
    sheet = draw_pairs(views, num_images)
    row = sheet[0, 100]  # crosses the first row of tiles
    shown = [int(v) for v in torch.unique_consecutive(row) if int(v) in values]
    assert shown == [10, 110, 60, 160]
    assert draw_pairs(views, 2).shape[1] > draw_pairs(views, 1).shape[1]
