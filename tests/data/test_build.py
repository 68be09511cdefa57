"""The training loader: order, randomness, seeking, unreadable images."""

import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetFromList, MetadataCatalog
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.structures import BoxMode
from PIL import Image
from stored_maps import store_maps

from d2_objssl.config import add_objssl_config
from d2_objssl.data import SSLBatch, build_train_loader
from d2_objssl.data.build import MappedDataset
from d2_objssl.data.loading import load_dataset_dicts
from d2_objssl.data.sampling import ResumableBatchSampler

SIZE = 23


def take(iterable: Iterable[Any], count: int) -> list[Any]:
    return list(itertools.islice(iterable, count))


def make_sampler(batch: int, **kwargs: Any) -> ResumableBatchSampler:
    return ResumableBatchSampler(SIZE, batch, **{"seed": 5, "rank": 0, "world_size": 1, **kwargs})


# ------------------------------------------------------------------------------------------------------- sampler


def test_every_epoch_visits_every_image_once_in_a_new_order():
    keys = [key for batch in take(make_sampler(4), 46) for key in batch]  # 8 epochs
    epochs = [[index for index, _, _ in keys[i : i + SIZE]] for i in range(0, 8 * SIZE, SIZE)]
    assert all(sorted(epoch) == list(range(SIZE)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert [position for _, position, _ in keys] == list(range(8 * SIZE))
    assert {seed for _, _, seed in keys} == {5}


def test_the_order_follows_from_the_seed():
    assert take(make_sampler(4), 10) == take(make_sampler(4), 10)
    assert take(make_sampler(4), 10) != take(make_sampler(4, seed=6), 10)


GROUPS = np.array([0, 1, 1, 0, 2] * 5)[:SIZE]
REPEATS = np.linspace(0.3, 2.6, SIZE)


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["mixed", "grouped"])
@pytest.mark.parametrize("repeats", [None, REPEATS], ids=["once", "repeated"])
@pytest.mark.parametrize("rank", [0, 1])
def test_seeking_equals_skipping(groups, repeats, rank):
    make = lambda: make_sampler(6, groups=groups, repeat_factors=repeats, rank=rank, world_size=2)  # noqa: E731
    whole = take(make(), 40)
    for start in (0, 1, 3, 4, 8, 23, 37):  # within and beyond the first epoch of 23 images, and at odd places
        sampler = make()
        sampler.start_batch = start
        assert take(sampler, 40 - start) == whole[start:]


def test_a_sampler_can_be_iterated_again():
    sampler = make_sampler(4, groups=GROUPS)
    assert take(sampler, 12) == take(sampler, 12)


@pytest.mark.parametrize("repeats", [None, REPEATS], ids=["once", "repeated"])
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_together_see_what_one_process_sees(processes, repeats):
    alone = take(make_sampler(12, repeat_factors=repeats), 20)
    ranks = [
        take(make_sampler(12, repeat_factors=repeats, rank=rank, world_size=processes), 20) for rank in range(processes)
    ]
    together = [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert together == alone


def test_repeat_factors_are_how_often_an_image_appears_on_average():
    factors = np.array([0.25, 1.0, 1.5, 3.0])
    sampler = ResumableBatchSampler(4, 5, seed=0, repeat_factors=factors, rank=0, world_size=1)
    stream = (index for batch in sampler for index, _, _ in batch)
    epochs = 2000
    counts = Counter(take(stream, int(epochs * factors.sum())))
    assert [counts[i] / epochs for i in range(4)] == pytest.approx(factors, abs=0.05)


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_are_of_one_group(rank):
    for batch in take(make_sampler(8, groups=GROUPS, rank=rank, world_size=2), 30):
        assert len(batch) == 4
        assert len({GROUPS[index] for index, _, _ in batch}) == 1


def test_fractional_repeats_are_drawn_anew_each_epoch():
    """Detectron2 does so too: floor(r) or one more, so that every epoch has its own images twice."""
    factors = np.full(SIZE, 1.5)
    stream = (index for batch in make_sampler(1, repeat_factors=factors) for index, _, _ in batch)
    epochs, seen = [], Counter()
    for epoch in range(4):
        order = make_sampler(1, repeat_factors=factors).epoch_order(epoch)
        assert take(stream, len(order)) == order.tolist()
        epochs.append(Counter(order.tolist()))
        seen += epochs[-1]
    assert all(set(counts) == set(range(SIZE)) and set(counts.values()) == {1, 2} for counts in epochs)
    assert len({frozenset(c.items()) for c in epochs}) == 4
    assert sum(seen.values()) == pytest.approx(4 * SIZE * 1.5, rel=0.15)


def test_no_group_is_left_out():
    seen = Counter(GROUPS[index] for batch in take(make_sampler(4, groups=GROUPS), 230) for index, _, _ in batch)
    expected = Counter(GROUPS.tolist())
    for group, count in expected.items():
        assert seen[group] == pytest.approx(40 * count, rel=0.03)


@pytest.mark.parametrize("rank", [0, 1])
def test_groups_equal_detectron2s_aspect_ratio_grouping(rank):
    """Each process groups its share of one endless order, as Detectron2's sampler and grouping together do."""
    rng = np.random.default_rng(3)
    dicts = [{"width": int(w), "height": int(h), "i": i} for i, (w, h) in enumerate(rng.integers(1, 9, (SIZE, 2)))]
    order = (index for batch in make_sampler(1) for index, _, _ in batch)
    mine = itertools.islice(order, rank, None, 2)
    expected = [
        [d["i"] for d in batch] for batch in take(AspectRatioGroupedDataset((dicts[i] for i in mine), batch_size=3), 30)
    ]
    groups = np.array([d["width"] > d["height"] for d in dicts])
    sampler = make_sampler(6, groups=groups, rank=rank, world_size=2)
    assert [[index for index, _, _ in batch] for batch in take(sampler, 30)] == expected


@pytest.mark.parametrize(("batch", "processes"), [(5, 2), (0, 1), (1, 2), (-4, 2)])
def test_batches_that_cannot_be_shared_out_are_refused(batch, processes):
    with pytest.raises(ValueError, match=f"SOLVER.IMS_PER_BATCH is {batch}.* multiple of .*{processes}"):
        make_sampler(batch, world_size=processes)


def test_an_empty_training_set_is_refused():
    with pytest.raises(ValueError, match="empty"):
        ResumableBatchSampler(0, 4, seed=0)


# ------------------------------------------------------------------------------------------------------- dataset


def global_state() -> list[Any]:
    name, keys, *rest = np.random.get_state()
    return [random.getstate(), name, keys.tolist(), rest, torch.get_rng_state().tolist()]


def draw(dataset_dict: dict[str, Any]) -> dict[str, Any]:
    """A mapper that uses all three global generators."""
    return {**dataset_dict, "draws": (random.random(), np.random.rand(), torch.rand(()).item())}


def test_a_sample_follows_from_its_key_alone():
    dataset = MappedDataset([{"file_name": str(i)} for i in range(9)], draw)
    first = dataset[4, 100, 7]
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    dataset[1, 2, 3]
    assert dataset[4, 100, 7] == first
    others = [dataset[key]["draws"] for key in ((4, 101, 7), (4, 100, 8))]
    assert len({first["draws"], *others}) == 3
    assert len({x for draws in (first["draws"], *others) for x in draws}) == 9
    assert dataset[5, 100, 7]["draws"] == first["draws"]  # the position counts, not the image


def test_the_global_generators_are_left_untouched():
    def fail(dataset_dict: dict[str, Any]) -> dict[str, Any]:
        draw(dataset_dict)
        raise KeyError("a bug")

    before = global_state()
    MappedDataset([{"file_name": "a"}], draw)[0, 1, 2]
    with pytest.raises(KeyError):
        MappedDataset([{"file_name": "a"}], fail)[0, 1, 2]
    assert global_state() == before


# -------------------------------------------------------------------------------------------------------- loader


IMAGE_SIZES = ((48, 64), (64, 48), (50, 50))  # width, height


def write_images(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        noise.resize(IMAGE_SIZES[i % 3], Image.Resampling.BICUBIC).save(folder / f"{i:03d}.jpg")


@pytest.fixture
def folder(tmp_path: Path, catalog: None) -> Path:
    write_images(tmp_path / "images", 20)
    return tmp_path / "images"


def make_cfg(name: str, *opts: object) -> CfgNode:
    """A pretraining config of data set `name`."""
    cfg = get_cfg()
    add_objssl_config(cfg)
    base = ("DATASETS.TRAIN", (name,), "INPUT.FORMAT", "RGB", "INPUT.SSL.NUM_VIEWS", 2, "INPUT.SSL.CROP_SIZE", 32)
    cfg.merge_from_list([*base, "SOLVER.IMS_PER_BATCH", 4, "DATALOADER.NUM_WORKERS", 0, "SEED", 3, *opts])
    return cfg


def equal(a: SSLBatch, b: SSLBatch) -> bool:
    return a.file_names == b.file_names and all(
        torch.equal(u.images, v.images) and torch.equal(u.crop_boxes, v.crop_boxes) and torch.equal(u.hflip, v.hflip)
        for u, v in zip(a.views, b.views, strict=True)
    )


def equal_regions(a: SSLBatch, b: SSLBatch) -> bool:
    maps = [(u.region_maps, v.region_maps) for u, v in zip(a.views, b.views, strict=True)]
    return all(x is not None and y is not None and torch.equal(x, y) for x, y in maps)


def test_pretraining_batches_are_stacked_views(folder):
    loader = build_train_loader(make_cfg(f"images:{folder}"))
    assert loader.num_images == 20
    batch = next(iter(loader))
    assert isinstance(batch, SSLBatch) and len(batch) == 4 and len(batch.views) == 2
    for view in batch.views:
        assert (view.images.shape, view.images.dtype) == ((4, 3, 32, 32), torch.uint8)
        assert (view.crop_boxes.shape, view.crop_boxes.dtype) == ((4, 4), torch.float32)
        assert (view.hflip.shape, view.hflip.dtype) == ((4,), torch.bool)
        assert view.region_maps is None
    assert len(set(batch.file_names)) == 4 and batch.replaced == []


def test_workers_and_earlier_draws_do_not_change_the_batches(folder):
    alone = take(build_train_loader(make_cfg(f"images:{folder}")), 7)
    torch.manual_seed(99)
    np.random.seed(99)
    before = global_state()
    workers = build_train_loader(make_cfg(f"images:{folder}", "DATALOADER.NUM_WORKERS", 2))
    assert all(equal(a, b) for a, b in zip(alone, workers, strict=False))
    assert global_state() == before
    other = take(build_train_loader(make_cfg(f"images:{folder}", "SEED", 4)), 7)
    assert not any(equal(a, b) for a, b in zip(alone, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_seeking_gives_the_batches_of_the_uninterrupted_run(folder, workers):
    whole = take(build_train_loader(make_cfg(f"images:{folder}")), 9)
    loader = build_train_loader(make_cfg(f"images:{folder}", "DATALOADER.NUM_WORKERS", workers))
    loader.seek(6)
    assert all(equal(a, b) for a, b in zip(take(loader, 3), whole[6:], strict=True))


def test_without_a_seed_each_run_has_its_own(folder):
    np.random.seed(0)
    seeds = {build_train_loader(make_cfg(f"images:{folder}", "SEED", -1)).sampler.seed for _ in range(2)}
    assert len(seeds) == 2


def test_the_file_list_is_one_array_that_workers_share(folder):
    """A list of dicts would be copied into every worker, page by page, by reference counting."""
    dataset = build_train_loader(make_cfg(f"images:{folder}")).loader.dataset
    assert isinstance(dataset, MappedDataset) and isinstance(dataset.dataset, DatasetFromList)
    assert dataset.dataset[3] == dataset.dataset[3]
    assert dataset.dataset[3] is not dataset.dataset[3], "it is unpacked anew every time"


@pytest.fixture
def boxes(folder: Path) -> str:
    """A data set with boxes: every image has one, but for the first."""
    dicts = []
    for i, file in enumerate(sorted(folder.iterdir())):
        width, height = IMAGE_SIZES[i % 3]
        box = {"bbox": [4, 4, 30, 30], "bbox_mode": BoxMode.XYXY_ABS, "category_id": i % 2}
        size = {"height": height, "width": width}
        dicts.append({"file_name": str(file), "image_id": i, **size, "annotations": [box] if i else []})
    DatasetCatalog.register("test_build_boxes", lambda: dicts)
    MetadataCatalog.get("test_build_boxes").set(thing_classes=["a", "b"])
    return "test_build_boxes"


FINETUNE = ("INPUT.SSL.NUM_VIEWS", 0, "INPUT.MIN_SIZE_TRAIN", (32,))


def test_fine_tuning_batches_have_one_orientation(boxes):
    loader = build_train_loader(make_cfg(boxes, *FINETUNE))
    assert loader.num_images == 19  # without the image that has no box
    assert loader.sampler.groups is not None
    assert loader.sampler.groups.tolist() == [i % 3 == 1 for i in range(1, 20)], "square images go with the tall ones"
    for batch in take(loader, 12):
        assert len(batch) == 4 and all("instances" in d for d in batch)
        assert len({d["width"] > d["height"] for d in batch}) == 1
    ungrouped = build_train_loader(make_cfg(boxes, *FINETUNE, "DATALOADER.ASPECT_RATIO_GROUPING", False))
    assert any(len({d["width"] > d["height"] for d in batch}) == 2 for batch in take(ungrouped, 12))


@pytest.mark.parametrize("workers", [0, 2])
def test_seeking_in_fine_tuning(boxes, workers):
    whole = take(build_train_loader(make_cfg(boxes, *FINETUNE)), 8)
    loader = build_train_loader(make_cfg(boxes, *FINETUNE, "DATALOADER.NUM_WORKERS", workers))
    loader.seek(5)
    for ours, theirs in zip(take(loader, 3), whole[5:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a["file_name"] == b["file_name"] and torch.equal(a["image"], b["image"])
            assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)


def test_pretraining_takes_images_without_labels_and_forgets_the_labels(boxes):
    cfg = make_cfg(boxes)
    assert cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    dicts = load_dataset_dicts(cfg)
    assert len(dicts) == 20
    assert all(set(d) == {"file_name", "image_id"} for d in dicts)


def test_pretraining_mixes_labelled_sets_and_folders(boxes, tmp_path):
    write_images(tmp_path / "more", 3)
    cfg = make_cfg(boxes, "DATASETS.TRAIN", (boxes, f"images:{tmp_path}/more"))
    assert len(load_dataset_dicts(cfg)) == 23


REPEAT = ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 0.9)


def test_repeat_factor_sampling(boxes):
    cfg = make_cfg(boxes, *FINETUNE, *REPEAT)
    factors = build_train_loader(cfg).sampler.repeat_factors
    assert factors is not None and factors.shape == (19,) and (factors > 1).any()


def test_repeat_factor_sampling_needs_labels(boxes, folder):
    with pytest.raises(ValueError, match=r'SAMPLER_TRAIN is "RepeatFactorTrainingSampler".*DATASETS\.TRAIN .*has none'):
        build_train_loader(make_cfg(f"images:{folder}", *REPEAT))


def test_samplers_that_cannot_resume_are_refused(boxes):
    with pytest.raises(ValueError, match=r'DATALOADER\.SAMPLER_TRAIN is "RandomSubsetTrainingSampler"'):
        build_train_loader(make_cfg(boxes, *FINETUNE, "DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"))


def test_no_data_set_at_all():
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN is empty.*images:/path"):
        build_train_loader(make_cfg("", "DATASETS.TRAIN", ()))


def test_a_missing_folder_is_named(catalog):
    with pytest.raises(FileNotFoundError, match="/nowhere/at/all"):
        build_train_loader(make_cfg("images:/nowhere/at/all"))


# ---------------------------------------------------------------------------------------------- unreadable images


def break_image(file: Path, how: str) -> None:
    if how == "truncated":
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "text":
        file.write_text("<html>404 not found</html>")
    else:
        assert how == "vanished"
        file.unlink()


KINDS = ["truncated", "empty", "text", "vanished"]


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("phase", ["pretraining", "fine-tuning"])
def test_an_unreadable_image_is_replaced_counted_and_reported_once(folder, boxes, caplog, how, phase):
    cfg = make_cfg(f"images:{folder}") if phase == "pretraining" else make_cfg(boxes, *FINETUNE)
    loader = build_train_loader(cfg)
    bad = folder / "007.jpg"
    break_image(bad, how)
    with caplog.at_level(logging.WARNING, "d2_objssl"):
        batches = take(loader, 15)  # 60 samples, 3 epochs
    names = [n for b in batches for n in (b.file_names if phase == "pretraining" else [d["file_name"] for d in b])]
    assert len(names) == 60 and str(bad) not in names
    assert loader.bad_images.num_bad == 3 or phase == "fine-tuning"  # grouping may leave the last one in a bucket
    assert loader.bad_images.num_bad >= 2
    assert loader.bad_images.num_seen == 60 + loader.bad_images.num_bad
    messages = [r.getMessage() for r in caplog.records if str(bad) in r.getMessage()]
    assert len(messages) == 1 and "another image takes its place" in messages[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_replacements_are_deterministic(folder, workers):
    for name, how in zip(("003.jpg", "011.jpg", "015.jpg"), KINDS, strict=False):
        break_image(folder / name, how)
    opts = ("DATALOADER.MAX_BAD_IMAGES", 1.0)
    first = take(build_train_loader(make_cfg(f"images:{folder}", *opts)), 10)
    assert any(batch.replaced for batch in first)
    again = build_train_loader(make_cfg(f"images:{folder}", *opts, "DATALOADER.NUM_WORKERS", workers))
    for a, b in zip(first, again, strict=False):
        assert equal(a, b)
        assert [path for path, _ in a.replaced] == [path for path, _ in b.replaced]
    sought = build_train_loader(make_cfg(f"images:{folder}", *opts))
    sought.seek(4)
    assert all(equal(a, b) for a, b in zip(first[4:], sought, strict=False))


def test_too_many_unreadable_images_stop_the_run(folder):
    for i in range(8):
        break_image(folder / f"{i:03d}.jpg", "text")
    loader = build_train_loader(make_cfg(f"images:{folder}"))
    with pytest.raises(RuntimeError, match=r"DATALOADER\.MAX_BAD_IMAGES \(5%\).*00\d\.jpg"):
        take(loader, 100)
    assert loader.bad_images.num_bad > 10
    patient = build_train_loader(make_cfg(f"images:{folder}", "DATALOADER.MAX_BAD_IMAGES", 0.9))
    assert len(take(patient, 20)) == 20


def test_a_few_unreadable_images_at_the_start_do_not_stop_the_run(folder):
    """One bad image in the first batch is 20 %, but says nothing yet."""
    break_image(folder / "000.jpg", "empty")
    loader = build_train_loader(make_cfg(f"images:{folder}", "DATALOADER.MAX_BAD_IMAGES", 0.01))
    assert len(take(loader, 10)) == 10
    assert loader.bad_images.num_bad == 2


def test_nothing_readable_at_all_ends_with_an_error_not_a_loop(folder):
    for file in folder.iterdir():
        break_image(file, "empty")
    loader = build_train_loader(make_cfg(f"images:{folder}"))
    with pytest.raises(RuntimeError, match=r"could not be read.*images/\d+\.jpg.*DATASETS\.TRAIN"):
        next(iter(loader))


def test_errors_that_are_no_unreadable_images_are_not_hidden(boxes):
    def mapper(dataset_dict: dict[str, Any]) -> dict[str, Any]:
        raise KeyError("a bug in a mapper")

    with pytest.raises(KeyError, match="a bug in a mapper"):
        next(iter(build_train_loader(make_cfg(boxes, *FINETUNE), mapper)))


# -------------------------------------------------------------------------------------------------------- regions


@pytest.fixture
def labelled(folder: Path) -> str:
    """A data set with objects and label maps; in the maps, image i has the label i everywhere, but 50 at the top."""
    dicts = []
    (folder.parent / "labels").mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        width, height = IMAGE_SIZES[i % 3]
        labels = np.full((height, width), i, dtype=np.uint8)
        labels[:3] = 50
        sem_seg = folder.parent / "labels" / f"{file.stem}.png"
        Image.fromarray(labels).save(sem_seg)
        item = {"bbox": [4, 4, 30, 30], "bbox_mode": BoxMode.XYXY_ABS, "category_id": i % 2, "iscrowd": 0}
        item["segmentation"] = [[4.0, 4.0, 30.0, 4.0, 30.0, 30.0]]
        record = {"file_name": str(file), "image_id": i, "height": height, "width": width}
        dicts.append({**record, "annotations": [item], "sem_seg_file_name": str(sem_seg)})
    DatasetCatalog.register("test_build_labelled", lambda: dicts)
    MetadataCatalog.get("test_build_labelled").set(ignore_label=50, image_root=str(folder))
    return "test_build_labelled"


def regions(source: str, *opts: object) -> tuple[object, ...]:
    """KEY VALUE pairs; those of `opts` are below INPUT.REGIONS."""
    named = [f"INPUT.REGIONS.{o}" if i % 2 == 0 else o for i, o in enumerate(opts)]
    return ("INPUT.REGIONS.SOURCE", source, *named)


def store(name: str, root: Path, value: int = 0) -> str:
    """Region maps of a data set in a folder; those of image i have the id i + value everywhere."""
    dicts = load_dataset_dicts(make_cfg(name, *regions("bootstrap")))
    maps = [np.full(IMAGE_SIZES[i % 3][::-1], i + value) for i in range(len(dicts))]
    return store_maps(root, dicts, maps)


@pytest.mark.parametrize(
    ("source", "keys"),
    [
        ("grid", set()),
        ("felzenszwalb", set()),
        ("instances", {"height", "width", "annotations"}),
        ("sem_seg", {"sem_seg_file_name", "ignore_label"}),
        ("bootstrap", {"region_key"}),
    ],
)
def test_dataset_dicts_keep_what_the_source_of_regions_needs(labelled, source, keys):
    dicts = load_dataset_dicts(make_cfg(labelled, *regions(source)))
    assert len(dicts) == 20 and all(set(d) == {"file_name", "image_id"} | keys for d in dicts)
    if source == "instances":
        assert all(a.keys() == {"segmentation"} for d in dicts for a in d["annotations"])
    if source == "bootstrap":
        assert dicts[3]["region_key"] == "images/003.jpg"


@pytest.mark.parametrize("workers", [0, 2])
def test_region_maps_follow_from_the_position(labelled, workers):
    """Felzenszwalb's settings are drawn at random, but do not depend on workers and seeking either."""
    opts = regions("felzenszwalb", "FELZENSZWALB", ((10.0, 10), (100.0, 200)))
    whole = take(build_train_loader(make_cfg(labelled, *opts)), 6)
    for batch in whole:
        assert all(v.region_maps is not None and v.region_maps.dtype == torch.int16 for v in batch.views)
        assert not any(v.overlapping for v in batch.views)
    assert sum(equal_regions(whole[0], b) for b in whole) == 1
    loader = build_train_loader(make_cfg(labelled, *opts, "DATALOADER.NUM_WORKERS", workers))
    loader.seek(3)
    assert all(equal(a, b) and equal_regions(a, b) for a, b in zip(whole[3:], loader, strict=False))


@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_has_its_own_region_map(labelled, tmp_path, workers):
    root = store(labelled, tmp_path / "maps")
    workers_and_root = ("DATALOADER.NUM_WORKERS", workers, *regions("file", "ROOT", root))
    for opts in (workers_and_root, regions("sem_seg")):
        for batch in take(build_train_loader(make_cfg(labelled, *opts)), 5):
            for view in batch.views:
                for file, region_map in zip(batch.file_names, view.region_maps, strict=True):
                    assert set(region_map.unique().tolist()) - {-1} == {int(Path(file).stem)}


@pytest.mark.parametrize(
    ("source", "key"), [("instances", "annotations"), ("sem_seg", "sem_seg_file_name")], ids=["instances", "sem_seg"]
)
def test_images_without_the_labels_of_the_source_are_counted_before_training(labelled, tmp_path, source, key):
    write_images(tmp_path / "more", 7)
    cfg = make_cfg(labelled, "DATASETS.TRAIN", (labelled, f"images:{tmp_path}/more"), *regions(source))
    with pytest.raises(ValueError, match=f'7 image.*"{key}".*INPUT.REGIONS.SOURCE "{source}".*more/000.jpg'):
        build_train_loader(cfg)


def test_missing_region_maps_are_counted_before_training(labelled, tmp_path):
    root = store(labelled, tmp_path / "maps")
    write_images(tmp_path / "more", 3)
    cfg = make_cfg(labelled, "DATASETS.TRAIN", (labelled, f"images:{tmp_path}/more"), *regions("file", "ROOT", root))
    with pytest.raises(ValueError, match=r"(?s)23 images.*3 missing from the index: more/000\.jpg"):
        build_train_loader(cfg)


def test_two_folders_of_one_name_are_refused(labelled, tmp_path):
    write_images(tmp_path / "other" / "images", 2)
    names = (labelled, f"images:{tmp_path}/other/images")
    with pytest.raises(ValueError, match=r"images/000\.jpg.*other/images/000\.jpg"):
        build_train_loader(make_cfg(labelled, "DATASETS.TRAIN", names, *regions("bootstrap")))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("source", ["sem_seg", "file"])
def test_a_map_of_another_size_stops_the_run(labelled, tmp_path, source, workers):
    root = store(labelled, tmp_path / "maps")
    opts = ("DATALOADER.NUM_WORKERS", workers, *regions(source, "ROOT", root))
    loader = build_train_loader(make_cfg(labelled, *opts))
    file = tmp_path / ("labels/005.png" if source == "sem_seg" else "maps/maps/images/005.jpg.png")
    Image.fromarray(np.ones((9, 9), dtype=np.uint8)).save(file)
    with pytest.raises(ValueError, match=r"005\.(jpg\.)?png.* 9 x 9 .* 50 x 50"):
        take(loader, 10)


@pytest.mark.parametrize("source", ["sem_seg", "file"])
def test_an_image_whose_map_vanished_is_replaced_counted_and_reported_once(labelled, tmp_path, caplog, source):
    root = store(labelled, tmp_path / "maps")
    loader = build_train_loader(make_cfg(labelled, *regions(source, "ROOT", root)))
    is_file = source == "file"
    vanished = tmp_path / "maps" / "maps" / "images" / "007.jpg.png" if is_file else tmp_path / "labels" / "007.png"
    vanished.unlink()
    with caplog.at_level(logging.WARNING, "d2_objssl"):
        names = [name for batch in take(loader, 15) for name in batch.file_names]  # 3 epochs
    assert len(names) == 60 and not any("007.jpg" in name for name in names)
    assert loader.bad_images.num_bad == 3
    messages = [r.getMessage() for r in caplog.records if str(vanished) in r.getMessage()]
    assert len(messages) == 1 and "another image takes its place" in messages[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_bootstrapped_maps_appear_with_their_folder(labelled, tmp_path, workers):
    loader = build_train_loader(make_cfg(labelled, "DATALOADER.NUM_WORKERS", workers, *regions("bootstrap")))
    assert loader.region_root is None
    before = take(loader, 4)
    assert all(view.region_maps is None for batch in before for view in batch.views)
    for value in (0, 100):
        loader.set_region_root(store(labelled, tmp_path / str(value), value))
        assert loader.region_root == str(tmp_path / str(value))
        loader.seek(2)
        for a, b in zip(before[2:], loader, strict=False):
            assert equal(a, b), "the views stay the same"
            for view in b.views:
                ids = [int(Path(file).stem) + value for file in b.file_names]
                assert view.region_maps.amax(dim=(1, 2)).tolist() == ids
                assert view.region_maps.amin(dim=(1, 2)).tolist() == ids
    loader.set_region_root(None)
    assert loader.region_root is None and next(iter(loader)).views[0].region_maps is None


def test_a_folder_of_bootstrapped_maps_is_checked(labelled, tmp_path):
    loader = build_train_loader(make_cfg(labelled, *regions("bootstrap")))
    root = store(labelled, tmp_path / "maps")
    (tmp_path / "maps" / "maps" / "images" / "004.jpg.png").unlink()
    with pytest.raises(ValueError, match=r"(?s)20 images.*1 without a file: images/004\.jpg"):
        loader.set_region_root(root)
    with pytest.raises(ValueError, match="/nowhere/at/all"):
        loader.set_region_root("/nowhere/at/all")


def test_other_sources_take_no_folder(folder):
    for opts in ((), regions("grid")):
        loader = build_train_loader(make_cfg(f"images:{folder}", *opts))
        assert loader.region_root is None
        with pytest.raises(ValueError, match=r'INPUT\.REGIONS\.SOURCE "file" or "bootstrap"'):
            loader.set_region_root("maps")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_with_too_many_regions_are_counted_and_reported_once(folder, caplog, workers):
    opts = regions("felzenszwalb", "FELZENSZWALB", ((1.0, 0),))
    cfg = make_cfg(f"images:{folder}", "MODEL.SSL.DETCON.MAX_REGION_IDS", 3, "DATALOADER.NUM_WORKERS", workers, *opts)
    loader = build_train_loader(cfg)
    with caplog.at_level(logging.WARNING, "d2_objssl"):
        batches = take(loader, 3)
    assert loader.num_cut == 12
    assert len([r for r in caplog.records if "MODEL.SSL.DETCON.MAX_REGION_IDS" in r.getMessage()]) == 1
    assert {int(i) for b in batches for v in b.views for i in v.region_maps.unique()} <= {-1, 0, 1, 2}
