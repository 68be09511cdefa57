"""Mistakes in a config: all of them in one message, before anything is read or written."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from tiny_cyborgs import cyborgs_cfg
from tiny_runs import finetune_cfg, pretrain_cfg
from tiny_slotcon import REPO_ROOT

from d2_objssl import add_objssl_config
from d2_objssl.engine import Trainer, setup_cfg
from d2_objssl.engine.config_checks import check_config, find_mistakes, run_checks
from d2_objssl.engine.disk_space import DiskSpace, checkpoint_bytes

QUICK = str(REPO_ROOT / "configs" / "quick" / "slotcon_R_18_scenes.yaml")

# KEY VALUE, and what the message says of it.
BROKEN: list[tuple[str, str, str]] = [
    ("SOLVER.MAX_ITERS", "7", r"SOLVER.MAX_ITERS (command line): there is no such key; did you mean SOLVER.MAX_ITER"),
    ("SOLVER.BASE_LR", "fast", "SOLVER.BASE_LR"),
    ("DATASETS.TRAIN", "('images:/no/such/folder',)", "there is no /no/such/folder"),
    ("DATASETS.TEST", "('coco_2017_vall',)", "no registered data set; did you mean coco_2017_val"),
    ("MODEL.WEIGHTS", "no.pth", 'MODEL.WEIGHTS is "no.pth"; there is no such file'),
    ("MODEL.SSL.METHOD", "Slotcon", 'MODEL.SSL.METHOD is "Slotcon"; known: CYBORGS'),
    ("INPUT.FORMAT", "BGR", 'INPUT.FORMAT is "BGR"'),
    ("MODEL.BACKBONE.FREEZE_AT", "2", "MODEL.BACKBONE.FREEZE_AT is 2; it must be 0 in pretraining"),
    ("MODEL.PIXEL_STD", "[0.229, 0.224, 0.225]", "pixels are from 0 to 255"),
    ("INPUT.SSL.NUM_VIEWS", "0", "INPUT.SSL.NUM_VIEWS is 0; pretraining works on augmented views"),
    ("INPUT.SSL.CROP_SCALE", "(1.0, 0.08)", "INPUT.SSL.CROP_SCALE is (1.0, 0.08); it must be two numbers, the smaller"),
    ("INPUT.SSL.BLUR_PROB", "[1.0, 1.5]", "INPUT.SSL.BLUR_PROB is [1.0, 1.5]; it must be from 0 to 1"),
    ("MODEL.SSL.SLOTCON.STUDENT_TEMP", "0.0", "MODEL.SSL.SLOTCON.STUDENT_TEMP is 0.0; it must be more than 0"),
    ("MODEL.SSL.TEACHER.MOMENTUM", "1.5", "MODEL.SSL.TEACHER.MOMENTUM is 1.5; it must be from 0 to 1"),
    ("MODEL.SSL.TEACHER.MOMENTUM_SCHEDULE", "cosin", "did you mean cosine?"),
    ("MODEL.SSL.IN_FEATURES", "['res6']", "MODEL.SSL.IN_FEATURES names ['res6']; MODEL.RESNETS.OUT_FEATURES has"),
    ("MODEL.SSL.GRID_FEATURE", "res7", "MODEL.SSL.GRID_FEATURE is \"res7\"; it must be one of IN_FEATURES, ['res6']"),
    ("INPUT.REGIONS.SOURCE", "file", 'INPUT.REGIONS.ROOT is ""; there is no such folder'),
    ("SOLVER.OPTIMIZER", "ADAM", 'SOLVER.OPTIMIZER is "ADAM"; known: ADAMW, LARS, SGD'),
    ("SOLVER.IMS_PER_BATCH", "30", "SOLVER.ACCUMULATION_STEPS is 4; it must be a positive divisor"),
    ("SOLVER.ACCUMULATION_STEPS", "4", "SOLVER.ACCUMULATION_STEPS is 4; it must be a positive divisor"),
    ("SOLVER.MAX_ITER", "10", "SOLVER.WARMUP_ITERS is 20; it must be less than SOLVER.MAX_ITER, 10"),
    ("SOLVER.WARMUP_ITERS", "20", "SOLVER.WARMUP_ITERS is 20; it must be less than SOLVER.MAX_ITER, 10"),
    ("SOLVER.CHECKPOINT_PERIOD", "0", "SOLVER.CHECKPOINT_PERIOD is 0; it must be more than 0"),
]


def test_all_mistakes_are_in_one_message() -> None:
    opts = [word for key, value, _ in BROKEN for word in (key, value)]
    with pytest.raises(ValueError, match=r"^\d+ mistakes in the config:\n 1\. ") as error:
        setup_cfg(QUICK, opts, for_training=True)
    missing = [expected for _, _, expected in BROKEN if expected not in str(error.value)]
    assert not missing, str(error.value)
    assert str(error.value).startswith(f"{len({e for _, _, e in BROKEN})} mistakes"), str(error.value)


def test_tools_that_do_not_train_may_have_other_values() -> None:
    assert setup_cfg(QUICK, ["SOLVER.MAX_ITER", "0", "DATASETS.TRAIN", "()"]).SOLVER.MAX_ITER == 0


def test_the_trainer_checks_before_it_reads_the_data(photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Trainer, "build_train_loader", lambda cfg: pytest.fail("the data set was read"))
    cfg = pretrain_cfg(photos, tmp_path, "MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.SSL.SLOTCON.SLOT_TEMP", -1.0)
    with pytest.raises(ValueError, match=r"(?s)2 mistakes in the config.*SLOT_TEMP is -1\.0.*FREEZE_AT is 2"):
        Trainer(cfg)


def test_what_the_method_refuses_is_listed_too(photos: Path, tmp_path: Path) -> None:
    """Its heads are built for that, without memory and without a random number."""
    state = torch.get_rng_state()
    opts = ("INPUT.REGIONS.SOURCE", "none", "MODEL.SSL.DETCON.TEMP", 0.0)
    assert len(find_mistakes(cyborgs_cfg(photos, tmp_path, *opts))) == 2
    opts = ("MODEL.SSL.CYBORGS.MIN_CLUSTERS", 9, "INPUT.SSL.NUM_VIEWS", 2)
    (mistake,) = find_mistakes(cyborgs_cfg(photos, tmp_path, *opts))
    assert "MODEL.SSL.CYBORGS.MAX_CLUSTERS is 6; it must be at least 9" in mistake
    (mistake,) = find_mistakes(pretrain_cfg(photos, tmp_path, "INPUT.SSL.NUM_VIEWS", 6))
    assert "INPUT.SSL.NUM_VIEWS is 6, but SlotCon works on 2 views" in mistake
    assert torch.equal(torch.get_rng_state(), state)


def test_mistakes_of_fine_tuning(tmp_path: Path) -> None:
    opts = ("INPUT.SSL.NUM_VIEWS", 2, "INPUT.LSJ.MIN_SCALE", 2.0, "DATASETS.TRAIN_FRACTION", 0.0)
    assert len(find_mistakes(finetune_cfg(tmp_path, *opts))) == 3
    cfg = finetune_cfg(tmp_path, "MODEL.WEIGHTS", "gone.pth")
    assert len(find_mistakes(cfg)) == 1
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    assert not find_mistakes(cfg), "a run that is resumed does not read MODEL.WEIGHTS"
    assert not find_mistakes(finetune_cfg(tmp_path, "MODEL.WEIGHTS", "https://example.org/r50.pkl"))
    default = get_cfg()
    add_objssl_config(default)
    default.DATASETS.TRAIN = ("coco_2017_train",)
    assert not find_mistakes(default), "Detectron2's own defaults are for its own weights"


@pytest.mark.parametrize("processes", [3, 4])
def test_batches_of_several_processes(photos: Path, tmp_path: Path, monkeypatch: Any, processes: int) -> None:
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: processes)
    mistakes = find_mistakes(pretrain_cfg(photos, tmp_path))
    expected = "SOLVER.IMS_PER_BATCH is 4; it must be a multiple of the number of processes, 3"
    assert mistakes == ([expected] if processes == 3 else [])


def test_what_is_only_odd_is_a_warning(photos: Path, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.WARNING, "d2_objssl")

    def warnings(cfg: CfgNode) -> list[str]:
        caplog.clear()
        check_config(cfg)
        return [r.getMessage() for r in caplog.records]

    assert not warnings(pretrain_cfg(photos, tmp_path))
    (message,) = warnings(finetune_cfg(tmp_path))
    assert "MODEL.WEIGHTS IS EMPTY" in message
    opts = ("MODEL.RESNETS.STRIDE_IN_1X1", True, "TEST.EVAL_PERIOD", 5, "MODEL.SSL.CYBORGS.MAX_CLUSTERS", 17)
    opts += ("MODEL.SSL.DETCON.NUM_REGIONS", 18, "MODEL.SSL.DETCON.MAX_REGION_IDS", 17)
    text = " ".join(warnings(cyborgs_cfg(photos, tmp_path, *opts)))
    assert all(key in text for key in ("STRIDE_IN_1X1", "EVAL_PERIOD is 5", "only 16 cells", "NUM_REGIONS is 18"))


def test_run_checks_collects_what_each_check_raises() -> None:
    def refuse(text: str) -> None:
        raise ValueError(text)

    run_checks(lambda: None)
    with pytest.raises(ValueError, match=r"2 mistakes in the config:\n 1\. a\n 2\. b$"):
        run_checks(lambda: refuse("a"), lambda: None, lambda: refuse("b"))


# ------------------------------------------------------------------------------------------------------- disk space


def test_checkpoint_bytes_are_those_of_a_checkpoint(photos: Path, folder: Path) -> None:
    opts = ("SOLVER.OPTIMIZER", "ADAMW", "SOLVER.MAX_ITER", 1, "SOLVER.WARMUP_ITERS", 0)
    trainer = Trainer(pretrain_cfg(photos, folder, *opts))
    estimate = checkpoint_bytes(trainer.checkpointer.model, trainer.optimizer)
    trainer.train()
    size = (folder / "model_final.pth").stat().st_size
    assert 0.6 * size < estimate < size  # names and states of generators are a large part of so small a one


@pytest.mark.parametrize(
    ("start", "keep", "num_old", "expected"),
    [(0, None, 0, 11), (50, None, 5, 6), (0, 3, 0, 5), (50, 3, 3, 2), (100, 3, 3, 1)],
)
def test_number_of_checkpoints_that_need_room(start: int, keep: int | None, num_old: int, expected: int) -> None:
    hook = DiskSpace("", 10, keep)
    hook.trainer = SimpleNamespace(start_iter=start, max_iter=100)
    assert hook._count_new_checkpoints(num_old) == expected


def test_a_disk_that_is_too_small_is_found_before_the_first_step(photos: Path, folder: Path, monkeypatch: Any) -> None:
    trainer = Trainer(cyborgs_cfg(photos, folder))
    usage = SimpleNamespace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        OSError, match=r"2,000,000 bytes free.*3 checkpoints of.*163,840 bytes of region masks.*MAX_TO_KEEP"
    ):
        trainer.train()
    assert not list(folder.glob("model*")) and trainer.iter == 0
