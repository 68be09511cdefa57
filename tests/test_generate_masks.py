"""tools/generate_masks.py: what it writes for each source, restarts after a kill, unreadable images, the picture."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import setup_logger

from d2_objssl.data.image_reading import read_rgb_image
from d2_objssl.data.region_files import MapSettings, RegionIndex, file_bytes, map_path
from d2_objssl.data.region_generation import generate_maps
from d2_objssl.data.region_keys import assign_region_keys
from d2_objssl.data.region_maps import GridRegions, RegionSource, SelectiveSearchRegions
from d2_objssl.data.region_writer import completed_images
from d2_objssl.proposals import boxes_to_bits, felzenszwalb_regions, grid_regions, largest_regions

TOOL = Path(__file__).resolve().parent.parent / "tools" / "generate_masks.py"
SETTINGS = MapSettings("test", {}, False, "image", ["photos"])


@pytest.fixture(scope="module")
def tool(load_tool):
    setup_logger(
        name="d2_objssl"
    )  # once only, before the first test: from then on nothing propagates to the root logger
    return load_tool("generate_masks")


@pytest.fixture
def photos(tmp_path):
    """Six small pictures of coloured rectangles, in two folders."""
    return make_photos(tmp_path / "photos", 6)


def make_photos(folder: Path, num: int, side: int = 48) -> Path:
    rng = np.random.default_rng(0)
    for i in range(num):
        image = np.full((side, side + 4 * i, 3), rng.integers(0, 256, 3), dtype=np.uint8)
        for _ in range(4):
            x0, y0 = rng.integers(0, side - 16, 2)
            image[y0 : y0 + 16, x0 : x0 + 16] = rng.integers(0, 256, 3)
        file = folder / ("a" if i % 2 else "b") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), image)
    return folder


def read_maps(root: Path, photos: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(image, map) of all images, by key; checked as training does."""
    dicts = [{"file_name": str(f)} for f in sorted(photos.rglob("*.png"))]
    assign_region_keys(dicts, [str(photos)])
    index = RegionIndex.load(root)
    index.check(dicts, 256)
    images = {d["region_key"]: read_rgb_image(d["file_name"]) for d in dicts}
    return {key: (image, index.read(key, *image.shape[:2])) for key, image in images.items()}


def contents(root: Path) -> dict[str, bytes]:
    """All visible files of a folder."""
    files = [f for f in root.rglob("*") if f.is_file() and not f.name.startswith(".")]
    return {str(f.relative_to(root)): f.read_bytes() for f in files}


# ------------------------------------------------------------------------------------------------------- sources


def test_each_source_writes_what_it_computes(tool, photos, tmp_path, monkeypatch):
    boxes = np.array([[0, 0, 9, 9], [4, 4, 40, 40]], dtype=np.float32)
    monkeypatch.setattr("d2_objssl.data.region_maps.selective_search_boxes", lambda image, max_boxes: boxes[:max_boxes])
    commands = {
        "grid --grid-size 3": lambda image: grid_regions(*image.shape[:2], 3),
        "global": lambda image: np.zeros(image.shape[:2], dtype=np.int32),
        "felzenszwalb --setting 20 5": lambda image: felzenszwalb_regions(image, 20, 5),
        "selective_search": lambda image: boxes_to_bits(boxes, *image.shape[:2]),
        "selective_search --num-proposals 1": lambda image: boxes_to_bits(boxes[:1], *image.shape[:2]),
    }
    for i, (command, expected) in enumerate(commands.items()):
        tool.main(
            ["--dataset", f"images:{photos}", "--output", str(tmp_path / f"root{i}"), "--source", *command.split()]
        )
        maps = read_maps(tmp_path / f"root{i}", photos)
        assert sorted(maps) == ["photos/a/1.png", "photos/a/3.png", "photos/a/5.png"] + [
            f"photos/b/{i}.png" for i in (0, 2, 4)
        ]
        for image, region_map in maps.values():
            np.testing.assert_array_equal(region_map, expected(image))


def test_ground_truth_becomes_maps(tool, photos, tmp_path, catalog):
    image_file, label_file = photos / "a/1.png", tmp_path / "labels.png"
    cv2.imwrite(str(label_file), np.arange(48 * 52).reshape(48, 52) % 7)
    annotation = {"bbox": [8, 8, 20, 20], "bbox_mode": 0, "category_id": 0}
    record = {"file_name": str(image_file), "annotations": [annotation], "sem_seg_file_name": str(label_file)}
    DatasetCatalog.register("ground_truth_test", lambda: [record | {"height": 48, "width": 52}])
    MetadataCatalog.get("ground_truth_test").set(image_root=str(photos), ignore_label=6)
    maps = {}
    for source in ("instances", "sem_seg"):
        root = tmp_path / source
        tool.main(["--dataset", "ground_truth_test", "--source", source, "--output", str(root)])
        maps[source] = RegionIndex.load(root).read("photos/a/1.png", 48, 52)
    box = np.zeros((48, 52), dtype=np.int32)
    box[8:20, 8:20] = 1
    labels = np.arange(48 * 52).reshape(48, 52) % 7
    np.testing.assert_array_equal(maps["instances"], box)
    np.testing.assert_array_equal(maps["sem_seg"], np.where(labels == 6, -1, labels))


def test_proposals_of_a_results_file_become_maps(tool, photos, tmp_path):
    result = {"image_id": 1, "score": 1.0, "segmentation": {"size": [48, 52], "counts": [48, 96, 48 * 49]}}
    (tmp_path / "results.json").write_text(json.dumps([result]))
    arguments = ["--source", "coco_rle", "--proposals", str(tmp_path / "results.json")]
    tool.main(["--dataset", f"images:{photos}", *arguments, "--output", str(tmp_path / "root")])
    region_map = read_maps(tmp_path / "root", photos)["photos/a/1.png"][1]
    assert RegionIndex.load(tmp_path / "root").overlapping
    assert region_map[:, 1:3].all() and region_map.sum() == 96


def test_several_settings_are_drawn_by_the_name_of_the_image(tool, photos, tmp_path):
    settings = ["--setting", "20", "5", "--setting", "20", "400"]
    for root in ("one", "two"):
        (tmp_path / root).mkdir()
        np.random.seed(len(root))
        limit = ["--limit", "3"] if root == "two" else []  # the order of work does not matter
        arguments = ["--dataset", f"images:{photos}", "--source", "felzenszwalb", *settings]
        for more in (limit, []):
            tool.main([*arguments, "--output", str(tmp_path / root), *more])
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {k: v for k, v in one.items() if k != "index.json"} == {k: v for k, v in two.items() if k != "index.json"}
    used = set()
    for image, region_map in read_maps(tmp_path / "one", photos).values():
        equal = [np.array_equal(region_map, felzenszwalb_regions(image, 20, size)) for size in (5, 400)]
        assert any(equal)
        used.add(tuple(equal))
    assert len(used) == 2


def test_the_largest_regions_are_kept_and_cut_images_are_counted(tool, photos, tmp_path, capsys):
    command = ["--dataset", f"images:{photos}", "--source", "grid", "--grid-size", "5", "--max-regions", "8"]
    tool.main([*command, "--output", str(tmp_path / "root")])
    assert "6 of them had more than 8 regions" in capsys.readouterr().out
    for image, region_map in read_maps(tmp_path / "root", photos).values():
        expected, num_dropped = largest_regions(grid_regions(*image.shape[:2], 5), 8)
        assert num_dropped == 17
        np.testing.assert_array_equal(region_map, expected)


# ------------------------------------------------------------------------------------------------------ restarts


class SlowGrid(GridRegions):
    """Takes its time, to be killed in."""

    def __call__(self, image, dataset_dict):
        time.sleep(0.02)
        return super().__call__(image, dataset_dict)


def generate(root: Path, photos: Path, source: RegionSource) -> None:
    dicts = [{"file_name": str(f)} for f in sorted(photos.rglob("*.png"))]
    assign_region_keys(dicts, [str(photos)])
    generate_maps(root, dicts, source, SETTINGS, max_regions=256)


def wait_for_maps(root: Path, num: int) -> None:
    deadline = time.monotonic() + 120
    while sum(part.read_bytes().count(b"\n") for part in root.glob("index.part-*.tsv")) < num:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_generation_goes_on_and_ends_like_one_that_was_not(tmp_path):
    photos = make_photos(tmp_path / "photos", 40)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["d2_objssl"])
    for num in (3, 20):
        process = context.Process(target=generate, args=(tmp_path / "killed", photos, SlowGrid()))
        process.start()
        wait_for_maps(tmp_path / "killed", num)
        process.kill()
        process.join()
        assert num <= len(completed_images(tmp_path / "killed")) < 40
        with pytest.raises(ValueError, match="incomplete"):
            RegionIndex.load(tmp_path / "killed")
    generate(tmp_path / "killed", photos, GridRegions())
    generate(tmp_path / "whole", photos, GridRegions())
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len(contents(tmp_path / "whole")) == 42
    assert not [f for f in (tmp_path / "killed/maps").rglob(".*")]


@pytest.mark.slow
def test_killed_tool_with_workers_leaves_no_process_and_ends_like_one_that_was_not(tool, tmp_path):
    photos = make_photos(tmp_path / "photos", 40, side=200)
    command = [
        "--dataset",
        f"images:{photos}",
        "--source",
        "felzenszwalb",
        "--setting",
        "20",
        "5",
        "--num-workers",
        "2",
    ]
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, TOOL, *command, "--output", killed])
    wait_for_maps(killed, 6)
    workers = [int(part.stem.split("-")[1]) for part in killed.glob("index.part-*.tsv")]
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert 6 <= len(completed_images(killed)) < 40
    subprocess.run([sys.executable, TOOL, *command, "--output", killed], check=True)
    tool.main([*command[:-2], "--output", str(tmp_path / "whole")])
    whole = contents(tmp_path / "whole")
    assert len(whole) == 42
    # The command for messages names the folder and the number of workers.
    assert {name for name, content in contents(killed).items() if content != whole[name]} == {"index.json"}


def is_running(pid: int) -> bool:
    """Whether a process exists and is not only waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_interrupted_tool_says_how_to_go_on(tmp_path):
    photos = make_photos(tmp_path / "photos", 40, side=200)
    command = ["--dataset", f"images:{photos}", "--source", "felzenszwalb", "--num-workers", "2"]
    process = subprocess.Popen(
        [sys.executable, TOOL, *command, "--output", tmp_path / "root"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_maps(tmp_path / "root", 2)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and errors.strip().endswith("the same command goes on from here")
    assert "Traceback" not in errors
    assert 2 <= len(completed_images(tmp_path / "root")) < 40


def test_finished_maps_are_not_made_again(tool, photos, tmp_path, monkeypatch):
    command = ["--dataset", f"images:{photos}", "--source", "grid", "--output", str(tmp_path / "root")]
    tool.main(command)
    before = contents(tmp_path / "root")
    map_path(tmp_path / "root", "photos/a/1.png").unlink()
    cv2.imwrite(str(photos / "b/2.png"), np.zeros((48, 64, 3), dtype=np.uint8))  # changed: another size in bytes
    calls, call = [], GridRegions.__call__
    monkeypatch.setattr(GridRegions, "__call__", lambda self, image, d: calls.append(d) or call(self, image, d))
    tool.main(command)
    assert sorted(d["region_key"] for d in calls) == ["photos/a/1.png", "photos/b/2.png"]
    after = contents(tmp_path / "root")
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"index.tsv", "maps/photos/b/2.png.png"}
    read_maps(tmp_path / "root", photos)
    tool.main(command)
    assert len(calls) == 2 and contents(tmp_path / "root") == after


def test_other_settings_are_refused(tool, photos, tmp_path):
    command = ["--dataset", f"images:{photos}", "--source", "grid", "--output", str(tmp_path / "root")]
    tool.main([*command, "--limit", "2"])
    with pytest.raises(SystemExit, match=r"options is .*'grid_size': 5.*'grid_size': 7"):
        tool.main([*command, "--grid-size", "7"])
    assert RegionIndex.load(tmp_path / "root").num_images == 2


# ------------------------------------------------------------------------------------------- images and messages


def test_unreadable_images_are_reported_and_do_not_fail_training(tool, photos, tmp_path, capsys, caplog):
    (photos / "a/3.png").write_bytes((photos / "a/3.png").read_bytes()[:60])
    command = ["--dataset", f"images:{photos}", "--source", "grid", "--output", str(tmp_path / "root")]
    with caplog.at_level(logging.WARNING, "d2_objssl"):
        tool.main(command)
    assert f"Cannot read {photos / 'a/3.png'}" in caplog.text
    output = capsys.readouterr().out
    assert "5 maps" in output and f"1 images could not be read and have no map:\n  {photos / 'a/3.png'}" in output
    dicts = [{"file_name": str(f)} for f in photos.rglob("*.png")]
    assign_region_keys(dicts, [str(photos)])
    RegionIndex.load(tmp_path / "root").check(dicts, 256)
    tool.main(command)  # says so again
    assert "1 images could not be read" in capsys.readouterr().out


def test_a_folder_without_any_readable_image_is_an_error(tool, photos, tmp_path, capsys):
    for file in photos.rglob("*.png"):
        file.write_text("no image")
    with pytest.raises(SystemExit, match=r"none of the 6 images of images:.*/photos could be read"):
        tool.main(["--dataset", f"images:{photos}", "--source", "grid", "--output", str(tmp_path / "root")])
    assert "a/3.png" in capsys.readouterr().out


def test_a_label_map_of_another_size_stops_with_its_name(tool, photos, tmp_path, catalog):
    cv2.imwrite(str(tmp_path / "labels.png"), np.zeros((4, 4), dtype=np.uint8))
    record = {"file_name": str(photos / "a/1.png"), "sem_seg_file_name": str(tmp_path / "labels.png")}
    DatasetCatalog.register("wrong_size_test", lambda: [record])
    with pytest.raises(SystemExit, match=r"labels\.png"):
        tool.main(["--dataset", "wrong_size_test", "--source", "sem_seg", "--output", str(tmp_path / "root")])


def test_incomplete_folder_names_the_command_for_all_images(tool, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("d2_objssl.data.region_generation.finish_maps", lambda root: None)
    arguments = f"--dataset images:{photos} --source felzenszwalb --setting 20 5 --setting 20.5 9 --max-regions 100"
    arguments += f" --output {tmp_path / 'root'} --num-workers 1"
    with pytest.raises(FileNotFoundError):  # of the index
        tool.generate(*parse(tool, arguments.split()))
    with pytest.raises(ValueError) as error:
        RegionIndex.load(tmp_path / "root")
    command = str(error.value).splitlines()[-1].partition("python tools/generate_masks.py ")[2]
    assert vars(parse(tool, command.split())[0]) == vars(parse(tool, arguments.split())[0])


def parse(tool, arguments):
    parser = tool.build_parser()
    args = parser.parse_args(arguments)
    return args, tool.get_options(parser, args)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--output root", "give --dataset and --source, or --preview"),
        ("--output root --dataset x", "give --dataset and --source"),
        ("--output root --source grid", "--dataset is missing"),
        ("--output root --dataset x --source grid --setting 1 1", "--setting is no option of --source grid"),
        ("--output root --dataset x --source mcg", "--source mcg needs --proposals"),
        ("--output root --dataset x --source mcg --proposals a b", "one folder of --proposals, not 2"),
        ("--output root --dataset x --source grid --max-regions 0", "--max-regions is 0"),
        ("--output root --dataset x --source grid --limit 0", "--limit is 0"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(tool, capsys, arguments, message):
    with pytest.raises(SystemExit):
        tool.main(arguments.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dataset nothing --source grid", 'error: "nothing"'),
        ("--dataset images:nowhere --source grid", "nowhere"),
        ("--dataset images:{photos} --source grid --grid-size 0", "GRID_SIZE is 0"),
        ("--dataset images:{photos} --source felzenszwalb --setting 0 5", "FELZENSZWALB"),
        ("--dataset images:{photos} --source instances", "annotations"),
        ("--dataset images:{photos} --source mcg --proposals {photos}", "no .mat file for 6"),
        ("--preview sheet.png", "no region maps"),
    ],
)
def test_errors_are_one_message(tool, photos, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        tool.main([*arguments.format(photos=photos).split(), "--output", str(tmp_path / "root")])


# ------------------------------------------------------------------------------------------------------- preview


def test_preview_of_a_complete_folder_needs_nothing_else(tool, photos, tmp_path, monkeypatch):
    command = ["--dataset", f"images:{photos}", "--output", str(tmp_path / "root")]
    tool.main([*command, "--source", "grid", "--preview", str(tmp_path / "first.png")])
    monkeypatch.setattr(tool, "generate_maps", None)
    tool.main(["--output", str(tmp_path / "root"), "--preview", str(tmp_path / "second.png")])
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    sheet = cv2.imread(str(tmp_path / "first.png"))
    assert sheet.shape[1] > 4 * 48 and file_bytes(tmp_path / "first.png") > 0


def test_preview_shows_the_smallest_of_overlapping_regions(tool):
    bits = boxes_to_bits(np.array([[2, 2, 4, 4], [0, 0, 6, 5], [1, 1, 5, 5]]), 5, 8)
    expected = np.full((5, 8), -1)
    expected[0:5, 0:6] = 1
    expected[1:5, 1:5] = 2
    expected[2:4, 2:4] = 0
    np.testing.assert_array_equal(tool.smallest_of_overlapping(bits), expected)


def test_preview_of_overlapping_regions_counts_them(tool, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(
        SelectiveSearchRegions, "__call__", lambda self, image, d: boxes_to_bits([[0, 0, 9, 9]] * 3, *image.shape[:2])
    )
    captions = []
    monkeypatch.setattr(tool, "contact_sheet", lambda images, columns, texts: captions.extend(texts) or images[1])
    command = ["--dataset", f"images:{photos}", "--output", str(tmp_path / "root"), "--source", "selective_search"]
    tool.main([*command, "--preview", str(tmp_path / "sheet.png")])
    assert captions[:2] == ["photos/a/1.png", "3 overlapping regions"]
