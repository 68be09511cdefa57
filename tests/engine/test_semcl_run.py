"""Whole runs of SemCL: resuming with OneCycle, accumulation of gradients, ImageNet weights to start from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from multiprocess import run_in_processes
from tiny_runs import assert_identical, final_checkpoint, finetune_cfg, train
from tiny_semcl import register_pairs, semcl_model, semcl_run_cfg, write_labelled
from torch import Tensor

from d2_objssl.checkpoint import from_detectron2
from d2_objssl.data.collation import collate_views, split_batch
from d2_objssl.engine import Trainer
from d2_objssl.structures import ViewBatch


@pytest.fixture
def pairs(folder: Path, catalog: None) -> Path:
    """The folder of a test in which "tiny_pairs" can be trained on."""
    register_pairs("tiny_pairs", write_labelled(folder / "data"))
    return folder


# ------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_resumed_run_equals_the_uninterrupted_one(pairs: Path, steps: int) -> None:
    """Learning rate and beta1 of OneCycle included, with gradients accumulated or not."""
    opts = ("SOLVER.ACCUMULATION_STEPS", steps, "SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 2)
    whole = train(semcl_run_cfg(pairs / "whole", *opts))
    first = train(semcl_run_cfg(pairs / "parts", *opts), kill_before=3)
    second = train(semcl_run_cfg(pairs / "parts", *opts), resume=True, seed=12345)
    assert list(second) == [2, 3, 4]
    assert {**first, **second} == whole
    assert_identical(final_checkpoint(pairs / "parts"), final_checkpoint(pairs / "whole"))
    group = final_checkpoint(pairs / "whole")["trainer"]["_trainer"]["optimizer"]["param_groups"][0]
    assert group["betas"][0] > 0.92 and group["lr"] < 3e-4, "near the end of the cycle"
    assert (pairs / "whole" / "pair_index" / "tiny_pairs.npz").is_file()


# ------------------------------------------------------------------------------------------------ accumulation


def run_step(trainer: Trainer) -> dict[str, tuple[float, int]]:
    """Run the first step, without hooks; returns what was logged."""
    step = trainer._trainer
    with EventStorage() as step.storage:
        step.iter = 0
        step.run_step()
        return dict(step.storage.latest())


def test_split_batch() -> None:
    views = [
        ViewBatch(
            images=torch.rand(6, 3, 2, 2),
            crop_boxes=torch.rand(6, 4),
            hflip=torch.rand(6) < 0.5,
            region_maps=torch.randint(0, 9, (6, 2, 2)),
        )
    ]
    batch = collate_views(
        [
            {
                "file_name": str(i),
                "views": [
                    {
                        "image": v.images[i], "crop_box": v.crop_boxes[i], "hflip": v.hflip[i].item(),
                        "region_map": v.region_maps[i],
                    }
                    for v in views
                ],
            }
            for i in range(6)
        ]
    )  # fmt: skip
    assert split_batch(batch, 1) == [batch]
    parts = split_batch(batch, 3)
    assert [p.file_names for p in parts] == [["0", "1"], ["2", "3"], ["4", "5"]]
    for name in ("images", "crop_boxes", "hflip", "region_maps"):
        joined = torch.cat([getattr(p.views[0], name) for p in parts])
        assert torch.equal(joined, getattr(views[0], name)), name
    assert split_batch([{"a": 1}, {"a": 2}], 2) == [[{"a": 1}], [{"a": 2}]]


def test_accumulated_gradient_is_the_mean_over_parts(pairs: Path) -> None:
    """And so are the losses of the log; the teacher moves once."""
    cfg = semcl_run_cfg(pairs / "run", "SOLVER.ACCUMULATION_STEPS", 2, "SOLVER.MAX_ITER", 3)
    trainer = Trainer(cfg)
    model = trainer.checkpointer.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batch = next(trainer.data_loader.from_start())
    losses, gradients = [], []
    for part in split_batch(batch, 2):
        model.zero_grad()
        loss = model(part)["loss_pair"]
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.student.parameters()])
    model.load_state_dict(before)
    expected = [torch.stack(g).mean(0) for g in zip(*gradients, strict=True)]

    logged = run_step(trainer)["total_loss"][0]
    assert logged == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    for p, gradient in zip(model.student.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-7)


def test_fine_tuning_accumulates(folder: Path) -> None:
    opts = ("SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 1)
    losses = train(finetune_cfg(folder / "run", *opts, "SOLVER.ACCUMULATION_STEPS", 2))
    assert set(losses) == {0, 1} and all(x["total_loss"] > 0 for x in losses.values())


def test_accumulation_that_does_not_divide_the_batch_is_refused(pairs: Path) -> None:
    for steps in (3, 0):
        with pytest.raises(ValueError, match=f"SOLVER.ACCUMULATION_STEPS is {steps}; it must be a positive divisor"):
            Trainer(semcl_run_cfg(pairs / "run", "SOLVER.ACCUMULATION_STEPS", steps))


def test_accumulation_warns_that_it_adds_no_negatives(pairs: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Trainer(semcl_run_cfg(pairs / "run", "SOLVER.ACCUMULATION_STEPS", 2))
    assert "contrastive losses see 2 images of a process at a time" in caplog.text


def step_in_processes(folder: str) -> list[dict[str, Tensor]]:
    """Gradients of this process after one step on its half of the batch, at once and in two parts."""
    register_pairs("tiny_pairs", write_labelled(Path(folder) / f"data{comm.get_rank()}"))
    no_norm = [k for h in ("PROJECTOR", "PREDICTOR") for k in (f"MODEL.SSL.{h}.NORM", "")]
    gradients = []
    for steps in (1, 2):
        opts = ("SOLVER.ACCUMULATION_STEPS", steps, "MODEL.RESNETS.NORM", "")
        out = Path(folder) / f"run{comm.get_rank()}"  # so that each process has its own index
        torch.manual_seed(0)
        trainer = Trainer(semcl_run_cfg(out, *no_norm, *opts))
        run_step(trainer)
        parameters = trainer.checkpointer.model.named_parameters()
        gradients.append({k: p.grad for k, p in parameters if p.grad is not None})
    return gradients


def test_accumulation_in_two_processes(folder: Path) -> None:
    """Without batch norm the paired loss is a mean over images: parts change nothing."""
    ranks = run_in_processes(step_in_processes, str(folder))
    for name, gradient in ranks[0][0].items():
        torch.testing.assert_close(ranks[0][1][name], gradient, rtol=1e-3, atol=1e-6)
        assert torch.equal(ranks[0][1][name], ranks[1][1][name]), f"{name} differs between the processes"


# ------------------------------------------------------------------------------------------------ ImageNet weights


@pytest.mark.parametrize("layout", ["detectron2", "torchvision", "moco"])
def test_both_branches_start_from_an_imported_backbone(
    pairs: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    weights = {k: v for k, v in semcl_model(seed=7).student.backbone.state_dict().items()}
    if layout == "detectron2":
        saved: dict[str, Any] = {"model": weights}
    else:
        renamed = from_detectron2(weights, "torchvision")
        prefix = {"torchvision": "", "moco": "module.base_encoder."}[layout]
        saved = {"state_dict": {prefix + k: v for k, v in renamed.items()}} if prefix else renamed
    torch.save(saved, pairs / "imagenet.pth")
    trainer = Trainer(semcl_run_cfg(pairs / "run", "MODEL.WEIGHTS", str(pairs / "imagenet.pth")))
    with caplog.at_level(logging.INFO):
        trainer.resume_or_load(resume=False)
    model = trainer.checkpointer.model
    for branch in (model.student, model.teacher):
        for name, value in branch.backbone.state_dict().items():
            assert torch.equal(value, weights[name]) or name.endswith("num_batches_tracked"), name
    assert "parameters and statistics of the backbone were loaded from" in caplog.text
    assert "teacher.backbone.res5" in caplog.text and trainer.start_iter == 0
