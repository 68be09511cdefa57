"""Tables of results: the papers' files, which records fill which cell, and what is rendered."""

import argparse
import json
import re
from pathlib import Path

import matplotlib.image
import pytest
import report
from result_tables import PAPER_TABLES, Job, Training, load_config, load_table, table_names

from d2_objssl.evaluation.commands import prototype_options, segmentation, svm
from d2_objssl.evaluation.probes import ClassResult
from d2_objssl.evaluation.results import config_identity

NAMES = sorted(path.stem for path in PAPER_TABLES.glob("*.yaml"))


def _trained(training: Training, num_images: int, weights=None, **changes):
    """`weights_identity` of what a complete training leaves."""
    cfg = load_config(training)
    method, branch = cfg.MODEL.SSL.METHOD, cfg.MODEL.SSL.EXPORT_BRANCH
    state = {"method": method, "branch": branch, "config": config_identity(cfg), "num_images": num_images}
    return {
        "file": "w",
        "sha256": "0",
        "training": state | {"max_iter": 9, "iterations": 9, "weights": weights} | changes,
    }


def _record(job: Job, name: str = "a", metric: float = 40.0, *, finetuning=None, **changes):
    """The record of a complete run of a cell of SlotCon's Table 2, with changes."""
    finetuning = finetuning or job.finetuning
    record = {
        "task": "instance segmentation",
        "dataset": "coco_2017_val",
        "metrics": {"bbox/AP": metric},
        "weights": _trained(job.pretraining, 118_287) if job.pretraining else None,
        "checkpoint": _trained(finetuning, 117_266) | {"sha256": name},
        "config": config_identity(load_config(finetuning)),
        "num_images": 5_000,
    }
    return record | changes


def _cell(row: str, *records) -> str:
    """What stands in the column "box AP (ours)" of SlotCon's Table 2."""
    headers, rows = report.table_rows(load_table("slotcon_table2"), records)
    keys = list(load_table("slotcon_table2").rows)
    return rows[keys.index(row)][headers.index(("box AP", "ours"))]


@pytest.fixture(scope="module")
def job() -> Job:
    return load_table("slotcon_table2").rows["slotcon"].jobs["coco"]


def test_nothing_run_leaves_ours_empty_and_the_papers_numbers_alone():
    table = load_table("slotcon_table2")
    headers, rows = report.table_rows(table, [])
    for i, (_, kind) in enumerate(headers):
        if kind == "ours":
            assert {row[i] for row in rows} == {""}
    printed = {
        key: [cell for cell, (_, kind) in zip(row, headers, strict=True) if kind == "paper"]
        for key, row in zip(table.rows, rows, strict=True)
    }
    assert printed["slotcon"] == ["41.0", "61.1", "45.0", "37.0", "58.3", "39.8", "76.2", "71.6", "39.0"]
    assert printed["self_emd"] == ["39.3", "60.1", "42.8"] + [""] * 6


def test_a_record_fills_its_own_cell_only(job):
    record = _record(job)
    assert _cell("slotcon", record) == "40.0"
    assert _cell("random", record) == _cell("pixpro", record) == ""
    from_random = _record(load_table("slotcon_table2").rows["random"].jobs["coco"])
    assert _cell("random", from_random) == "40.0" and _cell("slotcon", from_random) == ""


def test_seeds_give_mean_standard_error_and_number(job):
    records = [_record(job, name, metric) for name, metric in (("a", 40.0), ("b", 41.0), ("c", 42.0))]
    assert _cell("slotcon", *records) == "41.0 ± 0.6 (n=3)"


def test_overrides_do_not_fill(job):
    short = Training(job.finetuning.config, ("SOLVER.MAX_ITER", "900"))
    assert _cell("slotcon", _record(job, finetuning=short)) == ""
    # Trained with an override, then evaluated with the config as it is.
    assert _cell("slotcon", _record(job, checkpoint=_trained(short, 117_266))) == ""
    pretraining = Training(job.pretraining.config, ("SOLVER.MAX_EPOCHS", "8.0"))
    assert _cell("slotcon", _record(job, weights=_trained(pretraining, 118_287))) == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": "coco_2014_val"},
        {"num_images": 128},  # a part of the data under its name
        {"weights": {"file": "moco.pkl", "sha256": "1"}},
        {"metrics": {"bbox/AP": None}},
    ],
)
def test_other_data_and_weights_do_not_fill(job, changes):
    assert _cell("slotcon", _record(job, **changes)) == ""


@pytest.mark.parametrize("changes", [{"iterations": 5}, {"branch": "student"}, {"weights": {"file": "imagenet.pth"}}])
def test_other_pretraining_does_not_fill(job, changes):
    """A checkpoint from the middle, the other branch, another start."""
    assert _cell("slotcon", _record(job, weights=_trained(job.pretraining, 118_287, **changes))) == ""


def test_part_of_the_pretraining_data_does_not_fill(job):
    assert _cell("slotcon", _record(job, weights=_trained(job.pretraining, 128))) == ""


def test_weights_from_elsewhere_are_known_by_their_file():
    table = load_table("semcl_table4a")
    imagenet, semcl = table.rows["imagenet"].jobs["coco"], table.rows["semcl"].jobs["coco"]
    start = {"file": "r50.pkl", "sha256": "1", "source": "r-50-1000ep.pth.tar"}
    column = next(c for c in table.columns if c.evaluation == "coco")
    assert table.values("imagenet", column, [_record(imagenet, weights=start)]) == [40.0]
    pretrained = _record(semcl, weights=_trained(semcl.pretraining, 118_287, start))
    assert table.values("semcl", column, [pretrained]) == [40.0]
    assert table.values("imagenet", column, [pretrained]) == []
    from_random = _record(semcl, weights=_trained(semcl.pretraining, 118_287))
    assert table.values("semcl", column, [from_random]) == []


def test_an_evaluation_with_other_settings_hides_none(tmp_path, job):
    """Of one model: that at the end of its training, one that is repeated, and one with another config."""
    other = Training(job.finetuning.config, ("INPUT.MIN_SIZE_TEST", "32"))
    changed = _record(job, metric=10.0, config=config_identity(load_config(other)))
    for folder, record in (("a", _record(job)), ("b", _record(job)), ("c", changed)):
        (tmp_path / folder / "records").mkdir(parents=True)
        (tmp_path / folder / "records" / "coco_2017_val.json").write_text(json.dumps(record))
    assert _cell("slotcon", *report.load_records([tmp_path])) == "40.0"


def _parsed(command, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def _svm_record(train: str = "voc_2007_trainval", **changes):
    """The record of SVMs on the backbone of the row "cyborgs" of CYBORGS' Table 1, with changes."""
    pretraining = load_table("cyborgs_table1").rows["cyborgs"].jobs["voc07_linear"].pretraining
    args = _parsed(svm, "--weights", "", "--train", train, "--test", "voc_2007_test")
    results = {"cat": ClassResult(ap=0.8, cross_validation_ap=0.8, cost=1.0, train_share=0.5, test_share=0.5)}
    record = svm.make_record(args, svm.build_cfg(args), results, num_train_images=5_011, num_images=4_952)
    return record | {"weights": _trained(pretraining, 118_287)} | changes


def _cyborgs_cells(*records) -> dict[str, str]:
    table = load_table("cyborgs_table1")
    headers, rows = report.table_rows(table, records)
    cells = rows[list(table.rows).index("cyborgs")]
    return {name: cell for (name, kind), cell in zip(headers, cells, strict=True) if kind == "ours" and cell}


def test_an_svm_record_fills_its_column_and_not_that_of_detection_on_the_same_images():
    assert _cyborgs_cells(_svm_record()) == {"VOC07 mAP": "80.0"}


@pytest.mark.parametrize(
    "changes",
    [
        {"num_train_images": 500},
        {"num_images": 100},
        {"num_train_images": None},  # as in records of earlier versions
        {"task": "detection"},
        {"config": {"file": "", "sha256": "0"}},
    ],
)
def test_svms_on_other_or_incomplete_data_do_not_fill(changes):
    assert _cyborgs_cells(_svm_record(**changes)) == {}


def test_svms_trained_on_another_data_set_do_not_fill():
    assert _cyborgs_cells(_svm_record("voc_2012_trainval")) == {}
    assert _cyborgs_cells(_svm_record("voc_2012_trainval", num_train_images=11_540)) == {}


@pytest.mark.parametrize(
    ("changes", "filled"),
    [
        ({}, True),
        ({"num_images": 5_000, "image_list": None}, False),  # all of val2017
        ({"image_list": None, "limit": 2_175}, False),
        ({"short_side": 256}, False),
        ({"overrides": ["MODEL.SSL.EXPORT_BRANCH", "student"]}, False),
        ({"config": {"file": "other.yaml", "sha256": "0"}}, False),
        ({"task": "visual concepts"}, False),
    ],
)
def test_unsupervised_segmentation_fills_on_the_curated_images(monkeypatch, changes, filled):
    job = load_table("slotcon_table5").rows["slotcon"].jobs["coco_stuff"]
    monkeypatch.setattr(prototype_options, "weights_identity", lambda path: _trained(job.pretraining, 118_287))
    args = _parsed(
        segmentation, "--dataset", job.dataset, "--weights", "w", "--image-list", "x/" + Path(job.command[4]).name
    )
    counts = {"num_images": 2_175, "num_prototypes": 27, "wall_time_s": 1.0}
    record = prototype_options.describe_run(args, load_config(job.pretraining), **counts)
    record |= {"task": "unsupervised segmentation", "metrics": {"mIoU": 18.0}, **segmentation.chosen_images(args)}
    table = load_table("slotcon_table5")
    assert table.values("slotcon", table.columns[0], [record | changes]) == ([18.0] if filled else [])


def test_a_record_without_a_field_is_named_and_left_out(tmp_path, caplog, job):
    (tmp_path / "a.json").write_text(json.dumps(_record(job)))
    (tmp_path / "b.json").write_text(
        json.dumps({k: v for k, v in _record(job).items() if k not in ("weights", "task")})
    )
    (tmp_path / "c.json").write_text("[1]")
    assert report.load_records([tmp_path]) == [_record(job)]
    assert f"{tmp_path}/b.json fills no cell: the record has no task, weights" in caplog.text


@pytest.mark.parametrize("name", table_names())
def test_tables_name_configs_that_exist_and_test_on_their_data(name):
    table = load_table(name)
    for row in table.rows.values():
        assert all(number is None or re.fullmatch(r"\d+\.\d+", number) for number in row.paper)
        for job in row.jobs.values():
            if job.finetuning is not None:
                assert load_config(job.finetuning).DATASETS.TEST == (job.dataset,)
            if job.pretraining is not None:
                assert load_config(job.pretraining).MODEL.META_ARCHITECTURE == "ObjectSSL"
    assert {column.evaluation for column in table.columns} >= {e for row in table.rows.values() for e in row.jobs}


def test_a_table_with_a_missing_number_is_refused(tmp_path):
    text = (PAPER_TABLES / "slotcon_supplement_table2.yaml").read_text().replace("[73.9]", "[]")
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"broken\.yaml: row bdd100k has 2 labels and 0 numbers"):
        load_table("broken", tmp_path)


def test_rendering_one_table_again_keeps_the_others_and_the_small_runs(tmp_path):
    """The records of runs elsewhere hold none of `transfer.py`."""
    (tmp_path / "runs").mkdir()
    output = tmp_path / "tables"
    assert report.main(["--output", str(output), "--tables", "slotcon_table2", "semcl_table6"]) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert "mask_rcnn" not in before["small_runs.md"].decode() and b"slotcon" in before["small_runs.md"]
    options = ["--records", str(tmp_path / "runs"), "--output", str(output), "--tables", "slotcon_table2"]
    assert report.main(options) == 0
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    listed = before["README.md"].decode()
    assert all(f"[{name}]({name}.md)" in listed for name in ("slotcon_table2", "semcl_table6", "small_runs"))
    assert "Ours: 0 of 18 cells" in listed


def test_nothing_of_transfer_leaves_no_empty_table_of_small_runs(tmp_path):
    (tmp_path / "runs").mkdir()
    output = tmp_path / "tables"
    assert (
        report.main(["--records", str(tmp_path / "runs"), "--output", str(output), "--tables", "slotcon_table2"]) == 0
    )
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "slotcon_table2.md", "slotcon_table2.png"]


def test_a_table_of_which_nothing_can_be_run_says_why():
    for name in NAMES:
        table = load_table(name)
        assert table.note or any(row.jobs for row in table.rows.values()), name
    table = load_table("semcl_table6")
    assert report.markdown(table, *report.table_rows(table, [])).endswith(f"|\n\n{table.note}\n")
    assert "not BinsFormer" in table.note


def test_command_writes_tables_and_pictures(tmp_path, capsys, job):
    run = tmp_path / "runs" / "finetune" / "records"
    run.mkdir(parents=True)
    (run / "coco_2017_val.json").write_text(json.dumps(_record(job)))
    (tmp_path / "runs" / "finetune" / "coco_instances_results.json").write_text("not read")
    transfer = {"task": "t", "finetune_opts": [], "results": {"random": {"bbox/AP": {"75": [1.0], "150": [3.0, 5.0]}}}}
    (tmp_path / "runs" / "transfer_t.json").write_text(json.dumps(transfer))
    output = tmp_path / "tables"
    options = ["--records", str(tmp_path / "runs"), "--tables", "slotcon_table2", "--output", str(output)]
    assert report.main(options) == 0
    text = (output / "slotcon_table2.md").read_text()
    assert "Ours: 1 of 18 cells that can be run here are filled." in text
    assert re.search(r"\| SlotCon .*\| 41\.0 +\| 40\.0 ", text)
    assert "bbox/AP 4.0 ± 1.0" in (output / "small_runs.md").read_text()
    for name in ("slotcon_table2", "small_runs"):
        picture = matplotlib.image.imread(output / f"{name}.png")
        assert picture.shape[0] > 100 and picture[..., :3].min() < 0.5
    with pytest.raises(SystemExit):
        report.main(["--records", str(tmp_path / "absent")])
    assert "is no folder" in capsys.readouterr().err
