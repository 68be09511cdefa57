"""Tables of results: what their cells need to be run, and which records of runs fill them.

A table of a paper is a file `paper_tables/NAME.yaml`:

    title, source      source: paper and table
    note               optional: what else must be known, e.g. why cells cannot be run; it stands under the table
    labels             names of the columns that say what a row is
    evaluations        name -> dataset (catalog name) and config, a file of configs/finetune, with opts, KEY VALUE overrides;
                       or, instead of config, command: a subcommand of tools/evaluate.py with its options, {datasets} in
                       them for the folder of the data sets; with checkpoint: true it reads the checkpoint of pretraining
                       itself, not the converted backbone. Without either (config: null), cells cannot be run
    columns            name, evaluation and metric, as records name it
    rows               key -> labels; paper: its numbers, as printed, null where it has none; start: what is fine-tuned
                       (absent: a method that is not here); configs: evaluation -> config, where rows have different ones
    start              random; or pretrain: a config of configs/pretrain (or evaluation -> config) with opts, and weights,
                       the name of the file that pretraining starts from; or weights alone: what fine-tuning starts from

A table of the small tasks of `transfer.py` is made from its TASKS and METHODS; it has no numbers of a paper.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from runs import ROOT
from transfer import METHODS, TASKS

from d2_objssl.data.known_sizes import expected_size
from d2_objssl.engine import setup_cfg
from d2_objssl.evaluation.commands import COMMANDS
from d2_objssl.evaluation.results import config_identity

PAPER_TABLES = Path(__file__).resolve().parent / "paper_tables"
_COMPLETE = 0.9  # of a data set's images must have been trained on; detectors leave out those without objects


@dataclass(frozen=True)
class Training:
    """A config file of tools/train_net.py, relative to the checkout, and KEY VALUE overrides."""

    config: str
    opts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """What is run for a cell.

    Attributes:
        evaluation: name of the evaluation, as in the table.
        dataset: what it is evaluated on.
        finetuning: how; None: by `command`.
        command: subcommand of tools/evaluate.py and its options.
        pretraining: None: fine-tuning starts from `weights`.
        weights: name of the file that pretraining, or else fine-tuning, starts from; "": random initialisation.
        reads_checkpoint: whether `command` reads the checkpoint of pretraining, else the converted backbone.
    """

    evaluation: str
    dataset: str
    finetuning: Training | None
    command: tuple[str, ...]
    pretraining: Training | None
    weights: str
    reads_checkpoint: bool = False


@dataclass(frozen=True)
class Column:
    """A column of numbers: the metric of an evaluation."""

    name: str
    evaluation: str
    metric: str


@dataclass(frozen=True)
class Row:
    """A row: its labels, the paper's numbers as text (None: empty), and evaluation -> job, where there is one."""

    labels: tuple[str, ...]
    paper: tuple[str | None, ...]
    jobs: Mapping[str, Job]


@dataclass(frozen=True)
class Table:
    """A table; see the module."""

    name: str
    title: str
    source: str
    labels: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: Mapping[str, Row]
    note: str = ""

    def values(self, row: str, column: Column, records: Iterable[Mapping[str, Any]]) -> list[float]:
        """The metric of all records that belong into a cell, one for each model that was evaluated: the last."""
        job = self.rows[row].jobs.get(column.evaluation)
        if job is None:
            return []
        found = {_evaluated(r): r["metrics"].get(column.metric) for r in records if fits(r, job)}
        return [value for value in found.values() if value is not None]


def table_names() -> list[str]:
    """Names of all tables: those of the papers, then the small ones."""
    return [*sorted(path.stem for path in PAPER_TABLES.glob("*.yaml")), *TASKS]


def load_table(name: str, folder: Path = PAPER_TABLES) -> Table:
    """Load a table by its name.

    Raises:
        ValueError: if there is no such table, or a row of its file is of another length than its columns.
    """
    if name in TASKS:
        return _small_table(name)
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f'there is no table "{name}"; known: {", ".join(table_names())}')
    content = yaml.load(path.read_text(), yaml.BaseLoader)  # all scalars stay text: "80.60" keeps its zero
    columns = tuple(Column(**column) for column in content["columns"])
    rows = {}
    for key, row in content["rows"].items():
        paper = tuple(None if number == "null" else number for number in row["paper"])
        if len(paper) != len(columns) or len(row["labels"]) != len(content["labels"]):
            raise ValueError(
                f"{path}: row {key} has {len(row['labels'])} labels and {len(paper)} numbers; the table has "
                f"{len(content['labels'])} and {len(columns)}"
            )
        jobs = {name: _read_job(name, e, row) for name, e in content["evaluations"].items()}
        rows[key] = Row(tuple(row["labels"]), paper, {name: job for name, job in jobs.items() if job is not None})
    note = content.get("note", "")
    return Table(name, content["title"], content["source"], tuple(content["labels"]), columns, rows, note)


def _read_job(name: str, evaluation: Mapping[str, Any], row: Mapping[str, Any]) -> Job | None:
    """The job of an evaluation for a row of a file; None if it cannot be run."""
    start = row.get("start")
    config = row.get("configs", {}).get(name, evaluation.get("config", "null"))
    command = tuple(word.replace("{datasets}", _datasets_root()) for word in evaluation.get("command", ()))
    if start is None or (config == "null" and not command):
        return None
    finetuning = None if command else Training(config, tuple(evaluation.get("opts", ())))
    if start == "random":
        return Job(name, evaluation["dataset"], finetuning, command, None, "")
    pretrain = start.get("pretrain")
    if isinstance(pretrain, dict):
        if name not in pretrain:
            return None
        pretrain = pretrain[name]
    pretraining = Training(pretrain, tuple(start.get("opts", ()))) if pretrain else None
    reads_checkpoint = evaluation.get("checkpoint") == "true"
    weights = start.get("weights", "")
    return Job(name, evaluation["dataset"], finetuning, command, pretraining, weights, reads_checkpoint)


def _datasets_root() -> str:
    """The folder of the data sets, as Detectron2 reads it."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def _small_table(name: str) -> Table:
    """The table of a task of `transfer.py`."""
    task = TASKS[name]
    rows = {}
    for method in METHODS:
        setting = task.pretraining(method)
        pretraining = setting and Training(setting[0], (*task.pretrain_opts, *setting[1]))
        job = Job(name, task.datasets[-1], Training(task.finetune_config), (), pretraining, "")
        rows[method] = Row((method,), (None,) * len(task.metrics), {name: job})
    columns = tuple(Column(label, name, metric) for metric, label in task.metrics.items())
    return Table(name, task.summary, "", ("initialisation",), columns, rows)


def fits(record: Mapping[str, Any], job: Job) -> bool:
    """Whether a record is of this job: of its data, with its configs as they are, to the end of their schedules."""
    if record["dataset"] != job.dataset or not _starts_as(record["weights"], job.pretraining, job.weights):
        return False
    if job.finetuning is None:
        return COMMANDS[job.command[0]].is_record_of(_command_args(job.command), record)
    checkpoint = record.get("checkpoint")
    if checkpoint is None:  # a record of tools/evaluate.py, which fine-tunes nothing
        return False
    is_complete = expected_size(MetadataCatalog.get(job.dataset)) in (None, record.get("num_images"))
    is_unchanged = record["config"]["sha256"] == _config_hash(job.finetuning)
    return is_complete and is_unchanged and _was_trained(checkpoint, job.finetuning)


def _evaluated(record: Mapping[str, Any]) -> str:
    """What model a record is of: the hash of its file; the seed of a random initialisation."""
    model = record.get("checkpoint") or record["weights"]
    return model["sha256"] if model else f"seed {record.get('seed')}"


def _starts_as(weights: Mapping[str, Any] | None, pretraining: Training | None, start: str) -> bool:
    """Whether weights are those that fine-tuning is to start from: pretrained from the file `start`, or `start` itself."""
    if pretraining is not None:
        if weights is None or not _was_trained(weights, pretraining):
            return False
        branch = load_config(pretraining).MODEL.SSL.EXPORT_BRANCH
        return weights["training"]["branch"] == branch and _starts_as(weights["training"]["weights"], None, start)
    if weights is None or not start:
        return weights is None and not start
    return "training" not in weights and start in (weights["file"], weights.get("source"))


def _was_trained(weights: Mapping[str, Any], expected: Training) -> bool:
    """Whether weights come from the end of this training, on the complete data."""
    training = weights.get("training")
    if training is None or training["config"]["sha256"] != _config_hash(expected):
        return False
    sizes = [expected_size(MetadataCatalog.get(name)) or 0 for name in load_config(expected).DATASETS.TRAIN]
    return training["iterations"] == training["max_iter"] and training["num_images"] >= _COMPLETE * sum(sizes)


@functools.cache
def load_config(training: Training) -> CfgNode:
    """The config of a training."""
    return setup_cfg(str(ROOT / training.config), list(training.opts))


@functools.cache
def _config_hash(training: Training) -> str:
    return config_identity(load_config(training))["sha256"]


@functools.cache
def _command_args(command: Sequence[str]) -> argparse.Namespace:
    """The options of a subcommand of tools/evaluate.py."""
    parser = argparse.ArgumentParser()
    COMMANDS[command[0]].add_arguments(parser)
    return parser.parse_args([*command[1:], "--weights", ""])
