"""Mistakes in a config: all of them in one message, before anything is read or written."""

import logging
import re
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
from d2_objssl.load_guard import input_contract, stored_contract

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
    ("MODEL.RESNETS.NORM", "SynBN", 'MODEL.RESNETS.NORM is "SynBN"; known: "", BN, FrozenBN, GN'),
    ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosine", "did you mean WarmupCosineLR"),
    ("DATALOADER.SAMPLER_TRAIN", "Bar", 'SAMPLER_TRAIN is "Bar"; known: RepeatFactorTrainingSampler, TrainingSampler'),
    ("DATALOADER.NUM_WORKERS", "-1", "DATALOADER.NUM_WORKERS is -1; it must be at least 0"),
    (
        "INPUT.SSL.CROP_RATIO",
        "(0.0, 0.0)",
        "INPUT.SSL.CROP_RATIO is (0.0, 0.0); it must be two numbers, the smaller one first, both",
    ),
    ("OUTPUT_DIR", "out?put", 'OUTPUT_DIR is "out?put"; it must not have a "?"'),
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


def test_data_sets_whose_files_are_missing_are_listed_with_the_rest(tmp_path: Path, catalog: Any) -> None:
    """What cannot even be registered, and what can."""
    voc, folders = f"voc:{tmp_path}/none:train", f"folders:{tmp_path}/none"
    names = f"('{voc}', '{folders}', 'coco_2017_train_images')"
    opts = ["DATASETS.TRAIN", names, "DATASETS.TEST", "('coco_2017_val',)", "INPUT.FORMAT", "BGR"]
    with pytest.raises(ValueError, match=r"^5 mistakes in the config") as error:
        setup_cfg(QUICK, opts, for_training=True)
    text = str(error.value)
    assert f'DATASETS.TRAIN names "{voc}": There is no folder {tmp_path}/none/Annotations' in text
    assert (
        f'DATASETS.TRAIN names "{folders}", but there is no {tmp_path}/none:' in text
        and 'INPUT.FORMAT is "BGR"' in text
    )
    assert re.search(r'DATASETS.TRAIN names "coco_2017_train_images", but there is no \S+/coco/train2017:', text)
    assert re.search(r'DATASETS.TEST names "coco_2017_val", but there is no \S+\.json and no', text)
    with pytest.raises(ValueError, match=r"^1 mistake in the config"):  # tools that do not train may not need the files
        setup_cfg(QUICK, opts)


def test_weights_of_another_input_are_listed_with_the_rest(tmp_path: Path, monkeypatch: Any) -> None:
    good = finetune_cfg(tmp_path)
    contract = {"input_contract": {**input_contract(good), "format": "BGR", "depth": 101}}
    weights = tmp_path / "w.pth"
    torch.save({"model": {"a": torch.zeros(1)}, "d2_objssl": contract}, weights)
    opts = ("MODEL.WEIGHTS", str(weights), "SOLVER.WARMUP_ITERS", 9)
    first, second = find_mistakes(finetune_cfg(tmp_path, *opts))
    assert f"the input contract of MODEL.WEIGHTS {weights} is not that" in first
    assert "INPUT.FORMAT is RGB, the checkpoint was trained on BGR" in first and "DEPTH is 50" in first
    assert "SOLVER.WARMUP_ITERS is 9" in second
    cfg = finetune_cfg(tmp_path, "MODEL.WEIGHTS", str(weights))
    monkeypatch.setattr("d2_objssl.engine.config_paths.load_checkpoint", lambda path: pytest.fail("read once more"))
    assert find_mistakes(cfg) == [first]
    (tmp_path / "model_0000002.pth").touch()
    assert not find_mistakes(cfg), "a run that is resumed does not read MODEL.WEIGHTS"


@pytest.mark.parametrize("content", [b"", b"no weights"])
def test_weights_that_cannot_be_read_are_left_to_the_loading(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    for query in ("", "?matching_heuristics=True"):
        assert not find_mistakes(finetune_cfg(tmp_path, "MODEL.WEIGHTS", f"{tmp_path}/w.pth{query}"))


def test_weights_of_other_projects_are_compared_by_their_layout() -> None:
    assert stored_contract({"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)})["format"] == "RGB"
    assert not stored_contract({"a": torch.zeros(1)}) and not stored_contract({"d2_objssl": "?", "model": {}})


def test_without_resume_old_checkpoints_do_not_replace_missing_weights(tmp_path: Path) -> None:
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    cfg = finetune_cfg(tmp_path, "MODEL.WEIGHTS", "gone.pth")
    assert not find_mistakes(cfg) and not find_mistakes(cfg, resume=True)
    (mistake,) = find_mistakes(cfg, resume=False)
    assert mistake == 'MODEL.WEIGHTS is "gone.pth"; there is no such file'


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
    default.DATASETS.TRAIN = ("scenes_train",)
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


def test_more_prototypes_than_cells_are_odd(photos: Path, tmp_path: Path, caplog: Any) -> None:
    check_config(pretrain_cfg(photos, tmp_path, "MODEL.SSL.SLOTCON.NUM_PROTOTYPES", 33, "INPUT.SSL.CROP_SIZE", 60))
    assert "NUM_PROTOTYPES is 33, but the views of a batch have only 32 cells of 32 pixels" in caplog.text


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
    [(0, None, 0, 11), (50, None, 5, 6), (0, 3, 0, 5), (50, 3, 3, 2), (0, None, 10, 2), (0, 3, 10, 1), (50, 3, 10, 1)],
)
def test_number_of_checkpoints_that_need_room(start: int, keep: int | None, num_old: int, expected: int) -> None:
    """Those that replace others, or let others be deleted, need it only until these are gone."""
    hook = DiskSpace("", 10, keep)
    hook.trainer = SimpleNamespace(start_iter=start, max_iter=100)
    old = {f"model_{i:07d}.pth": i for i in range(9, 10 * num_old, 10)}
    assert hook._growth(1000, old, dict.fromkeys(old, 1000)) == 1000 * expected
    assert hook._growth(1000, old, dict.fromkeys([*old, "model_final.pth"], 1000)) == 1000 * max(expected - 1, 1)


def test_a_disk_that_is_too_small_is_found_before_the_first_step(photos: Path, folder: Path, monkeypatch: Any) -> None:
    trainer = Trainer(cyborgs_cfg(photos, folder))
    usage = SimpleNamespace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        OSError, match=r"2,000,000 bytes free.*3 checkpoints of.*163,840 bytes of region masks.*MAX_TO_KEEP"
    ):
        trainer.train()
    assert not list(folder.glob("model*")) and trainer.iter == 0
    for name in ("round_0001", "round_0002.partial"):  # 20 images in each round
        (folder / "regions" / name / "maps").mkdir(parents=True)
        for i in range(15):
            (folder / "regions" / name / "maps" / f"{i}.png").touch()
    hook = next(h for h in trainer._hooks if isinstance(h, DiskSpace))
    with pytest.raises(OSError, match=r"3 checkpoints of.* 40,960 bytes of region masks"):
        hook.before_train()


def test_a_finished_run_needs_no_room(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    hook = DiskSpace(str(tmp_path), 10, num_masks=1000)
    hook.trainer = SimpleNamespace(start_iter=100, max_iter=100)
    hook.before_train()
