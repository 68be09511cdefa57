"""Folders of region maps: keys of images, PNG files, writing with restarts, the check before training, reading."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from PIL import Image

from d2_objssl.data.region_files import MapEntry, MapSettings, RegionIndex, map_path, read_entries
from d2_objssl.data.region_keys import assign_region_keys, find_image_roots
from d2_objssl.data.region_png import encode_png, read_png
from d2_objssl.data.region_writer import RegionWriter, begin_maps, completed_images, finish_maps

SIZE = (6, 9)
LABELS = MapSettings("test", {"n": 1}, False, "image", ["photos"], "python make.py")
BITS = MapSettings("test", {"n": 1}, True, "image", ["photos"])
FEATURES = MapSettings("test", {"n": 1}, False, "features", ["photos"])


def make_images(folder: Path, num: int = 4) -> list[dict]:
    """Image files, which need not be images here, with keys."""
    folder.mkdir(parents=True, exist_ok=True)
    dicts = [{"file_name": str(folder / f"{i}.jpg"), "image_id": i} for i in range(num)]
    for i, d in enumerate(dicts):
        Path(d["file_name"]).write_bytes(b"x" * (100 + i))
    assign_region_keys(dicts, [str(folder)])
    return dicts


def random_map(seed: int, num_ids: int = 5, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, num_ids, size, dtype=np.int32)


def write_all(root: Path, dicts: list[dict], maps: list[np.ndarray], settings: MapSettings = LABELS) -> RegionIndex:
    begin_maps(root, settings)
    with RegionWriter(root, "0", overlapping=settings.overlapping) as writer:
        for d, region_map in zip(dicts, maps, strict=True):
            writer.write(d["region_key"], region_map, image_file=d["file_name"], image_size=SIZE)
    finish_maps(root)
    return RegionIndex.load(root)


@pytest.fixture
def stored(tmp_path):
    """Four images, their maps and the index."""
    dicts = make_images(tmp_path / "photos")
    maps = [random_map(i) for i in range(4)]
    return tmp_path / "root", dicts, maps, write_all(tmp_path / "root", dicts, maps)


# ---------------------------------------------------------------------------------------------------------- keys


def keys_of(files, roots):
    dicts = [{"file_name": str(f)} for f in files]
    assign_region_keys(dicts, [str(r) for r in roots])
    return [d["region_key"] for d in dicts]


def test_keys_are_independent_of_where_the_data_set_lies(tmp_path):
    for place in (tmp_path / "here", tmp_path / "far/away"):
        root = place / "train2017"
        assert keys_of([root / "1.jpg", root / "sub/1.jpg"], [root]) == ["train2017/1.jpg", "train2017/sub/1.jpg"]


def test_images_of_several_data_sets_belong_to_their_own_roots(tmp_path):
    train, nested = tmp_path / "coco/train2017", tmp_path / "coco/train2017/extra"
    files = [train / "1.jpg", tmp_path / "coco/unlabeled2017/1.jpg", nested / "1.jpg"]
    roots = [train, nested, tmp_path / "coco/unlabeled2017/"]
    assert keys_of(files, roots) == ["train2017/1.jpg", "unlabeled2017/1.jpg", "extra/1.jpg"]


def test_images_outside_all_roots_get_the_folder_they_have_in_common(tmp_path):
    files = [tmp_path / "voc/a/1.jpg", tmp_path / "voc/b/1.jpg"]
    assert keys_of(files, []) == ["voc/a/1.jpg", "voc/b/1.jpg"]
    assert keys_of(files, [tmp_path / "voc/*/*.jpg"]) == ["voc/a/1.jpg", "voc/b/1.jpg"]
    assert keys_of(files[:1], [tmp_path / "vo"]) == ["a/1.jpg"]  # "vo" is a prefix of the name, not a folder above


def test_keys_are_relative_to_roots_given_relatively(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert keys_of(["photos/1.jpg"], [tmp_path / "photos"]) == ["photos/1.jpg"]
    assert keys_of([tmp_path / "photos/1.jpg"], ["photos"]) == ["photos/1.jpg"]


def test_names_that_text_cannot_hold_are_escaped_and_stay_different(tmp_path):
    names = ["a\tb.jpg", "a\nb.jpg", "a%09b.jpg", os.fsdecode(b"latin1-\xe9.jpg"), "ünï 1.jpg"]
    expected = ["a%09b.jpg", "a%0Ab.jpg", "a%2509b.jpg", "latin1-%E9.jpg", "ünï 1.jpg"]
    assert keys_of([tmp_path / "p" / n for n in names], [tmp_path / "p"]) == [f"p/{e}" for e in expected]


def test_names_too_long_for_the_file_of_a_map_end_in_a_hash(tmp_path):
    long = ["x" * 250 + ".jp", "x" * 250 + ".jq", os.fsdecode(b"\xff" * 120)]
    keys = keys_of([tmp_path / "p" / n for n in [*long, "ü" * 120]], [tmp_path / "p"])
    assert len(set(keys)) == 4 and keys[3] == f"p/{'ü' * 120}"
    assert all(len(os.path.basename(k).encode()) == 240 for k in keys)
    assert all(k.startswith(("p/xxx", "p/%FF%FF")) and "%~" in k for k in keys[:3])


def test_two_images_of_one_key_are_refused_by_name(tmp_path):
    files = [tmp_path / "a/images/1.jpg", tmp_path / "b/images/1.jpg"]
    with pytest.raises(ValueError, match=r"images/1\.jpg.*a/images/1\.jpg.*b/images/1\.jpg"):
        keys_of(files, [f.parent for f in files])
    assert keys_of([files[0], files[0]], [files[0].parent]) == ["images/1.jpg"] * 2  # one image, listed twice


def test_image_roots_come_from_the_metadata():
    for i, key in enumerate(("image_root", "image_dir", "dirname", "other")):
        MetadataCatalog.get(f"roots_test_{i}").set(**{key: f"/folder{i}"})
    names = [f"roots_test_{i}" for i in range(4)]
    assert find_image_roots(names) == ["/folder0", "/folder1", "/folder2"]
    for name in names:
        MetadataCatalog.remove(name)


# ----------------------------------------------------------------------------------------------------------- PNG


@pytest.mark.parametrize(("largest", "dtype"), [(0, np.uint8), (255, np.uint8), (256, np.uint16), (65535, np.uint16)])
def test_png_is_read_as_it_was_written(tmp_path, largest, dtype):
    values = np.random.default_rng(0).integers(0, largest + 1, (5, 7))
    values[2, 3] = largest
    (tmp_path / "map.png").write_bytes(encode_png(values, "name"))
    np.testing.assert_array_equal(read_png(tmp_path / "map.png"), values)
    with Image.open(tmp_path / "map.png") as image:  # an ordinary PNG, with no more bits than it needs
        assert np.asarray(image).dtype == dtype
        np.testing.assert_array_equal(np.asarray(image), values)


@pytest.mark.parametrize("value", [-1, 65536])
def test_values_that_no_png_holds_are_refused(value):
    with pytest.raises(ValueError, match=f"name.*{value}"):
        encode_png(np.full((2, 2), value), "name")


def test_any_cut_and_any_flipped_bit_is_noticed(tmp_path):
    data = encode_png(np.kron(random_map(0) + 1, np.ones((3, 4), dtype=int)), "name")
    file = tmp_path / "map.png"
    damaged = [data[:length] for length in range(len(data))]
    for i in range(len(data)):
        damaged.append(data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :])
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(OSError, match=r"map\.png"):
            read_png(file)


def test_a_png_in_colour_is_no_map(tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "map.png")
    with pytest.raises(OSError, match="RGB"):
        read_png(tmp_path / "map.png")


# ----------------------------------------------------------------------------------------------- write and read


def test_maps_are_read_as_they_were_written(stored):
    _, dicts, maps, index = stored
    index.check(dicts, 5)
    assert index.num_images == 4 and not index.overlapping and index.settings == LABELS
    for d, expected in zip(dicts, maps, strict=True):
        read = index.read(d["region_key"], *SIZE)
        assert read.dtype == np.int32
        np.testing.assert_array_equal(read, expected)


def test_index_states_sizes_and_ids(stored):
    root, dicts, maps, _ = stored
    entries = list(read_entries(root / "index.tsv"))
    sizes = [map_path(root, d["region_key"]).stat().st_size for d in dicts]
    expected = [
        MapEntry(f"photos/{i}.jpg", 100 + i, *SIZE, *SIZE, int(maps[i].max()) + 1, sizes[i])  # type: ignore[call-arg]
        for i in range(4)
    ]
    assert entries == expected
    content = json.loads((root / "index.json").read_text())
    assert content["num_images"] == 4 and content["format_version"] == 1
    assert sorted(p.name for p in root.iterdir()) == ["index.json", "index.tsv", "maps"]  # nothing is left behind


def test_bit_sets_are_stored_as_they_are(tmp_path):
    dicts = make_images(tmp_path / "photos", 2)
    maps = [np.zeros(SIZE, dtype=np.int32), random_map(0) + 1]
    maps[1][0, 0] = 1 << 15 | 1
    index = write_all(tmp_path / "root", dicts, maps, BITS)
    assert index.overlapping
    for d, expected in zip(dicts, maps, strict=True):
        np.testing.assert_array_equal(index.read(d["region_key"], *SIZE), expected)
    assert [e.num_ids for e in read_entries(tmp_path / "root/index.tsv")] == [0, 16]


def test_many_regions_take_16_bits(tmp_path):
    dicts = make_images(tmp_path / "photos", 2)
    maps = [np.full(SIZE, 254, dtype=np.int32), np.full(SIZE, 255, dtype=np.int32)]  # stored as 255 and 256
    index = write_all(tmp_path / "root", dicts, maps)
    modes = [Image.open(map_path(index.root, d["region_key"])).mode for d in dicts]
    assert modes == ["L", "I;16"]
    assert [int(index.read(d["region_key"], *SIZE).max()) for d in dicts] == [254, 255]


def test_ids_beyond_16_bits_are_refused_by_image(tmp_path):
    begin_maps(tmp_path / "root", LABELS)
    with RegionWriter(tmp_path / "root", "0", overlapping=False) as writer, pytest.raises(ValueError, match="65536"):
        writer.write("photos/0.jpg", np.full(SIZE, 65535), image_file="photos/0.jpg", image_size=SIZE)


def test_maps_at_feature_resolution_must_have_the_aspect_of_the_image(tmp_path):
    dicts = make_images(tmp_path / "photos", 1)
    index = write_all(tmp_path / "root", dicts, [random_map(0, size=(14, 20))], FEATURES)
    key = dicts[0]["region_key"]
    for height, width in ((427, 640), (448, 640), (420, 600)):
        assert index.read(key, height, width).shape == (14, 20)
    for height, width in ((640, 427), (640, 640), (300, 640)):
        with pytest.raises(ValueError, match=rf"14 x 20 .*{height} x {width}"):
            index.read(key, height, width)


def test_a_map_of_another_size_is_refused(stored):
    _, dicts, _, index = stored
    with pytest.raises(ValueError, match=r"maps/photos/0\.jpg\.png is 6 x 9 .*9 x 6"):
        index.read(dicts[0]["region_key"], 9, 6)


def test_reading_names_the_file_that_is_missing_or_damaged(stored):
    root, dicts, _, index = stored
    path = map_path(root, dicts[0]["region_key"])
    content = path.read_bytes()
    path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    index.check(dicts, 5)  # the size is right
    with pytest.raises(OSError, match=r"photos/0\.jpg\.png"):
        index.read(dicts[0]["region_key"], *SIZE)
    path.unlink()
    with pytest.raises(OSError, match=r"photos/0\.jpg\.png"):
        index.read(dicts[0]["region_key"], *SIZE)


# --------------------------------------------------------------------------------------------------------- check


def test_check_counts_and_names_every_kind_of_problem(stored):
    root, dicts, _, index = stored
    dicts += make_images(root.parent / "more", 7)
    map_path(root, "photos/0.jpg").unlink()
    os.truncate(map_path(root, "photos/1.jpg"), 20)
    Path(dicts[2]["file_name"]).write_bytes(b"another image")
    with pytest.raises(ValueError) as error:
        index.check(dicts, 4)
    lines = str(error.value).splitlines()
    assert str(root) in lines[0] and "11 images" in lines[0]
    assert lines[1:] == [
        "  1 without a file: photos/0.jpg",
        "  4 with ids beyond 3: photos/0.jpg, photos/1.jpg, photos/2.jpg, photos/3.jpg",
        "  1 truncated (the size of the file in bytes differs): photos/1.jpg",
        "  1 made of another image file (its size in bytes differs): photos/2.jpg",
        "  7 missing from the index: more/0.jpg, more/1.jpg, more/2.jpg, more/3.jpg, more/4.jpg, ...",
        "  The largest region id is 4: set MODEL.SSL.DETCON.MAX_REGION_IDS to 5, or keep fewer regions "
        "(tools/generate_masks.py --max-regions)",
        "Make what is missing with: python make.py",
    ]


def test_check_takes_a_part_of_the_images_and_images_that_moved(stored):
    root, dicts, _, index = stored
    shutil.move(root.parent / "photos", root.parent / "elsewhere/photos")
    moved = [{"file_name": d["file_name"].replace("/photos/", "/elsewhere/photos/")} for d in dicts[:2]]
    assign_region_keys(moved, [str(root.parent / "elsewhere/photos")])
    index.check(moved, 5)


def test_check_refuses_two_images_of_one_key(stored):
    _, dicts, _, index = stored
    with pytest.raises(ValueError, match=r"photos/0\.jpg.*elsewhere"):
        index.check([*dicts, {"file_name": "elsewhere/photos/0.jpg", "region_key": "photos/0.jpg"}], 5)


def test_unreadable_and_missing_images_do_not_fail_the_check(tmp_path):
    dicts = make_images(tmp_path / "photos", 3)
    Path(dicts[1]["file_name"]).unlink()
    begin_maps(tmp_path / "root", LABELS)
    with RegionWriter(tmp_path / "root", "0", overlapping=False) as writer:
        for d in dicts[:2]:
            writer.write_unreadable(d["region_key"], image_file=d["file_name"])
        writer.write(dicts[2]["region_key"], random_map(2), image_file=dicts[2]["file_name"], image_size=SIZE)
    finish_maps(tmp_path / "root")
    index = RegionIndex.load(tmp_path / "root")
    index.check(dicts, 5)
    assert json.loads((tmp_path / "root/index.json").read_text())["num_unreadable"] == 2
    with pytest.raises(OSError):
        index.read(dicts[0]["region_key"], *SIZE)
    Path(dicts[0]["file_name"]).write_bytes(b"repaired")
    with pytest.raises(ValueError, match=r"1 made of another image file .*photos/0\.jpg"):
        index.check(dicts, 5)


# ------------------------------------------------------------------------------------------------------ restarts


def test_an_incomplete_folder_is_refused_with_the_command_to_go_on(tmp_path):
    begin_maps(tmp_path / "root", LABELS)
    with pytest.raises(ValueError, match=r"incomplete.*\n.*python make\.py"):
        RegionIndex.load(tmp_path / "root")
    with pytest.raises(ValueError, match="no region maps"):
        RegionIndex.load(tmp_path / "nothing")


def test_other_settings_in_one_folder_are_refused_by_name(stored):
    root = stored[0]
    begin_maps(root, LABELS)
    begin_maps(root, MapSettings("test", {"n": 1}, False, "image", ["photos"], "another command"))
    with pytest.raises(ValueError, match=r"options is \{'n': 1\}, not \{'n': 2\}"):
        begin_maps(root, MapSettings("test", {"n": 2}, False, "image", ["photos"]))
    with pytest.raises(ValueError, match="overlapping is False, not True"):
        begin_maps(root, BITS)
    begun = root.parent / "begun"
    begin_maps(begun, LABELS)
    with pytest.raises(ValueError, match="source is test, not other"):
        begin_maps(begun, MapSettings("other", {"n": 1}, False, "image", ["photos"]))


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        begin_maps(tmp_path, LABELS)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format_version": 1}', '{"format_version": 2}'])
def test_a_damaged_index_is_refused_by_name(stored, content):
    root = stored[0]
    (root / "index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json"):
        RegionIndex.load(root)


def test_a_damaged_line_of_a_complete_index_is_an_error(stored):
    root, dicts, _, index = stored
    lines = (root / "index.tsv").read_bytes()
    (root / "index.tsv").write_bytes(lines[:-4])
    with pytest.raises(ValueError, match=r"index\.tsv.*photos/3\.jpg"):
        index.check(dicts, 5)


def test_what_a_kill_leaves_is_done_again_and_nothing_else(tmp_path):
    root, dicts = tmp_path / "root", make_images(tmp_path / "photos", 4)
    begin_maps(root, LABELS)
    with RegionWriter(root, "0", overlapping=False) as writer:
        for i in range(3):
            writer.write(dicts[i]["region_key"], random_map(i), image_file=dicts[i]["file_name"], image_size=SIZE)
    part = root / "index.part-0.tsv"
    # A line cut short within its last number looks like that of a smaller file.
    part.write_bytes(part.read_bytes()[:-2])
    map_path(root, "photos/1.jpg").write_bytes(b"")  # what a power cut may leave
    assert completed_images(root) == {"photos/0.jpg": 100}
    with RegionWriter(root, "0", overlapping=False) as writer:
        for i in (1, 2, 3):
            writer.write(dicts[i]["region_key"], random_map(i), image_file=dicts[i]["file_name"], image_size=SIZE)
    assert len(completed_images(root)) == 4
    finish_maps(root)
    index = RegionIndex.load(root)
    index.check(dicts, 5)
    for i, d in enumerate(dicts):
        np.testing.assert_array_equal(index.read(d["region_key"], *SIZE), random_map(i))


def test_parts_of_several_processes_make_one_index_whatever_their_order(tmp_path):
    dicts = make_images(tmp_path / "photos", 4)
    expected = write_all(tmp_path / "one", dicts, [random_map(i) for i in range(4)])
    begin_maps(tmp_path / "two", LABELS)
    with (
        RegionWriter(tmp_path / "two", "rank1", overlapping=False) as first,
        RegionWriter(tmp_path / "two", "rank0", overlapping=False) as second,
    ):
        for i in (3, 1, 2, 0, 1):  # one of them twice
            writer = (first, second)[i % 2]
            writer.write(dicts[i]["region_key"], random_map(i), image_file=dicts[i]["file_name"], image_size=SIZE)
    finish_maps(tmp_path / "two")
    for name in ("index.tsv", "index.json", *(f"maps/photos/{i}.jpg.png" for i in range(4))):
        assert (tmp_path / "two" / name).read_bytes() == Path(expected.root, name).read_bytes()


def test_a_complete_folder_can_be_extended_and_repaired(stored):
    root, dicts, maps, _ = stored
    dicts += make_images(root.parent / "more", 1)
    map_path(root, "photos/1.jpg").unlink()
    assert sorted(completed_images(root)) == ["photos/0.jpg", "photos/2.jpg", "photos/3.jpg"]
    begin_maps(root, LABELS)
    with RegionWriter(root, "0", overlapping=False) as writer:
        for d in (dicts[1], dicts[4]):
            writer.write(d["region_key"], maps[1], image_file=d["file_name"], image_size=SIZE)
    finish_maps(root)
    index = RegionIndex.load(root)
    index.check(dicts, 5)
    assert index.num_images == 5
