"""The trainer of both phases: runs on CPUs, in autocast, guarded against NaN, with the right hooks and evaluators."""

import json
import logging
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase, hooks
from detectron2.utils.events import EventStorage
from tiny_runs import assert_identical, final_checkpoint, finetune_cfg, pretrain_cfg, train

from d2_objssl.data import SSLBatch
from d2_objssl.engine import EMATeacher, RandomState, Trainer
from d2_objssl.engine.hooks import Checkpoints, Evaluation, PreciseBN
from d2_objssl.engine.train_step import amp_dtype


def metrics(output_dir: Path) -> dict[str, list[float]]:
    """Values of every metric, in the order of the iterations."""
    values: dict[str, list[float]] = {}
    for line in (output_dir / "metrics.json").read_text().splitlines():
        for key, value in json.loads(line).items():
            values.setdefault(key, []).append(value)
    return values


# ------------------------------------------------------------------------------------------------------- pretraining


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_pretraining_on_a_cpu(photos, folder, amp):
    losses = train(pretrain_cfg(photos, folder, "SOLVER.MAX_ITER", 4, "SOLVER.AMP.ENABLED", amp))
    assert list(losses) == [0, 1, 2, 3]
    assert all(set(x) == {"total_loss", "loss_group", "loss_slot"} for x in losses.values())
    assert all(math.isfinite(v) for x in losses.values() for v in x.values())
    final = torch.load(folder / "model_final.pth", weights_only=True)
    assert final["trainer"]["iteration"] == 3
    assert {k.split(".")[0] for k in final["model"]} == {"student", "teacher", "criterion"}
    assert all(v.isfinite().all() for v in final["model"].values())


def test_the_student_learns_and_the_teacher_follows(photos, folder):
    trainer = Trainer(pretrain_cfg(photos, folder, "SOLVER.MAX_ITER", 3))
    student, teacher = trainer.model.student, trainer.model.teacher
    before = [[p.clone() for p in module.parameters()] for module in (student, teacher)]
    trainer.train()
    for module, old in zip((student, teacher), before, strict=True):
        assert any(not torch.equal(p, q) for p, q in zip(module.parameters(), old, strict=True))
    moved = [
        sum(float((p - q).detach().norm()) for p, q in zip(module.parameters(), old, strict=True))
        for module, old in zip((student, teacher), before, strict=True)
    ]
    assert 0 < moved[1] < 0.1 * moved[0], "the teacher is the slow one"
    assert not any(p.requires_grad for p in teacher.parameters())


def test_twenty_iterations_lower_the_loss_and_log_the_metrics(photos, folder):
    opts = ("SOLVER.OPTIMIZER", "ADAMW", "SOLVER.BASE_LR", 0.002, "SOLVER.MAX_ITER", 20, "SOLVER.CHECKPOINT_PERIOD", 99)
    losses = [x["total_loss"] for x in train(pretrain_cfg(photos, folder, *opts)).values()]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    logged = metrics(folder)
    assert logged["iteration"][-1] == 19
    for key in ("active_slots", "positive_pairs", "dead_prototypes", "feature_std", "teacher_momentum", "lr"):
        assert math.isfinite(logged[key][-1]), key
    assert 1 <= logged["active_slots"][-1] <= 8
    assert 0 <= logged["positive_pairs"][-1] <= logged["active_slots"][-1]
    assert 0.99 <= logged["teacher_momentum"][-1] <= 1


def test_pictures_are_logged(photos, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(EventStorage, "put_image", lambda self, name, image: seen.append((self.iter, name, image.ndim)))
    train(pretrain_cfg(photos, folder, "SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 9, "VIS_PERIOD", 2))
    assert seen == [(0, "views", 3), (0, "regions", 3), (2, "views", 3), (2, "regions", 3)]


def test_order_of_the_hooks(photos, folder):
    """The teacher moves before the checkpoint is written, the generators are read after all else has drawn."""
    kinds = [type(h) for h in Trainer(pretrain_cfg(photos, folder)).build_hooks() if h is not None]
    order = [EMATeacher, hooks.LRScheduler, RandomState, Checkpoints, Evaluation]
    assert [k for k in kinds if k in order] == order
    finetune = [type(h) for h in Trainer(finetune_cfg(folder, "TEST.PRECISE_BN.ENABLED", True)).build_hooks()]
    order = [PreciseBN, RandomState, Checkpoints, Evaluation]
    assert [k for k in finetune if k in order] == order
    assert EMATeacher not in finetune and hooks.PreciseBN not in finetune


def test_old_checkpoints_are_deleted(photos, folder):
    opts = ("SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_TO_KEEP", 2)
    train(pretrain_cfg(photos, folder, *opts))
    assert {p.name for p in folder.glob("*.pth")} == {"model_0000003.pth", "model_0000004.pth", "model_final.pth"}


def test_unreadable_images_are_summed_up_at_the_end(photos, folder, caplog):
    """In a folder whose name is no UTF-8, too."""
    odd = folder / os.fsdecode(b"photos \xe9")
    shutil.copytree(photos, odd)
    (odd / "003.jpg").write_text("no image")
    caplog.set_level(logging.WARNING, "d2_objssl")
    train(pretrain_cfg(odd, folder / "run", "SOLVER.MAX_ITER", 5))  # one epoch
    listed = folder / "run" / "bad_images.tsv"
    assert "1 of 21 images read by this process could not be decoded" in caplog.text and str(listed) in caplog.text
    (line,) = listed.read_text(encoding="utf-8").splitlines()
    assert "photos \\udce9/003.jpg\t" in line and "cannot identify" in line


# -------------------------------------------------------------------------------------------------------- NaN guard


class Poison(HookBase):
    """Makes the batches of one iteration produce NaN."""

    def __init__(self, iteration: int) -> None:
        self._iteration = iteration

    def before_step(self) -> None:
        if self.trainer.iter == self._iteration:
            self.trainer.model.pixel_std.zero_()  # black pixels become 0 / 0


def run_poisoned(cfg: Any, iteration: int) -> str:
    """Returns the message of the FloatingPointError."""
    trainer = Trainer(cfg)
    trainer.register_hooks([Poison(iteration)])
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    return str(error.value)


def test_nan_stops_pretraining_before_it_reaches_the_weights(photos, folder):
    message = run_poisoned(pretrain_cfg(photos, folder), 4)
    assert "at iteration 4" in message and "loss_group" in message and "SOLVER.BASE_LR" in message
    assert str(folder / "model_0000002.pth") in message, "the last good checkpoint"
    file = folder / "nonfinite_batch_0000004_rank0.pth"
    assert str(file) in message
    batch = torch.load(file, weights_only=True)
    assert len(batch["file_names"]) == 4 and all(Path(f).exists() for f in batch["file_names"])
    assert [v["images"].shape for v in batch["views"]] == [(4, 3, 64, 64)] * 2
    assert batch["views"][0]["images"].dtype == torch.uint8 and batch["views"][0]["crop_boxes"].shape == (4, 4)


def test_nan_before_the_first_checkpoint(photos, folder):
    assert "none was written yet" in run_poisoned(pretrain_cfg(photos, folder), 1)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_nan_in_fine_tuning_saves_the_labels_too(folder, mask_format):
    message = run_poisoned(finetune_cfg(folder, "INPUT.MASK_FORMAT", mask_format), 0)
    # Detectron2's RPN notices first, and would say neither where nor when.
    assert "at iteration 0: Predicted boxes or scores contain Inf/NaN" in message and "SOLVER.BASE_LR" in message
    batch = torch.load(folder / "nonfinite_batch_0000000_rank0.pth", weights_only=True)
    assert len(batch) == 4
    for image in batch:
        assert image["image"].dtype == torch.uint8 and Path(image["file_name"]).exists()
        count = len(image["instances"]["gt_classes"])
        assert image["instances"]["gt_boxes"]["tensor"].shape == (count, 4)
        masks = image["instances"]["gt_masks"]
        if mask_format == "bitmask":
            assert masks["tensor"].dtype == torch.bool and len(masks["tensor"]) == count
        else:
            assert len(masks["polygons"]) == count
            assert all(isinstance(p, torch.Tensor) and len(p) >= 6 for polygons in masks["polygons"] for p in polygons)


# -------------------------------------------------------------------------------------------------------- precision


def autocast_dtypes(cfg: Any) -> set[torch.dtype | None]:
    """What autocast computes the convolutions of the training steps in; None where it is off."""
    seen: set[torch.dtype | None] = set()
    trainer = Trainer(cfg)
    conv = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.Conv2d))
    conv.register_forward_hook(
        lambda *_: seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
    )
    trainer.train()
    return seen


def test_autocast_runs_on_cpus(photos, folder):
    one = ("SOLVER.MAX_ITER", 1, "SOLVER.WARMUP_ITERS", 0)
    assert autocast_dtypes(pretrain_cfg(photos, folder / "a", *one)) == {None}
    assert autocast_dtypes(pretrain_cfg(photos, folder / "b", *one, "SOLVER.AMP.ENABLED", True)) == {torch.bfloat16}


def test_float16_falls_back_on_cpus(photos, folder, caplog):
    caplog.set_level(logging.WARNING, "d2_objssl")
    amp = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16")
    one = ("SOLVER.MAX_ITER", 1, "SOLVER.WARMUP_ITERS", 0)
    assert autocast_dtypes(pretrain_cfg(photos, folder, *amp, *one)) == {torch.bfloat16}
    assert '"float16" is meant for GPUs' in caplog.text


def test_amp_dtype(photos, folder):
    cfg = pretrain_cfg(
        photos, folder, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16", "MODEL.DEVICE", "cuda"
    )
    assert amp_dtype(cfg) is torch.float16
    assert amp_dtype(pretrain_cfg(photos, folder, "SOLVER.AMP.DTYPE", "float16")) is None
    with pytest.raises(ValueError, match=r'SOLVER\.AMP\.DTYPE is "half"; known: .*bfloat16'):
        amp_dtype(pretrain_cfg(photos, folder, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "half"))


def test_autocast_is_off_where_naive_sync_bn_would_lose_precision(photos, folder, caplog):
    caplog.set_level(logging.WARNING, "d2_objssl")
    cfg = pretrain_cfg(photos, folder, "SOLVER.AMP.ENABLED", True, "MODEL.RESNETS.NORM", "naiveSyncBN")
    assert amp_dtype(cfg) is None
    assert "AMP is off" in caplog.text


# ------------------------------------------------------------------------------------------------------- fine-tuning


def test_fine_tuning_and_evaluation(folder):
    test = ("DATASETS.TEST", ("scenes_tiny_val",), "TEST.EVAL_PERIOD", 2, "SOLVER.MAX_ITER", 4)
    losses = train(finetune_cfg(folder, *test))
    assert all(math.isfinite(v) for x in losses.values() for v in x.values())
    assert {"loss_mask", "loss_rpn_cls"} <= losses[0].keys()
    # Nothing is found after so few iterations: the figures may be NaN, but they must be there, once per evaluation.
    logged = metrics(folder)
    assert len(logged["bbox/AP"]) == 2


def test_results_of_the_last_evaluation_are_returned(folder):
    """TEST.EXPECTED_RESULTS are checked, as in Detectron2."""
    test = ("DATASETS.TEST", ("scenes_tiny_val",), "SOLVER.MAX_ITER", 1, "SOLVER.WARMUP_ITERS", 0)
    trainer = Trainer(finetune_cfg(folder, *test, "TEST.EXPECTED_RESULTS", [["bbox", "AP", 50.0, 60.0]]))
    results = trainer.train()
    assert "AP" in results["bbox"]


def test_the_folder_is_locked_until_the_last_evaluation_is_over(folder, monkeypatch):
    """For other processes: the operating system's locks are those of a process."""
    command = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'ab'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    errors = []

    def try_to_lock(*_: Any) -> dict[str, Any]:
        other = [sys.executable, "-c", command, str(folder / ".train.lock")]
        errors.append(subprocess.run(other, stderr=subprocess.PIPE, text=True).stderr)
        return {}

    monkeypatch.setattr(Trainer, "test", try_to_lock)
    train(finetune_cfg(folder, "SOLVER.MAX_ITER", 1, "SOLVER.WARMUP_ITERS", 0))
    try_to_lock()
    during, after = errors
    assert "BlockingIOError" in during and after == ""


def test_training_does_not_depend_on_evaluations(folder, monkeypatch):
    """RoI sampling draws from the generator that an evaluation has used; no checkpoint lies between them."""
    monkeypatch.setattr(
        Trainer, "test", lambda *_: {"drawn": random.random() + np.random.rand() + torch.rand(1).item()}
    )
    opts = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 100)
    losses = [train(finetune_cfg(folder / str(period), *opts, "TEST.EVAL_PERIOD", period)) for period in (0, 2)]
    assert losses[0] == losses[1]
    never, every = (final_checkpoint(folder / str(period))["trainer"]["hooks"]["RandomState"] for period in (0, 2))
    assert_identical(never, every)


@pytest.fixture
def broken_test_set(folder, catalog):
    """A test set of the classes of the scenes, whose image is empty."""
    (folder / "a.jpg").touch()
    DatasetCatalog.register("broken", lambda: [{"file_name": str(folder / "a.jpg"), "annotations": []}])
    scenes = MetadataCatalog.get("scenes_tiny_val")
    MetadataCatalog.get("broken").set(thing_classes=scenes.thing_classes, evaluator_type="coco")
    return "broken"


def test_a_broken_test_set_is_found_before_the_model_is_built(folder, broken_test_set, monkeypatch):
    monkeypatch.setattr(Trainer, "build_model", lambda cfg: pytest.fail("the model is built"))
    with pytest.raises(OSError, match=r'1 image\(s\) of DATASETS\.TEST "broken"'):
        Trainer(finetune_cfg(folder, "DATASETS.TEST", ("scenes_tiny_val", broken_test_set)))


def test_eval_only_finds_a_broken_test_set_before_it_tests_another_one(folder, broken_test_set, load_tool, monkeypatch):
    cfg = finetune_cfg(folder, "DATASETS.TEST", ("scenes_tiny_val", broken_test_set), "MODEL.WEIGHTS", "x.pth")
    train_net = load_tool("train_net")
    monkeypatch.setattr(Trainer, "test", lambda *args: pytest.fail("the test runs"))
    monkeypatch.setattr(train_net.ObjSSLCheckpointer, "resume_or_load", lambda *args, **kwargs: None)
    with pytest.raises(OSError, match=r'1 image\(s\) of DATASETS\.TEST "broken"'):
        train_net.evaluate(cfg, SimpleNamespace(resume=False, config_file=""))


def test_a_data_set_without_evaluator_is_refused(photos, folder):
    cfg = finetune_cfg(folder, "DATASETS.TEST", (f"images:{photos}",))
    with pytest.raises(ValueError, match=r'DATASETS\.TEST names "images:.*cannot be evaluated'):
        Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])


def test_precise_bn_averages_over_the_first_batches():
    """Every update gives the mean over the same batches of the batches' own statistics."""
    torch.manual_seed(0)
    batches = [torch.randn(6, 2, 3, 3) + i for i in range(5)]
    model = torch.nn.BatchNorm2d(2).train()
    hook = PreciseBN(2, model, lambda: iter(batches), num_iter=3)

    class Clock:
        iter, max_iter = 0, 5

    hook.trainer = Clock()
    expected = torch.stack([b.mean(dim=(0, 2, 3)) for b in batches[:3]]).mean(0)
    updated = []
    for hook.trainer.iter in range(5):
        model.running_mean.fill_(99.0)
        hook.after_step()
        if (model.running_mean != 99).all():
            updated.append(hook.trainer.iter)
            assert torch.allclose(model.running_mean, expected, atol=1e-6)
    assert updated == [1, 3, 4]
    assert model.momentum == 0.1 and model.training


def test_precise_bn_leaves_the_training_batches_alone(folder):
    """The loader of the hook is another one; its losses are no training losses."""
    one = ("SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.WARMUP_ITERS", 1)
    plain = train(finetune_cfg(folder / "a", *one))
    precise = train(finetune_cfg(folder / "b", *one, "TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2))
    assert precise == plain
    a, b = (torch.load(folder / x / "model_final.pth", weights_only=True)["model"] for x in "ab")
    differ = {k.rsplit(".", 1)[1] for k in a if not torch.equal(a[k], b[k])}
    assert {"running_mean", "running_var"} <= differ <= {"running_mean", "running_var", "num_batches_tracked"}


def test_a_pretraining_batch_is_collated_in_the_loader(photos, folder):
    trainer = Trainer(pretrain_cfg(photos, folder))
    assert isinstance(next(iter(trainer.data_loader)), SSLBatch)
