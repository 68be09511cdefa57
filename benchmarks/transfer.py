#!/usr/bin/env python
"""Does pretraining help? Fine-tunes one model from several initialisations at an equal schedule and compares.

Pretrains each method, converts the checkpoint, fine-tunes, and does the same from random initialisation; for every seed.
Tasks: "scenes", pretraining on 2,000 generated scenes, Mask R-CNN on 100 other, labelled ones; "camvid", pretraining and
semantic segmentation on CamVid's training images (in DETECTRON2_DATASETS/camvid).

The row "byol" is DetCon-B with the whole image as its only region. Two rows are not self-supervised: "detcon_gt" sees the
true masks of the scenes that it is pretrained on, "semcl" label maps. Writes a table, curves and a JSON record. Runs of an
earlier call in the same --output folder that finished are not repeated, interrupted ones are resumed.

Example:
    python benchmarks/transfer.py --methods random slotcon --seeds 0 1 2 --output output/transfer \\
        --record benchmarks/results/transfer_scenes.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from detectron2.data import DatasetCatalog
from tabulate import tabulate

import d2_objssl  # noqa: F401  (registers the scenes)
from d2_objssl.evaluation.results import write_record
from d2_objssl.visualization import plot_curves

ROOT = Path(__file__).resolve().parent.parent
_DETCON = "configs/quick/detcon_b_R_18_scenes.yaml"
# Method -> pretraining config and overrides; None: random initialisation.
METHODS: dict[str, tuple[str, list[str]] | None] = {
    "random": None,
    "slotcon": ("configs/quick/slotcon_R_18_scenes.yaml", []),
    "byol": (_DETCON, ["INPUT.REGIONS.SOURCE", "global", "MODEL.SSL.DETCON.NUM_REGIONS", "1"]),
    "detcon_grid": (_DETCON, ["INPUT.REGIONS.SOURCE", "grid"]),
    "detcon_fh": (_DETCON, []),
    "detcon_gt": (_DETCON, ["INPUT.REGIONS.SOURCE", "instances"]),
    "cyborgs": ("configs/quick/cyborgs_R_18_scenes.yaml", []),
    "semcl": ("configs/quick/semcl_R_18_scenes.yaml", []),
}


@dataclass(frozen=True)
class Task:
    """What backbones are pretrained on and fine-tuned for.

    Attributes:
        summary: of the fine-tuning, in words.
        datasets: names in the catalog, so that what is missing is found, or generated, first.
        pretrain_opts: overrides of every method's config.
        finetune_config: the config file.
        metrics: name in metrics.json -> name in the table; the first one is drawn.
    """

    summary: str
    datasets: tuple[str, ...]
    pretrain_opts: tuple[str, ...]
    finetune_config: str
    metrics: dict[str, str]


TASKS = {
    "scenes": Task(
        summary="Mask R-CNN R18-FPN on scenes_train (100 images), AP on scenes_val (100 images)",
        datasets=("scenes_unlabeled", "scenes_train", "scenes_val"),
        pretrain_opts=(),
        finetune_config="configs/quick/mask_rcnn_R_18_FPN_scenes.yaml",
        metrics={"bbox/AP": "box AP", "segm/AP": "mask AP"},
    ),
    "camvid": Task(
        summary="semantic FPN R18 on camvid_train_sem_seg (367 images), mIoU on camvid_val_sem_seg (101 images)",
        datasets=("camvid_train_sem_seg", "camvid_val_sem_seg"),
        pretrain_opts=("DATASETS.TRAIN", "('camvid_train_sem_seg',)"),
        finetune_config="configs/quick/sem_seg_R_18_FPN_camvid.yaml",
        metrics={"sem_seg/mIoU": "mIoU", "sem_seg/pACC": "pixel accuracy"},
    ),
}


@dataclass
class Run:
    """One call of tools/train_net.py."""

    name: str
    config: str
    output: Path
    overrides: list[str]

    def command(self) -> list[str]:
        """The command that starts it, or goes on with it."""
        return [
            sys.executable,
            str(ROOT / "tools/train_net.py"),
            "--resume",
            "--config-file",
            str(ROOT / self.config),
            "OUTPUT_DIR",
            str(self.output),
            *self.overrides,
        ]

    def metrics(self) -> list[dict[str, float]]:
        """Rows of metrics.json, by iteration."""
        path = self.output / "metrics.json"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = {}
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the last line, if the run is being written or was killed
                continue
            rows[row["iteration"]] = row
        return [rows[i] for i in sorted(rows)]


def environment_of(threads: int) -> dict[str, str]:
    """Environment of a process with that many CPU threads, which imports this checkout."""
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    return os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


def execute(run: Run, threads: int) -> None:
    """Run to the end unless that was done before; show progress once in a while.

    Raises:
        SystemExit: if the command fails, with the end of its log, or if another command began in the same folder.
    """
    command = run.command()
    begun = run.output / "command.txt"
    if begun.exists() and begun.read_text() != shlex.join(command[1:]):
        raise SystemExit(f"{run.output} belongs to another command (see {begun}); choose another --output or delete it")
    if (run.output / "done").exists():
        print(f"[{run.name}] done before: {run.output}", flush=True)
        return
    run.output.mkdir(parents=True, exist_ok=True)
    begun.write_text(shlex.join(command[1:]))
    print(f"[{run.name}] {shlex.join(command[1:])}", flush=True)
    start = last = time.time()
    with open(run.output / "stdout.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment_of(threads))
        try:
            while process.poll() is None:
                time.sleep(0.5)
                if time.time() - last > 20:
                    last = time.time()
                    rows = [r for r in run.metrics() if "total_loss" in r]
                    if rows:
                        row, eta = rows[-1], f"{rows[-1].get('eta_seconds', 0):.0f} s to go"
                        print(
                            f"[{run.name}] iteration {row['iteration'] + 1}, loss {row['total_loss']:.3f}, {eta}",
                            flush=True,
                        )
        finally:
            if process.poll() is None:
                process.terminate()
    if process.returncode != 0:
        tail = "\n".join((run.output / "stdout.txt").read_text(errors="replace").splitlines()[-30:])
        raise SystemExit(
            f"[{run.name}] failed with status {process.returncode}; end of {run.output}/stdout.txt:\n{tail}"
        )
    (run.output / "done").touch()
    print(f"[{run.name}] finished in {time.time() - start:.0f} s", flush=True)


def pretrain(method: str, seed: int, args: argparse.Namespace, threads: int) -> str:
    """Pretrain and convert; returns the path of the Detectron2 weights, "" for random initialisation."""
    setting = METHODS[method]
    if setting is None:
        return ""
    config, overrides = setting
    output = args.output / f"pretrain_{method}_seed{seed}"
    overrides = ["SEED", str(seed), *TASKS[args.task].pretrain_opts, *overrides, *args.pretrain_opts]
    run = Run(f"pretrain {method} seed {seed}", config, output, overrides)
    execute(run, threads)
    weights = output / "backbone.pkl"
    if not weights.exists():
        convert = [
            sys.executable,
            str(ROOT / "tools/convert_checkpoint.py"),
            str(output / "model_final.pth"),
            str(weights),
            "--verify",
        ]
        print(f"[convert] {shlex.join(convert[1:])}", flush=True)
        subprocess.run(convert, check=True, env=environment_of(threads))
    return str(weights)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; the latter is NaN for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def _format(values: list[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.1f}" if math.isnan(error) else f"{mean:.1f} ± {error:.1f}"


def compare(
    runs: dict[str, list[Run]], eval_period: int, metrics: Sequence[str]
) -> tuple[list[list[str]], dict[str, dict[str, dict[str, list[float]]]]]:
    """Rows of the table, and method -> metric -> iteration -> values of the seeds."""
    curves: dict[str, dict[str, dict[str, list[float]]]] = {}
    for method, seeds in runs.items():
        for run in seeds:
            for row in run.metrics():
                # Evaluations within the run are logged at the last iteration before them, the final one after it.
                step = int(row["iteration"])
                step += (step + 1) % eval_period == 0
                for metric in metrics:
                    if metric in row:
                        value = 0.0 if math.isnan(row[metric]) else row[metric]  # NaN: nothing was detected
                        curves.setdefault(method, {}).setdefault(metric, {}).setdefault(str(step), []).append(value)
    rows = []
    for method, by_metric in curves.items():
        main_metric = by_metric[metrics[0]]
        final = str(max(int(i) for i in main_metric))
        halfway = [i for i in main_metric if int(i) * 2 == int(final)]
        rows.append(
            [
                method,
                *(_format(by_metric[metric][final]) for metric in metrics),
                _format(main_metric[halfway[0]]) if halfway else "",
                " / ".join(f"{v:.1f}" for v in main_metric[final]),
            ]
        )
    return rows, curves


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="scenes")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["random", "slotcon"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of pretraining and fine-tuning alike")
    parser.add_argument("--output", type=Path, default=Path("output/transfer"))
    parser.add_argument("--record", type=Path, help="JSON file for the result")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads in all")
    parser.add_argument("--eval-period", type=int, default=75, help="iterations between evaluations")
    parser.add_argument("--pretrain-opts", nargs="*", default=[], metavar="KEY VALUE", help="overrides for pretraining")
    parser.add_argument("--finetune-opts", nargs="*", default=[], metavar="KEY VALUE", help="overrides for fine-tuning")
    args = parser.parse_args(argv)
    start = time.time()
    task = TASKS[args.task]
    for name in task.datasets:
        DatasetCatalog.get(name)

    pairs = [(method, seed) for seed in args.seeds for method in args.methods]
    num_pretrained = sum(METHODS[method] is not None for method, _ in pairs)
    # Two processes with one thread each use two cores better than one process with two.
    threads_each = max(args.threads // max(num_pretrained, 1), 1)
    with ThreadPoolExecutor(args.threads) as pool:
        weights = dict(zip(pairs, pool.map(lambda pair: pretrain(*pair, args, threads_each), pairs), strict=True))
        runs: dict[str, list[Run]] = {method: [] for method in args.methods}
        for method, seed in pairs:
            overrides = ["SEED", str(seed), "TEST.EVAL_PERIOD", str(args.eval_period), "MODEL.WEIGHTS"]
            overrides += [weights[method, seed], *args.finetune_opts]
            output = args.output / f"finetune_{method}_seed{seed}"
            runs[method].append(Run(f"fine-tune from {method} seed {seed}", task.finetune_config, output, overrides))
        jobs = [run for seed_runs in zip(*runs.values(), strict=True) for run in seed_runs]
        list(pool.map(lambda run: execute(run, 1), jobs))

    rows, curves = compare(runs, args.eval_period, list(task.metrics))
    first, second = task.metrics.values()
    headers = ["initialisation", first, second, f"{first} halfway", f"{first} of each seed"]
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    print(f"\n{task.summary}; equal schedule, {len(args.seeds)} seed(s)\n\n{table}\n")
    (args.output / "table.md").write_text(table + "\n")
    lines, bands = {}, {}
    for method, metrics in curves.items():
        points = {int(i): mean_and_error(v) for i, v in metrics[next(iter(task.metrics))].items()}
        lines[method] = [(float(i), points[i][0]) for i in sorted(points)]
        if len(args.seeds) > 1:
            bands[method] = [points[i][1] for i in sorted(points)]
    plot_curves(
        args.output / "ap_curves.png",
        lines,
        xlabel="fine-tuning iteration",
        ylabel=f"{first} on {task.datasets[-1]}",
        title=f"{first} at an equal, short schedule",
        bands=bands or None,
    )
    if args.record:
        write_record(
            args.record,
            {
                "task": task.summary,
                "pretrain_configs": {m: setting[0] if (setting := METHODS[m]) else None for m in args.methods},
                "method_opts": {m: setting[1] for m in args.methods if (setting := METHODS[m])},
                "finetune_config": task.finetune_config,
                "task_opts": list(task.pretrain_opts),
                "pretrain_opts": args.pretrain_opts,
                "finetune_opts": args.finetune_opts,
                "seeds": args.seeds,
                "results": curves,
                "wall_time_s": round(time.time() - start),
            },
        )
        print(f"Written: {args.record}")
    print(f"Written: {args.output}/table.md, {args.output}/ap_curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
