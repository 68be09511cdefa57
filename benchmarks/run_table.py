#!/usr/bin/env python
"""Run what a table of results needs: pretrain, convert, fine-tune and evaluate, for every row and column, in this order.

Steps that several cells or tables share are run once. All state is in --output: steps that are done are not repeated, those
that were interrupted go on from their last checkpoint, so that after a crash the same command is given again. Before
anything is started, missing data sets and files of weights are listed, with the places where they are expected.

Tables: the papers' (benchmarks/paper_tables) and the small ones of transfer.py ("scenes", "camvid", "bccd"). Runs with
--pretrain-opts or --finetune-opts are trials: their records do not fill the columns of a table.

Example:
    python benchmarks/run_table.py --table slotcon_table2 --rows random slotcon --num-gpus 8 --output output/tables --dry-run
    python benchmarks/run_table.py --table scenes --rows random slotcon --seeds 0 1 --output output/tables
    python benchmarks/report.py --records benchmarks/results output/tables --output benchmarks/tables
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.data import DatasetCatalog
from report import load_records, markdown, table_rows
from result_tables import Job, Table, Training, load_config, load_table, table_names
from runs import EVALUATE, Run, conversion, execute, training

from d2_objssl.data.known_sizes import check_datasets
from d2_objssl.evaluation.build import check_evaluators


@dataclass
class Plan:
    """The steps of a table, in order.

    Attributes:
        steps: folder -> step; a step that is planned twice is there once.
        trainings: what the steps train, whose data must be there.
        datasets: what else must be there, by catalog name.
        files: weights from elsewhere that they need.
        lists: of images, text files from elsewhere that they need.
    """

    steps: dict[Path, Run] = field(default_factory=dict)
    trainings: dict[Training, None] = field(default_factory=dict)
    datasets: dict[str, None] = field(default_factory=dict)
    files: dict[Path, None] = field(default_factory=dict)
    lists: dict[Path, None] = field(default_factory=dict)

    def add(self, step: Run) -> Run:
        """Plan a step, unless it is planned already; returns the planned one."""
        return self.steps.setdefault(step.output, step)

    def missing(self) -> list[str]:
        """What is not there: data sets, files of weights, lists of images, packages of evaluations."""
        problems = {
            f"there is no file {path} of weights (see --weights-dir)": None for path in self.files if not path.is_file()
        }
        problems |= {f"there is no list {path} of images": None for path in self.lists if not path.is_file()}
        names = dict.fromkeys((name, "a column") for name in self.datasets)
        for planned in self.trainings:
            cfg, regions = load_config(planned), load_config(planned).INPUT.REGIONS
            names |= dict.fromkeys((name, f"DATASETS.{key}") for key in ("TRAIN", "TEST") for name in cfg.DATASETS[key])
            if regions.SOURCE == "file" and not os.path.isdir(regions.ROOT):
                problems[f"INPUT.REGIONS.ROOT of {planned.config} is {regions.ROOT}, which is no folder"] = None
            try:
                check_evaluators(cfg)
            except (ValueError, ImportError) as error:
                problems[str(error)] = None
        if any(step.arguments[1] == "svm" for step in self.steps.values()) and not importlib.util.find_spec("sklearn"):
            problems['the evaluation "svm" needs scikit-learn: pip install "d2_objssl[probes]"'] = None
        for name, key in names:
            try:
                check_datasets([name], key)
            except (ValueError, FileNotFoundError) as error:
                problems[str(error)] = None
        return list(problems)


def make_plan(table: Table, rows: Iterable[str], args: argparse.Namespace) -> Plan:
    """Plan all cells of some rows; a row's first seed before the next row, all of them before the second seed."""
    plan = Plan()
    for seed in args.seeds:
        for row in rows:
            for job in table.rows[row].jobs.values():
                _plan_job(plan, job, seed, args)
    return plan


def _plan_job(plan: Plan, job: Job, seed: int, args: argparse.Namespace) -> None:
    """Plan the steps of one job."""
    weights: Path | None = None
    if job.weights:
        weights = args.weights_dir / job.weights
        plan.files[weights] = None
    origin = weights.name.partition(".")[0] if weights else "random"
    if job.pretraining is not None:
        setting = Training(job.pretraining.config, (*job.pretraining.opts, *args.pretrain_opts))
        run = _plan_training(plan, "pretrain", setting, weights, origin, seed, args)
        if job.reads_checkpoint:
            weights = run.output / "model_final.pth"
        else:
            convert, weights = conversion(run)
            plan.add(convert)
        origin = run.output.name.removeprefix("pretrain_").removesuffix(f"_seed{seed}")
    if job.finetuning is not None:
        setting = Training(job.finetuning.config, (*job.finetuning.opts, *args.finetune_opts))
        _plan_training(plan, "finetune", setting, weights, origin, seed, args)
    else:
        plan.datasets |= dict.fromkeys(word for word in job.command if word in DatasetCatalog)
        plan.lists |= dict.fromkeys(Path(word) for word in job.command if word.endswith(".txt"))
        output = args.output / f"{job.command[0]}_{job.dataset}_from_{origin}_seed{seed}"
        options = ["--weights", str(weights or "random"), "--output", str(output / "records" / f"{job.dataset}.json")]
        name = f"{job.command[0]} on {job.dataset} from {origin}, seed {seed}"
        plan.add(Run(name, output, [os.path.relpath(EVALUATE), *job.command, *options]))


def _plan_training(
    plan: Plan,
    phase: str,
    setting: Training,
    weights: Path | None,
    origin: str,
    seed: int,
    args: argparse.Namespace,
) -> Run:
    """Plan a run of tools/train_net.py in a folder named after its config, its overrides and what it starts from."""
    plan.trainings[setting] = None
    name = Path(setting.config).stem
    if setting.opts:
        name += "-" + hashlib.sha256(shlex.join(setting.opts).encode()).hexdigest()[:8]
    is_fresh = phase == "pretrain" and weights is None
    name += "" if is_fresh else f"_from_{origin}"
    overrides = [*setting.opts, "SEED", str(seed), "MODEL.WEIGHTS", str(weights or "")]
    folder = args.output / f"{phase}_{name}_seed{seed}"
    return plan.add(training(f"{phase} {name}, seed {seed}", setting.config, folder, overrides, args.num_gpus))


def describe(plan: Plan) -> str:
    """The plan as text: a step a line, with its command, and whether it is done."""
    lines = []
    for i, step in enumerate(plan.steps.values(), start=1):
        state = "done" if step.is_done else "begun" if (step.output / "command.txt").exists() else "to do"
        lines.append(f"{i:3d}. [{state}] {step.name}\n     python {shlex.join(step.arguments)}")
    return "\n".join(lines)


def run_plan(plan: Plan, threads: int) -> None:
    """Run all steps to their ends.

    Raises:
        SystemExit: if one fails; see `runs.execute`.
    """
    for i, step in enumerate(plan.steps.values(), start=1):
        print(f"step {i} of {len(plan.steps)}", flush=True)
        execute(step, threads)


def main(argv: list[str] | None = None) -> int:
    """Run a table; see the module. Returns 2 if something that is needed is missing."""
    args = _parse(argv)
    table = load_table(args.table)
    unknown = [row for row in args.rows or () if row not in table.rows]
    if unknown:
        raise SystemExit(f"--rows {' '.join(unknown)}: {table.name} has {', '.join(table.rows)}")
    rows = args.rows or [key for key, row in table.rows.items() if row.jobs]
    plan = make_plan(table, rows, args)
    missing = plan.missing()
    if args.dry_run:
        print(f"{table.title} ({table.source or 'ours alone'}): {len(plan.steps)} steps\n{describe(plan)}")
    if missing:
        print("Missing:\n  " + "\n  ".join(missing), file=sys.stdout if args.dry_run else sys.stderr)
    if args.dry_run or missing:
        return 0 if args.dry_run else 2
    for row in rows:
        if not table.rows[row].jobs:
            print(f"{row}: there is nothing to run, the method or the protocol is not here")
    run_plan(plan, args.threads)
    records = load_records([args.output])
    print(markdown(table, *table_rows(table, records)))
    if args.pretrain_opts or args.finetune_opts:
        print("A trial (--pretrain-opts, --finetune-opts): its records do not fill the columns. They are:")
        for step in plan.steps.values():
            for path in sorted(step.output.glob("records/*.json")):
                print(f"  {path}")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, choices=table_names(), metavar="NAME", help=", ".join(table_names()))
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="keys of rows (default: all that can be run)")
    text = "of pretraining and fine-tuning alike (default: 0)"
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help=text)
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="of every training (default: 1)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of a process (default: 1)")
    parser.add_argument(
        "--output", type=Path, default=Path("output/tables"), metavar="DIR", help="default: %(default)s"
    )
    text = "folder of weights from elsewhere that tables name (default: %(default)s)"
    parser.add_argument("--weights-dir", type=Path, default=Path("weights"), metavar="DIR", help=text)
    for phase in ("pretrain", "finetune"):
        text = f"overrides for every {phase} run: a trial"
        parser.add_argument(f"--{phase}-opts", nargs="+", default=[], metavar="KEY VALUE", help=text)
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run, and what is missing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
