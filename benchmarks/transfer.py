#!/usr/bin/env python
"""Does pretraining help? Fine-tunes one model from several initialisations at an equal schedule and compares.

Pretrains each method, converts the checkpoint, fine-tunes, and does the same from random initialisation; for every seed.
Tasks: "scenes", pretraining on 2,000 generated scenes, Mask R-CNN on 100 other, labelled ones; "camvid", pretraining and
semantic segmentation on CamVid's training images (in DETECTRON2_DATASETS/camvid), "camvid_fcn" and "camvid_linear" the same
with an FCN and with a linear probe of the frozen backbone; "bccd", pretraining and Faster R-CNN on BCCD's training images
(in DETECTRON2_DATASETS/bccd). --fractions says with which parts of the labels.

The row "byol" is DetCon-B with the whole image as its only region. Two rows are not self-supervised: "detcon_gt" sees the
true masks of the scenes that it is pretrained on, "semcl" label maps. Writes a table, curves and a JSON record. Runs of an
earlier call in the same --output folder that finished are not repeated, interrupted ones are resumed.

Example:
    python benchmarks/transfer.py --methods random slotcon --seeds 0 1 2 --output output/transfer \\
        --record benchmarks/results/transfer_scenes.json
    python benchmarks/transfer.py --task bccd --methods random detcon_grid --seeds 0 1 --fractions 0.1 1 \\
        --output output/transfer_bccd --record benchmarks/results/transfer_bccd.json
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.data import DatasetCatalog
from runs import Run, conversion, execute, training
from seed_statistics import format_seeds, mean_and_error
from tabulate import tabulate

import d2_objssl  # noqa: F401  (registers the scenes)
from d2_objssl.evaluation.results import write_record
from d2_objssl.visualization import plot_curves

_DETCON = "configs/quick/detcon_b_R_18_scenes.yaml"
# Method -> pretraining config and overrides; None: random initialisation. A task may have other ones.
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
        methods: method -> pretraining config and overrides, where they are not those of `METHODS`.
    """

    summary: str
    datasets: tuple[str, ...]
    pretrain_opts: tuple[str, ...]
    finetune_config: str
    metrics: dict[str, str]
    methods: dict[str, tuple[str, list[str]]] = field(default_factory=dict)

    def pretraining(self, method: str) -> tuple[str, list[str]] | None:
        """Config and overrides of a method; None: random initialisation."""
        return self.methods.get(method) or METHODS[method]


def _camvid(model: str, finetune_config: str) -> Task:
    return Task(
        summary=f"{model} on camvid_train_sem_seg (367 images), mIoU on camvid_val_sem_seg (101 images)",
        datasets=("camvid_train_sem_seg", "camvid_val_sem_seg"),
        pretrain_opts=("DATASETS.TRAIN", "('camvid_train_sem_seg',)"),
        finetune_config=finetune_config,
        metrics={"sem_seg/mIoU": "mIoU", "sem_seg/pACC": "pixel accuracy"},
    )


TASKS = {
    "scenes": Task(
        summary="Mask R-CNN R18-FPN on scenes_train (100 images), AP on scenes_val (100 images)",
        datasets=("scenes_unlabeled", "scenes_train", "scenes_val"),
        pretrain_opts=(),
        finetune_config="configs/quick/mask_rcnn_R_18_FPN_scenes.yaml",
        metrics={"bbox/AP": "box AP", "segm/AP": "mask AP"},
    ),
    "camvid": _camvid("semantic FPN R18", "configs/quick/sem_seg_R_18_FPN_camvid.yaml"),
    "camvid_fcn": _camvid("FCN R18", "configs/quick/fcn_R_18_camvid.yaml"),
    "camvid_linear": _camvid("linear probe of a frozen R18", "configs/quick/linear_R_18_camvid.yaml"),
    "bccd": Task(
        summary="Faster R-CNN R18-FPN on bccd_train (205 images), AP on bccd_test (72 images)",
        datasets=("bccd_train", "bccd_test"),
        pretrain_opts=("DATASETS.TRAIN", "('bccd_train',)"),
        finetune_config="configs/quick/faster_rcnn_R_18_FPN_bccd.yaml",
        metrics={"bbox/AP": "box AP", "bbox/AP50": "AP50", "bbox/AP75": "AP75"},
        methods={
            "slotcon": ("configs/quick/slotcon_R_18_bccd.yaml", []),
            "detcon_grid": ("configs/quick/detcon_b_R_18_bccd.yaml", []),
        },
    ),
}


def pretrain(method: str, seed: int, args: argparse.Namespace, threads: int) -> str:
    """Pretrain and convert; returns the path of the Detectron2 weights, "" for random initialisation."""
    setting = TASKS[args.task].pretraining(method)
    if setting is None:
        return ""
    config, overrides = setting
    output = args.output / f"pretrain_{method}_seed{seed}"
    overrides = ["SEED", str(seed), *TASKS[args.task].pretrain_opts, *overrides, *args.pretrain_opts]
    run = training(f"pretrain {method} seed {seed}", config, output, overrides)
    execute(run, threads)
    convert, weights = conversion(run)
    execute(convert, threads)
    return str(weights)


def finetunings(args: argparse.Namespace, weights: dict[tuple[str, int], str]) -> dict[str, list[Run]]:
    """Initialisation, with the part of the labels unless that is all -> the runs of the seeds.

    Args:
        args: of the command line.
        weights: (method, seed) -> the file that it starts from.
    """
    runs: dict[str, list[Run]] = {}
    for fraction in args.fractions:
        for (method, seed), path in weights.items():
            label, folder, overrides = method, f"finetune_{method}_seed{seed}", ["SEED", str(seed)]
            if fraction != 1:
                label, folder = f"{method}, {fraction:.0%} of the labels", f"{folder}_{fraction:g}"
                overrides += ["DATASETS.TRAIN_FRACTION", str(fraction)]
            overrides += ["TEST.EVAL_PERIOD", str(args.eval_period), "MODEL.WEIGHTS", path, *args.finetune_opts]
            name = f"fine-tune from {label}, seed {seed}"
            run = training(name, TASKS[args.task].finetune_config, args.output / folder, overrides)
            runs.setdefault(label, []).append(run)
    return runs


def compare(
    runs: dict[str, list[Run]], eval_period: int, metrics: Sequence[str]
) -> tuple[list[list[str]], dict[str, dict[str, dict[str, list[float]]]]]:
    """Rows of the table, and initialisation -> metric -> iteration -> values of the seeds."""
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
                *(format_seeds(by_metric[metric][final]) for metric in metrics),
                format_seeds(main_metric[halfway[0]]) if halfway else "",
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
    text = "parts of the labelled images, in (0, 1]; each has the same number of iterations (default: all images)"
    parser.add_argument("--fractions", nargs="+", type=float, default=[1.0], metavar="F", help=text)
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
    num_pretrained = sum(task.pretraining(method) is not None for method, _ in pairs)
    # Two processes with one thread each use two cores better than one process with two.
    threads_each = max(args.threads // max(num_pretrained, 1), 1)
    with ThreadPoolExecutor(args.threads) as pool:
        weights = dict(zip(pairs, pool.map(lambda pair: pretrain(*pair, args, threads_each), pairs), strict=True))
        runs = finetunings(args, weights)
        jobs = [run for seed_runs in zip(*runs.values(), strict=True) for run in seed_runs]
        list(pool.map(lambda run: execute(run, 1), jobs))

    rows, curves = compare(runs, args.eval_period, list(task.metrics))
    first = next(iter(task.metrics.values()))
    headers = ["initialisation", *task.metrics.values(), f"{first} halfway", f"{first} of each seed"]
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
                "pretrain_configs": {m: setting[0] if (setting := task.pretraining(m)) else None for m in args.methods},
                "method_opts": {m: setting[1] for m in args.methods if (setting := task.pretraining(m))},
                "finetune_config": task.finetune_config,
                "task_opts": list(task.pretrain_opts),
                "pretrain_opts": args.pretrain_opts,
                "finetune_opts": args.finetune_opts,
                "fractions": args.fractions,
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
