"""A round of bootstrapping: what it clusters, what it writes, and what is left of one that was interrupted."""

import json
import logging
import os
import random
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_backbone
from detectron2.utils import comm
from multiprocess import run_in_processes
from PIL import Image
from tiny_cyborgs import SETTINGS, files_in, normalize, tiny_maker
from tiny_runs import Killed, pretrain_cfg

from d2_objssl.data.image_reading import read_rgb_image
from d2_objssl.data.region_files import RegionIndex
from d2_objssl.engine import feature_clustering
from d2_objssl.engine.feature_clustering import MAX_SIDE, FeatureClusterer, read_ahead, read_bounded


@pytest.fixture
def network(photos):
    """A narrow R50 whose batch-norm statistics are not those of its initialisation."""
    torch.manual_seed(3)
    backbone = build_backbone(pretrain_cfg(photos, photos, "MODEL.RESNETS.NORM", "BN")).train()
    for file in sorted(photos.iterdir())[:4]:
        backbone(normalize(torch.from_numpy(read_rgb_image(str(file))).permute(2, 0, 1)[None]))
    return backbone


def clusterer(network, **kwargs):
    options = {"normalize": normalize, "settings": SETTINGS, "device_type": "cpu", "dtype": None}
    return FeatureClusterer(network, **{**options, **kwargs})


# ---------------------------------------------------------------------------------------------- clustering


def test_labels_are_those_of_the_nearest_centroid_of_the_block_that_is_named(photos, network, monkeypatch):
    """The features are taken here from the block by a hook, in a network that runs to its end."""
    images = [read_rgb_image(str(f)) for f in sorted(photos.iterdir())[:3]]
    found = {}

    def kmeans(features, num_clusters, iterations, seed):
        found["centroids"], labels = spherical_kmeans(features, num_clusters, iterations, seed)
        return found["centroids"], labels

    spherical_kmeans = feature_clustering.spherical_kmeans
    monkeypatch.setattr(feature_clustering, "spherical_kmeans", kmeans)
    maps = clusterer(network).cluster(images, (0, 1, 2))

    outputs = []
    network.res3[1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    network.eval()
    for image, labels in zip(images, maps, strict=True):
        with torch.no_grad():
            network(normalize(torch.from_numpy(image).permute(2, 0, 1)[None]))
        cells = F.normalize(outputs[-1][0], dim=0)
        expected = torch.einsum("kc,chw->khw", found["centroids"], cells).argmax(dim=0)
        assert labels.dtype == np.int32 and labels.shape == (-(-image.shape[0] // 8), -(-image.shape[1] // 8))
        assert np.array_equal(labels, expected.numpy())
    assert len(np.unique(maps[0])) > 1


def test_the_network_and_the_random_generators_are_left_alone(photos, network):
    before = {k: v.clone() for k, v in network.state_dict().items()}
    trained = [p.requires_grad for p in network.parameters()]
    states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    maker = clusterer(network)
    maps = maker.cluster([read_rgb_image(str(f)) for f in sorted(photos.iterdir())[:2]], (0,))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(m.training for m in network.modules()) and [p.requires_grad for p in network.parameters()] == trained
    assert random.getstate() == states[0] and np.random.get_state()[1].tobytes() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert len(maps) == 2


def test_the_number_of_clusters_is_drawn_from_the_whole_range(network, monkeypatch):
    drawn = []

    def kmeans(features, num_clusters, iterations, seed):
        drawn.append(num_clusters)
        return torch.zeros(0), torch.zeros(len(features), dtype=torch.int64)

    monkeypatch.setattr(feature_clustering, "spherical_kmeans", kmeans)
    one = clusterer(network)
    image = np.zeros((16, 16, 3), dtype=np.uint8)
    for batch in range(60):
        one.cluster([image], (0, 1, batch))
    assert set(drawn) == set(range(SETTINGS.min_clusters, SETTINGS.max_clusters + 1))
    assert one.cluster([], (0,)) == []


def test_half_precision_gives_nearly_the_same_features(network, photos):
    image = read_rgb_image(str(sorted(photos.iterdir())[0]))
    exact, half = clusterer(network), clusterer(network, dtype=torch.bfloat16)
    assert exact.describe()["precision"] != half.describe()["precision"]
    with torch.no_grad():
        a, b = exact._features(image), half._features(image)
    assert a.dtype == b.dtype == torch.float32
    assert not torch.equal(a, b) and F.cosine_similarity(a, b, dim=0).min() > 0.98


def test_large_images_are_reduced_and_unreadable_ones_named(tmp_path):
    Image.new("RGB", (2 * MAX_SIDE, MAX_SIDE // 2), (255, 0, 0)).save(tmp_path / "large.png")
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    large, bad = read_bounded(str(tmp_path / "large.png")), read_bounded(str(tmp_path / "bad.jpg"))
    assert large.pixels.shape == (MAX_SIDE // 4, MAX_SIDE, 3) and large.size == (MAX_SIDE // 2, 2 * MAX_SIDE)
    assert bad.pixels is None and "bad.jpg" in bad.reason


def test_reading_ahead_keeps_the_order(photos):
    files = [str(f) for f in sorted(photos.iterdir())]
    batches = [files[:7], files[7:8], [], files[8:14], files[14:]]
    read = list(read_ahead(iter(batches)))
    assert [len(images) for images in read] == [7, 1, 0, 6, 6]
    flat = [image for images in read for image in images]
    assert all(np.array_equal(i.pixels, read_rgb_image(f)) for i, f in zip(flat, files, strict=True))


# ---------------------------------------------------------------------------------------------- files


def stop_before_batch(monkeypatch, number):
    """Let the clustering of this batch raise `Killed`; returns the numbers of the batches that were begun."""
    begun = []
    cluster = FeatureClusterer.cluster

    def stopping(self, images, seed):
        begun.append(seed[-1])
        if seed[-1] == number:
            raise Killed
        return cluster(self, images, seed)

    monkeypatch.setattr(FeatureClusterer, "cluster", stopping)
    return begun


def test_every_image_gets_a_map_and_nothing_is_written_to_the_images(photos, folder):
    before = files_in(photos)
    maker = tiny_maker(photos)
    maker.make(1, folder / "round", seed=0)
    index = RegionIndex.load(folder / "round")
    dataset = maker._dataset
    index.check(dataset, SETTINGS.max_clusters)
    assert index.num_images == 20 and not index.overlapping
    for d in dataset:
        height, width = read_rgb_image(d["file_name"]).shape[:2]
        region_map = index.read(d["region_key"], height, width)
        assert region_map.shape == (-(-height // 8), -(-width // 8)) and region_map.min() >= 0
    assert files_in(photos) == before
    assert [f.name for f in folder.iterdir()] == ["round"]


def test_an_image_that_is_listed_twice_has_one_mask(photos, folder):
    tiny_maker(photos).make(1, folder / "once", seed=0)
    twice = tiny_maker(photos, repeat=2)
    assert len(twice._dataset) == 40
    twice.make(1, folder / "twice", seed=0)
    assert files_in(folder / "twice" / "maps") == files_in(folder / "once" / "maps")


def test_rounds_and_seeds_differ(photos, folder):
    maker = tiny_maker(photos)
    for name, number, seed in (("a", 1, 0), ("b", 2, 0), ("c", 1, 1), ("d", 1, 0)):
        maker.make(number, folder / name, seed=seed)
    a, b, c, d = (files_in(folder / name / "maps") for name in "abcd")
    assert a != b and a != c and b != c and a == d


def test_an_interrupted_round_goes_on_with_what_is_left(photos, folder, monkeypatch):
    tiny_maker(photos).make(1, folder / "whole", seed=0)
    with monkeypatch.context() as patch:
        stop_before_batch(patch, 2)
        with pytest.raises(Killed):
            tiny_maker(photos).make(1, folder / "parts", seed=0)
    assert [f.name for f in folder.iterdir() if f.name != "whole"] == ["parts.partial"]
    begun = stop_before_batch(monkeypatch, None)
    tiny_maker(photos).make(1, folder / "parts", seed=0)
    assert begun == [2, 3]
    assert files_in(folder / "parts") == files_in(folder / "whole")
    tiny_maker(photos).make(1, folder / "parts", seed=0)
    assert begun == [2, 3], "a complete round is not made again"


@pytest.mark.parametrize("complete", [False, True])
def test_masks_of_another_network_are_not_used(photos, folder, monkeypatch, complete):
    tiny_maker(photos, seed=1).make(1, folder / "whole", seed=0)
    with monkeypatch.context() as patch:
        stop_before_batch(patch, None if complete else 2)
        if complete:
            tiny_maker(photos, seed=0).make(1, folder / "parts", seed=0)
        else:
            with pytest.raises(Killed):
                tiny_maker(photos, seed=0).make(1, folder / "parts", seed=0)
    begun = stop_before_batch(monkeypatch, None)
    tiny_maker(photos, seed=1).make(1, folder / "parts", seed=0)
    assert begun == [0, 1, 2, 3]
    assert files_in(folder / "parts") == files_in(folder / "whole")


def test_an_image_that_changed_meanwhile_is_clustered_again(photos, folder, monkeypatch):
    shutil.copytree(photos, folder / "photos")
    with monkeypatch.context() as patch:
        stop_before_batch(patch, 3)
        with pytest.raises(Killed):
            tiny_maker(folder / "photos").make(1, folder / "parts", seed=0)
    shutil.copy(folder / "photos" / "000.jpg", folder / "photos" / "007.jpg")
    begun = stop_before_batch(monkeypatch, None)
    tiny_maker(folder / "photos").make(1, folder / "parts", seed=0)
    assert begun == [1, 3]


def test_unreadable_images_are_warned_about_and_have_no_map(photos, folder, caplog):
    shutil.copytree(photos, folder / "photos")
    (folder / "photos" / "004.jpg").write_bytes(b"")
    caplog.set_level(logging.INFO, "d2_objssl")
    maker = tiny_maker(folder / "photos")
    maker.make(1, folder / "round", seed=0)
    assert "004.jpg" in caplog.text and "1 images could not be read" in caplog.text
    content = json.loads((folder / "round" / "index.json").read_text())
    assert (content["num_images"], content["num_unreadable"]) == (20, 1)
    assert len(list((folder / "round" / "maps").rglob("*.png"))) == 19
    RegionIndex.load(folder / "round").check(maker._dataset, SETTINGS.max_clusters)


def test_too_many_unreadable_images_stop_the_run(photos, folder):
    shutil.copytree(photos, folder / "photos")
    for i in range(12):
        (folder / "photos" / f"{i:03d}.jpg").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"12 of 12 images .* DATALOADER.MAX_BAD_IMAGES \(20%\)"):
        tiny_maker(folder / "photos").make(1, folder / "round", seed=0)


def test_a_folder_that_cannot_be_written_is_named(photos, folder):
    (folder / "regions").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"(?s)region masks to .*regions/round_0001.partial.*--resume"):
        tiny_maker(photos).make(1, folder / "regions" / "round_0001", seed=0)


# ---------------------------------------------------------------------------------------------- processes


def _make(photos, root):
    torch.set_num_threads(1)
    tiny_maker(photos).make(1, root, seed=0)
    return len(os.listdir(root))


def test_masks_do_not_depend_on_the_number_of_processes(photos, folder):
    run_in_processes(_make, photos, folder / "two")
    torch.set_num_threads(1)
    _make(photos, folder / "one")
    assert files_in(folder / "two") == files_in(folder / "one")


def _fail_in_one(photos, root):
    maker = tiny_maker(photos)
    if comm.get_rank() == 1:

        def fail(*args):
            raise OSError(28, "No space left on device")

        maker._write = fail
    try:
        maker.make(1, root, seed=0)
    except (OSError, RuntimeError) as error:
        return str(error)
    return "nothing was raised"


def test_all_processes_end_when_one_has_no_space_left(photos, folder):
    first, second = run_in_processes(_fail_in_one, photos, folder / "round", timeout=60.0)
    assert first.startswith("Process 1 of 2 failed: OSError: Cannot write region masks to") and "No space left" in first
    assert second.startswith("Cannot write region masks to") and "No space left" in second
    assert not (folder / "round").exists()


def test_folded_batch_norms_change_rounding_only(photos, network):
    """The statistics and scales are random ones, so that a fold of the wrong layer would show."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight.data, module.running_var):
                values.copy_(torch.rand(values.shape, generator=generator) + 0.5)
            module.bias.data.copy_(torch.randn(module.bias.shape, generator=generator))
    image = read_rgb_image(str(sorted(photos.iterdir())[0]))
    ours = clusterer(network)
    features = ours._features(image)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in ours._network.modules())
    network.eval()
    with torch.no_grad():
        pixels = normalize(torch.from_numpy(image).permute(2, 0, 1)[None])
        expected = feature_clustering.features_at(network, pixels, SETTINGS.feature)[0]
    assert (features - expected).abs().max() < 1e-4 * expected.abs().max()
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules())  # the copy alone was changed
