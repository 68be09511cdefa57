"""tools/evaluate.py regions: sources from the command line, its table, record and picture, and what it refuses."""

import json

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from d2_objssl.data.region_files import MapSettings
from d2_objssl.data.region_keys import assign_region_keys, find_image_roots
from d2_objssl.data.region_maps import FelzenszwalbRegions, GridRegions, SelectiveSearchRegions
from d2_objssl.data.region_writer import RegionWriter, begin_maps, finish_maps
from d2_objssl.evaluation.commands import regions
from d2_objssl.proposals import grid_regions
from d2_objssl.structures import MAX_OVERLAPPING


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("evaluate")


def run(tool, *arguments: str) -> None:
    tool.main(["regions", *arguments])


def test_regions_of_scenes(tool, tmp_path, capsys):
    """Ground truth covers every object; a finer grid fits the scenes' small objects better than the whole image."""
    record, picture = tmp_path / "new" / "regions.json", tmp_path / "regions.png"
    sources = ["instances", "grid:4", "global", "felzenszwalb:100:50", "selective_search:8"]
    options = ["--limit", "3", "--num-pictures", "2", "--picture-side", "96"]
    run(
        tool,
        "--dataset",
        "scenes_tiny_val",
        "--source",
        *sources,
        "--output",
        str(record),
        "--picture",
        str(picture),
        *options,
    )
    content = json.loads(record.read_text())
    assert content["task"] == "regions" and content["dataset"] == "scenes_tiny_val" and content["limit"] == 3
    assert list(content["results"]) == sources
    assert {"scikit-image", "opencv"} <= content["versions"].keys()
    assert content["metrics"]["grid:4/ABO"] == round(100 * content["results"]["grid:4"]["abo"], 3)
    assert content["wall_time_s"] > 0 and content["num_images"] == 3
    assert all(content[field] is None for field in ("weights", "config", "seed", "precision"))
    abo = {spec: r["abo"] for spec, r in content["results"].items()}
    assert abo["instances"] > 0.9 and abo["instances"] > abo["grid:4"] > abo["global"] > 0
    assert content["results"]["selective_search:8"]["regions_per_image"] <= 8
    sheet = cv2.imread(str(picture))
    assert 6 * 90 < sheet.shape[1] < 6 * 96 + 120 and 2 * 90 < sheet.shape[0] < 2 * 96 + 100
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["source", "ABO"]
    assert [line.split()[0] for line in lines[2:7]] == sources
    assert f"{abo['grid:4']:.3f}" in lines[3] and "instances in 3 images" in lines[7]


def test_regions_of_a_folder_of_maps(tool, tmp_path):
    """Maps of a lower resolution than the images; a limit does not change under which keys they are filed."""
    name, root, record = "scenes_tiny_val", tmp_path / "maps", tmp_path / "regions.json"
    dicts = DatasetCatalog.get(name)
    assign_region_keys(dicts, find_image_roots([name]))
    begin_maps(root, MapSettings("grid", {"size": 4}, False, "features", [name]))
    with RegionWriter(root, "0", overlapping=False) as writer:
        for d in dicts:
            size = (d["height"], d["width"])
            writer.write(d["region_key"], grid_regions(8, 8, 4), image_file=d["file_name"], image_size=size)
    finish_maps(root)
    run(tool, "--dataset", name, "--source", f"file:{root}", "grid:4", "--limit", "3", "--output", str(record))
    stored, computed = json.loads(record.read_text())["results"].values()
    assert {k: v for k, v in stored.items() if k != "seconds_per_image"} == {
        k: v for k, v in computed.items() if k != "seconds_per_image"
    }


def test_label_maps_as_regions_ignore_what_the_data_set_ignores(tool, tmp_path, catalog):
    labels = np.full((20, 20), 255, np.uint8)
    labels[:10] = 7
    cv2.imwrite(str(tmp_path / "labels.png"), labels)
    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((20, 20, 3), np.uint8))
    box = {"bbox": [0, 0, 20, 10], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    image = {"file_name": str(tmp_path / "image.png"), "height": 20, "width": 20, "annotations": [box]}
    image |= {"sem_seg_file_name": str(tmp_path / "labels.png")}
    DatasetCatalog.register("labelled_twice", lambda: [image])
    MetadataCatalog.get("labelled_twice").set(ignore_label=255)
    run(tool, "--dataset", "labelled_twice", "--source", "sem_seg", "--output", str(tmp_path / "record.json"))
    result = json.loads((tmp_path / "record.json").read_text())["results"]["sem_seg"]
    assert result["abo"] == 1 and result["regions_per_image"] == 1


@pytest.mark.parametrize(
    ("spec", "kind", "settings"),
    [
        ("grid:3", GridRegions, {"size": 3}),
        ("felzenszwalb:500.5:40", FelzenszwalbRegions, {"settings": [(500.5, 40)]}),
        ("selective_search", SelectiveSearchRegions, {"num_proposals": MAX_OVERLAPPING}),
        ("selective_search:3", SelectiveSearchRegions, {"num_proposals": 3}),
    ],
)
def test_source_of_a_word(tool, spec, kind, settings):
    source = regions.parse_source(spec)
    assert type(source) is kind and {k: getattr(source, k) for k in settings} == settings


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mcg", "one of grid:SIZE, global, felzenszwalb:SCALE:MIN_SIZE"),
        ("grid", "form grid:SIZE"),
        ("grid:2:3", "form grid:SIZE"),
        ("grid:five", "form grid:SIZE: .*'five'"),
        ("grid:0", "form grid:SIZE: .*0"),
        ("global:1", "form global"),
        ("sem_seg:1", "form sem_seg"),
        ("felzenszwalb:100", "form felzenszwalb:SCALE:MIN_SIZE"),
        ("felzenszwalb:-1:5", "felzenszwalb:SCALE:MIN_SIZE: .*-1"),
        ("selective_search:17", "selective_search.*17"),
        ("file", "form file:ROOT"),
    ],
)
def test_a_word_that_is_no_source_is_explained(tool, spec, message):
    with pytest.raises(SystemExit, match=f'error: --source "{spec}" .*{message}|error: --source "{spec}", .*{message}'):
        run(tool, "--dataset", "scenes_tiny_val", "--source", spec)


def test_an_unknown_data_set_is_named(tool):
    with pytest.raises(SystemExit, match='error: --dataset "coco_2071_val" is not in the DatasetCatalog'):
        run(tool, "--dataset", "coco_2071_val", "--source", "global")


def test_a_data_set_that_is_not_there_is_named(tool):
    with pytest.raises(SystemExit, match=r"error: .*instances_val2017\.json"):
        run(tool, "--dataset", "coco_2017_val", "--source", "global")


def test_a_data_set_without_instances_is_refused(tool, tmp_path, catalog):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(SystemExit, match=rf'error: --dataset "images:{tmp_path}" has no instance annotations'):
        run(tool, "--dataset", f"images:{tmp_path}", "--source", "global")


@pytest.mark.parametrize(
    "command",
    [
        ["regions", "--dataset", "scenes_tiny_val", "--source", "global"],
        ["segmentation", "--dataset", "scenes_tiny_val_sem_seg", "--weights", "none.pth"],
        ["concepts", "--dataset", "scenes_tiny_val", "--weights", "none.pth"],
        ["svm", "--weights", "random", "--train", "scenes_tiny_val", "--test", "scenes_tiny_val"],
    ],
)
def test_what_cannot_be_written_is_found_before_anything_else(tool, tmp_path, monkeypatch, command):
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: pytest.fail("it read the data first"))
    (tmp_path / "file").touch()
    for output, message in ((tmp_path / "file" / "new" / "a.json", "cannot be written"), (tmp_path, "is a folder")):
        with pytest.raises(SystemExit, match=f"error: --output {output} {message}"):
            tool.main([*command, "--output", str(output)])
    if command[0] != "svm":
        with pytest.raises(SystemExit, match=r'error: --picture \S+/a\.jpg: .* does not end in "\.png"'):
            tool.main([*command, "--output", str(tmp_path / "new" / "a.json"), "--picture", str(tmp_path / "a.jpg")])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_limit_must_be_positive(tool, capsys):
    with pytest.raises(SystemExit):
        run(tool, "--dataset", "scenes_tiny_val", "--source", "global", "--limit", "0")
    assert '"0" is not a positive whole number' in capsys.readouterr().err


def test_outlines_of_overlapping_regions(tool):
    image = np.zeros((40, 40, 3), np.uint8)
    bits = np.zeros((40, 40), np.int32)
    bits[5:30, 5:30] |= 1
    bits[10:35, 10:35] |= 1 << 15
    drawn = regions.outline_regions(image, bits)
    colors = {tuple(c) for c in drawn.reshape(-1, 3).tolist()}
    assert len(colors) == 3 and not image.any()
    assert tuple(drawn[5, 15]) != tuple(drawn[34, 20]) and (drawn[20, 20] == 0).all()
