"""Tables of results: the papers' files, which records fill which cell, and what is rendered."""

import json
import re

import matplotlib.image
import pytest
import report
from result_tables import PAPER_TABLES, Job, Training, load_config, load_table, table_names

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
