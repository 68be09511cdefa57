"""`images:PATH` data sets and the catalog names of well-known image sets."""

import logging
import os
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2_objssl.data import register_image_folders
from d2_objssl.data.datasets import list_images, load_images


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def found(path: object, root: Path) -> list[str]:
    return [os.path.relpath(f, root) for f in list_images(str(path))]


# ------------------------------------------------------------------------------------------------------- folders


def test_a_folder_is_searched_recursively_in_a_fixed_order(tmp_path):
    touch(tmp_path, "b.jpg", "a.png", "sub/deep/c.jpeg", "sub/a.bmp", "z/b.webp", "z/y/x/w.tiff")
    expected = ["a.png", "b.jpg", "sub/a.bmp", "sub/deep/c.jpeg", "z/b.webp", "z/y/x/w.tiff"]
    assert found(tmp_path, tmp_path) == expected


def test_suffixes_count_in_any_case_and_other_files_do_not(tmp_path):
    touch(tmp_path, "a.JPG", "b.Jpeg", "c.PNG", "notes.txt", "jpg", "d.jpg.part", "labels.json", "e.gif")
    assert found(tmp_path, tmp_path) == ["a.JPG", "b.Jpeg", "c.PNG"]


def test_hidden_files_and_folders_are_skipped(tmp_path):
    touch(tmp_path, "a.jpg", "._a.jpg", ".hidden.png", ".thumbnails/a.jpg", "sub/.Trash/deep/b.jpg")
    assert found(tmp_path, tmp_path) == ["a.jpg"]


def test_a_hidden_root_is_searched(tmp_path):
    touch(tmp_path, ".cache/a.jpg")
    assert found(tmp_path / ".cache", tmp_path) == [".cache/a.jpg"]


def test_links_are_followed_and_loops_end(tmp_path):
    touch(tmp_path, "data/a.jpg", "data/sub/b.jpg", "elsewhere/c.jpg")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/sub/up").symlink_to("..")
    (tmp_path / "data/extern").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    files = found(tmp_path / "data", tmp_path / "data")
    assert files == ["a.jpg", "dangling.jpg", "extern/c.jpg", "sub/b.jpg"]


def test_a_folder_that_two_links_reach_counts_once(tmp_path):
    touch(tmp_path, "elsewhere/a.jpg", "data/b.jpg")
    for name in ("link2", "link1", "link3"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere")
    assert found(tmp_path / "data", tmp_path / "data") == ["b.jpg", "link1/a.jpg"]


def test_a_folder_that_cannot_be_read_is_warned_about(tmp_path, caplog, monkeypatch):
    touch(tmp_path, "a.jpg", "locked/b.jpg")
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # chmod does not stop root
    with caplog.at_level(logging.WARNING, "d2_objssl"):
        assert found(tmp_path, tmp_path) == ["a.jpg"]
    assert "locked" in caplog.text and "Permission denied" in caplog.text


NAMES = ["with space.jpg", "comma,and'quote.jpg", "[brackets] 1*.jpg", "ünï.jpg", os.fsdecode(b"latin1-\xe9\xff.jpg")]


@pytest.mark.parametrize("name", NAMES)
def test_unusual_names(tmp_path, name):
    folder = tmp_path / name.replace(".jpg", " folder")
    touch(folder, name)
    assert list_images(str(folder)) == [str(folder / name)]
    assert Path(list_images(str(folder))[0]).exists()


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "photos/a.jpg", "photos [2020]/b.jpg")
    assert found("~/photos", tmp_path) == ["photos/a.jpg"]
    assert found("~/photos [2020]", tmp_path) == ["photos [2020]/b.jpg"]
    assert found("~/photos/*.jpg", tmp_path) == ["photos/a.jpg"]


# --------------------------------------------------------------------------------------------------------- globs


def test_a_glob_takes_files_and_whole_folders(tmp_path):
    touch(tmp_path, "day1/a.jpg", "day1/sub/b.png", "day2/c.jpg", "night/d.jpg", "day.jpg", "day.txt")
    assert found(tmp_path / "day*", tmp_path) == ["day.jpg", "day1/a.jpg", "day1/sub/b.png", "day2/c.jpg"]
    assert found(tmp_path / "day?", tmp_path) == ["day1/a.jpg", "day1/sub/b.png", "day2/c.jpg"]
    assert found(tmp_path / "*/*.jpg", tmp_path) == ["day1/a.jpg", "day2/c.jpg", "night/d.jpg"]


def test_two_stars_search_recursively(tmp_path):
    touch(tmp_path, "a/left/1.jpg", "a/b/left/2.jpg", "a/b/right/3.jpg", "a/4.jpg", "a/b/left/5.png")
    assert found(tmp_path / "**/left/*.jpg", tmp_path) == ["a/b/left/2.jpg", "a/left/1.jpg"]
    assert found(tmp_path / "a/**", tmp_path) == [
        *("a/4.jpg", "a/b/left/2.jpg", "a/b/left/5.png", "a/b/right/3.jpg", "a/left/1.jpg"),
    ]


def test_two_stars_do_not_run_round_loops_of_links(tmp_path):
    touch(tmp_path, "data/a.jpg", "data/sub/b.jpg")
    (tmp_path / "data/sub/up").symlink_to("..")
    files = list_images(str(tmp_path / "data/**/*.jpg"))
    assert len(files) == 2
    assert sorted(os.path.basename(f) for f in files) == ["a.jpg", "b.jpg"]


def test_a_glob_lists_links_that_lead_nowhere_as_a_folder_does(tmp_path):
    touch(tmp_path, "a.jpg")
    (tmp_path / "b.jpg").symlink_to("gone.jpg")
    assert found(tmp_path / "*.jpg", tmp_path) == found(tmp_path, tmp_path) == ["a.jpg", "b.jpg"]


def test_what_is_left_out_is_said_by_kind(tmp_path, caplog):
    touch(tmp_path, "a.jpg", "b.gif", "sub/c.GIF", "d.gif", "e.txt", "f.txt", "g")
    with caplog.at_level(logging.INFO, "d2_objssl"):
        list_images(str(tmp_path))
    assert "6 other files are no images by their names: 3 .gif, 2 .txt, 1 without suffix" in caplog.text


# -------------------------------------------------------------------------------------------------------- errors


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=f'"{tmp_path}/none" does not exist .*images:{tmp_path}/none'):
        list_images(f"{tmp_path}/none")


def test_file_instead_of_folder(tmp_path):
    touch(tmp_path, "a.jpg")
    with pytest.raises(NotADirectoryError, match=f'"{tmp_path}/a.jpg" is a file'):
        list_images(f"{tmp_path}/a.jpg")


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=f'"{tmp_path}" holds 0 file'):
        list_images(str(tmp_path))


def test_no_image_of_a_known_type(tmp_path):
    touch(tmp_path, "a.txt", "b.gif")
    with pytest.raises(ValueError, match=rf'"{tmp_path}" holds 2 file.* no image of a known type \(.*\.jpeg.*\.png'):
        list_images(str(tmp_path))


def test_glob_that_matches_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'No file matches ".*/\*\.jpg"'):
        list_images(str(tmp_path / "*.jpg"))


def test_nothing_after_the_prefix(catalog):
    with pytest.raises(ValueError, match="a folder or a glob must follow"):
        register_image_folders(["images:"])


# ------------------------------------------------------------------------------------------------------ catalogs


def test_load_images_gives_dataset_dicts(tmp_path):
    touch(tmp_path, "b.jpg", "a.jpg")
    expected = [
        {"file_name": str(tmp_path / "a.jpg"), "image_id": 0},
        {"file_name": str(tmp_path / "b.jpg"), "image_id": 1},
    ]
    assert load_images(str(tmp_path)) == expected


def test_a_folder_is_registered_by_its_name_alone(tmp_path, catalog):
    touch(tmp_path, "a.jpg")
    name = f"images:{tmp_path}"
    register_image_folders([name, "scenes_tiny_train"])  # other names are none of its business
    assert [d["file_name"] for d in DatasetCatalog.get(name)] == [str(tmp_path / "a.jpg")]
    assert MetadataCatalog.get(name).image_root == str(tmp_path)


def test_registering_twice_is_harmless(tmp_path, catalog):
    name = f"images:{tmp_path}/x"
    register_image_folders([name, name])
    register_image_folders([name])
    assert name in DatasetCatalog


def test_a_missing_folder_is_an_error_when_it_is_used_not_when_it_is_named(tmp_path, catalog):
    name = f"images:{tmp_path}/later"
    register_image_folders([name])
    with pytest.raises(FileNotFoundError, match="later"):
        DatasetCatalog.get(name)
    touch(tmp_path, "later/a.jpg")
    assert len(DatasetCatalog.get(name)) == 1


@pytest.mark.parametrize(
    "name",
    [
        *("coco_2017_train_images", "coco_2017_unlabeled_images", "coco_2017_val_images"),
        *("imagenet_1k_train_images", "bdd100k_train_images"),
        *("scenes_unlabeled", "scenes_train", "scenes_val", "scenes_tiny_train", "scenes_tiny_val"),
    ],
)
def test_catalog_names(name):
    assert name in DatasetCatalog
    assert os.environ["DETECTRON2_DATASETS"] in MetadataCatalog.get(name).image_root


def test_an_incomplete_known_set_is_used():
    """What its complete size is stands in the metadata: known_sizes.check_size compares, and warns."""
    metadata = MetadataCatalog.get("bdd100k_train_images")
    folder = Path(metadata.image_root)
    assert folder.is_relative_to(os.environ["DETECTRON2_DATASETS"])
    touch(folder, "a.jpg", "b.jpg")
    assert len(DatasetCatalog.get("bdd100k_train_images")) == 2
    assert metadata.num_images == 70_000


def test_a_known_set_that_is_absent_names_the_expected_folder():
    with pytest.raises(FileNotFoundError, match=r"imagenet/train"):
        DatasetCatalog.get("imagenet_1k_train_images")
