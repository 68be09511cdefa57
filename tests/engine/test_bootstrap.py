"""Bootstrapping of region masks during training: when it is due, what it keeps, and that a kill changes nothing."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.utils.events import EventStorage
from test_resume import kill_when, run
from tiny_cyborgs import cyborgs_cfg, files_in, tiny_maker
from tiny_runs import Killed, assert_identical, final_checkpoint, register_wide_and_tall, train

from d2_objssl.data import register_image_folders
from d2_objssl.data.image_reading import read_rgb_image
from d2_objssl.data.region_png import read_png
from d2_objssl.engine import Trainer
from d2_objssl.engine.bootstrap import CyborgsPhases, MaskBootstrap, bootstrap_iterations
from d2_objssl.engine.feature_clustering import FeatureClusterer
from d2_objssl.engine.mask_report import MaskReport

# ---------------------------------------------------------------------------------------------- schedule


def test_masks_are_made_after_the_warm_up_and_at_the_multiples_of_the_period():
    """The paper's run: W = 5, N = 100, 800 epochs of COCO in batches of 64."""
    per_epoch = 118_287 / 64
    starts = bootstrap_iterations(5.0, 100.0, iterations_per_epoch=per_epoch, num_iterations=int(800 * per_epoch))
    assert [round(i / per_epoch, 3) for i in starts] == [5, 100, 200, 300, 400, 500, 600, 700]


@pytest.mark.parametrize(
    ("warmup", "period", "num", "expected"),
    [
        (0.8, 2.8, 300, [50, 175]),
        (0.0, 1.0, 130, [0, 62, 125]),
        (2.5, 1.0, 260, [156, 188, 250]),
        (1.0, 0.0, 1000, [62]),
        (2.0, 2.0, 300, [125, 250]),
        (9.0, 1.0, 300, []),
    ],
)
def test_schedule_with_62_and_a_half_iterations_an_epoch(warmup, period, num, expected):
    assert bootstrap_iterations(warmup, period, iterations_per_epoch=62.5, num_iterations=num) == expected


@pytest.mark.parametrize(("warmup", "period"), [(4, 3), (0, 1), (7, 0)])
def test_phases(warmup, period):
    """10 images in batches of 4: the epochs begin with the iterations 0, 3, 5, 8, 10, ..."""
    calls = []
    criterion = SimpleNamespace(set_phase=lambda warmup, consistency: calls.append((warmup, consistency)))
    hook = CyborgsPhases(criterion, warmup_iterations=warmup, period=period, num_images=10, batch_size=4)
    for iteration in range(30):
        hook.trainer = SimpleNamespace(iter=iteration)
        hook.before_step()
    epoch_of = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    for iteration, call in enumerate(calls):
        epoch = epoch_of[iteration % 10] + 4 * (iteration // 10)
        in_warmup = iteration < warmup
        assert call == (in_warmup, in_warmup or (period > 0 and epoch % period == 0)), iteration


@pytest.mark.parametrize(
    ("key", "value"), [("BOOTSTRAP_PERIOD", -1.0), ("VMF_PERIOD", -5), ("IMAGES_PER_CLUSTERING", 0)]
)
def test_settings_out_of_range_are_named(photos, folder, key, value):
    with pytest.raises(ValueError, match=f"MODEL.SSL.CYBORGS.{key} is {value}; it must be at least"):
        Trainer(cyborgs_cfg(photos, folder, f"MODEL.SSL.CYBORGS.{key}", value))


def test_a_wrong_feature_is_found_before_the_warm_up(photos, folder):
    with pytest.raises(ValueError, match=r'BOOTSTRAP_FEATURE is "res7\.1"'):
        train(cyborgs_cfg(photos, folder, "MODEL.SSL.CYBORGS.BOOTSTRAP_FEATURE", "res7.1"))


# ---------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """A run that was not interrupted: losses by iteration, its final checkpoint, its folder."""
    out = tmp_path_factory.mktemp("whole")
    losses = train(cyborgs_cfg(photos, out))
    return SimpleNamespace(losses=losses, final=final_checkpoint(out), folder=out)


def kill_in_round(monkeypatch, number, batch):
    """Let the clustering of this batch of this round raise `Killed`; returns the batches begun, as (round, batch)."""
    begun = []
    cluster = FeatureClusterer.cluster

    def stopping(self, images, seed):
        if len(seed) == 3:  # not a trial
            begun.append(seed[1:])
            if seed[1:] == (number, batch):
                raise Killed
        return cluster(self, images, seed)

    monkeypatch.setattr(FeatureClusterer, "cluster", stopping)
    return begun


def test_rounds_of_a_run(whole):
    """The losses of an iteration are logged one by one where there are several."""
    parts = [set(whole.losses[i]) - {"total_loss"} for i in range(8)]
    assert parts == [set()] * 2 + [{"loss_detcon", "loss_consistency"}] * 3 + [set()] * 3
    checkpoints = {f.name: torch.load(f, weights_only=True) for f in whole.folder.glob("model_0*.pth")}
    rounds = {name: c["trainer"]["hooks"]["MaskBootstrap"]["round"] for name, c in checkpoints.items()}
    # Periodic ones after 3 and 6 iterations, and one before each of the rounds at 2 and 5.
    assert rounds == {"model_0000001.pth": 0, "model_0000002.pth": 1, "model_0000004.pth": 1, "model_0000005.pth": 2}
    regions = sorted(f.name for f in (whole.folder / "regions").iterdir())
    assert regions == ["round_0001", "round_0001.png", "round_0002", "round_0002.png"]


@pytest.mark.parametrize(("number", "batch", "resumed_at", "workers"), [(1, 2, 2, 2), (2, 0, 5, 0)])
def test_killed_in_a_round(photos, folder, whole, monkeypatch, number, batch, resumed_at, workers):
    cfg = cyborgs_cfg(photos, folder, "DATALOADER.NUM_WORKERS", workers)
    with monkeypatch.context() as patch:
        kill_in_round(patch, number, batch)
        first = train_until_killed(cfg)
    assert list(first) == list(range(resumed_at))
    begun = kill_in_round(monkeypatch, None, None)
    second = train(cfg, resume=True, seed=12345)
    assert min(second) == resumed_at
    assert [b for r, b in begun if r == number] == list(range(batch, 4)), "what was done is not done again"
    assert {**first, **second} == whole.losses
    assert_identical(final_checkpoint(folder), whole.final)
    assert files_in(folder / "regions" / "round_0002") == files_in(whole.folder / "regions" / "round_0002")


def train_until_killed(cfg):
    """As `tiny_runs.train`, for runs that are killed by something in them."""
    return train(cfg, kill_before=cfg.SOLVER.MAX_ITER)


@pytest.mark.parametrize(("kill_before", "resumed_at", "workers"), [(2, 2, 2), (7, 6, 0)])
def test_killed_between_rounds(photos, folder, whole, kill_before, resumed_at, workers):
    """At 2 a round was completed, but the checkpoint is from before it; at 7 its masks are those of the checkpoint."""
    first = train(cyborgs_cfg(photos, folder, "DATALOADER.NUM_WORKERS", workers), kill_before=kill_before)
    second = train(cyborgs_cfg(photos, folder, "DATALOADER.NUM_WORKERS", 2 - workers), resume=True, seed=12345)
    assert min(second) == resumed_at
    assert {**first, **second} == whole.losses
    assert_identical(final_checkpoint(folder), whole.final)


def test_masks_that_are_gone_are_named(photos, folder):
    cfg = cyborgs_cfg(photos, folder)
    train(cfg, kill_before=4)
    shutil.rmtree(folder / "regions" / "round_0001")
    with pytest.raises(ValueError, match=r"(?s)regions/round_0001, are missing.*start again without --resume"):
        train(cfg, resume=True)


def test_a_damaged_last_checkpoint_finds_its_masks(photos, folder, whole):
    """The last two checkpoints are of round 2 (before iteration 6) and 1 (before iteration 5)."""
    cfg = cyborgs_cfg(photos, folder)
    first = train(cfg, kill_before=7)
    last = folder / "model_0000005.pth"
    last.write_bytes(last.read_bytes()[:1000])
    second = train(cfg, resume=True, seed=1)
    assert min(second) == 5
    assert {**first, **second} == whole.losses
    assert_identical(final_checkpoint(folder), whole.final)


def test_the_round_before_stays_until_the_new_one_is_complete(photos, folder, monkeypatch):
    kill_in_round(monkeypatch, 2, 3)
    train_until_killed(cyborgs_cfg(photos, folder))
    assert sorted(f.name for f in (folder / "regions").iterdir() if f.is_dir()) == ["round_0001", "round_0002.partial"]


def test_nothing_is_written_to_the_images_and_unreadable_ones_do_no_harm(photos, folder, caplog):
    shutil.copytree(photos, folder / "photos")
    (folder / "photos" / "004.jpg").write_bytes(b"")
    before = files_in(folder / "photos")
    caplog.set_level(logging.WARNING, "d2_objssl")
    cfg = cyborgs_cfg(folder / "photos", folder / "run", "SOLVER.MAX_ITER", 5, "DATALOADER.MAX_BAD_IMAGES", 0.5)
    assert len(train(cfg)) == 5
    assert files_in(folder / "photos") == before
    assert "004.jpg" in caplog.text and "it gets no region mask" in caplog.text
    assert len(files_in(folder / "run" / "regions" / "round_0001" / "maps")) == 19


def test_masks_of_another_source_are_not_bootstrapped(photos, folder):
    losses = train(cyborgs_cfg(photos, folder, "INPUT.REGIONS.SOURCE", "grid", "SOLVER.MAX_ITER", 3))
    assert set(losses[2]) > set(losses[1]), "but the warm-up stays"
    assert not (folder / "regions").exists()


@pytest.mark.slow
def test_killed_for_real(photos, folder):
    """SIGKILL while rounds are made, when some of their maps are there, with two workers."""
    cfg = cyborgs_cfg(photos, folder / "run", "DATALOADER.NUM_WORKERS", 2, "MODEL.SSL.CYBORGS.IMAGES_PER_CLUSTERING", 1)
    reference = cyborgs_cfg(photos, folder / "reference", "MODEL.SSL.CYBORGS.IMAGES_PER_CLUSTERING", 1)
    run(reference)
    kill_when(cfg, lambda out: len(list(out.glob("regions/round_0001.partial/maps/**/*.png"))) > 3)
    kill_when(cfg, lambda out: len(list(out.glob("regions/round_0002.partial/maps/**/*.png"))) > 3, "--resume")
    run(cfg, "--resume")
    assert_identical(final_checkpoint(folder / "run"), final_checkpoint(folder / "reference"))


# ---------------------------------------------------------------------------------------------- report


def test_the_quality_of_masks_of_labelled_scenes_is_logged(folder):
    """Of the second and last round; the average best overlap is computed here by loops over objects and regions."""
    register_wide_and_tall()
    train(cyborgs_cfg(folder, folder, "DATASETS.TRAIN", ("tiny_wide",), "SOLVER.MAX_ITER", 3))
    metrics = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    logged = {k: v for line in metrics for k, v in line.items() if k.startswith("bootstrap/")}
    dicts = DatasetCatalog.get("tiny_wide")
    overlaps, num_regions = [], []
    for d in dicts:
        stored = read_png(folder / "regions" / "round_0002" / "maps" / "images" / f"{Path(d['file_name']).name}.png")
        region_map = np.kron(stored, np.ones((8, 8), dtype=int))
        assert region_map.shape == (d["height"], d["width"])
        num_regions.append(len(np.unique(region_map)))
        for mask in annotations_to_instances(d["annotations"], region_map.shape, "bitmask").gt_masks.tensor.numpy():
            regions = [region_map == r for r in np.unique(region_map)]
            overlaps.append(max((mask & r).sum() / (mask | r).sum() for r in regions))
    assert logged["bootstrap/abo"] == pytest.approx(np.mean(overlaps))
    assert logged["bootstrap/recall"] == pytest.approx(np.mean(np.array(overlaps) >= 0.5))
    assert logged["bootstrap/regions"] == pytest.approx(np.mean(num_regions))


def test_a_report_without_labels_is_a_picture(photos, folder):
    maker = tiny_maker(photos)
    maker.make(1, folder / "round_0001", seed=0)
    with EventStorage() as storage:
        name = f"images:{photos}"
        register_image_folders([name])
        MaskReport(dataset=maker._dataset, dataset_names=[name]).write(folder / "round_0001", storage)
        assert storage.latest() == {}
        ((tag, image, _),) = storage._vis_data
    picture = read_rgb_image(str(folder / "round_0001.png"))
    assert tag == "bootstrap" and torch.equal(image, torch.from_numpy(picture).permute(2, 0, 1))
    assert picture.std() > 20


def test_rounds_are_deleted_when_two_checkpoints_do_not_need_them(folder):
    """Checkpoints are written with the rounds 1, 2, 2, 3 live; the folders of rounds 1 to 3 are there from the start."""
    for name in ("round_0001", "round_0001.partial", "round_0002", "round_0003", "mine"):
        (folder / name).mkdir()
    hook = MaskBootstrap(maker=None, report=None, starts=[], folder=folder)
    hook.trainer = SimpleNamespace(iter=0)
    left = []
    for live in (1, 2, 2, 3):
        hook.load_state_dict({"round": live}) if not left else setattr(hook, "_live", live)
        assert hook.state_dict() == {"round": live}
        hook.before_step()
        left.append(sorted(f.name for f in folder.iterdir()))
    everything = ["mine", "round_0001", "round_0001.partial", "round_0002", "round_0003"]
    assert left == [everything, everything, ["mine", "round_0002", "round_0003"], ["mine", "round_0002", "round_0003"]]
