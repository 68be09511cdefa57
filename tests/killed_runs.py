"""Tiny runs of every method, and runs in processes of their own that end by SIGKILL at a chosen or a random moment."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.env import seed_all_rng
from tiny_cyborgs import cyborgs_cfg
from tiny_detcon import DETCON_S
from tiny_runs import finetune_cfg, pretrain_cfg
from tiny_semcl import register_pairs, semcl_run_cfg, write_labelled

from d2_objssl import add_objssl_config
from d2_objssl.engine import Trainer
from d2_objssl.engine.feature_clustering import FeatureClusterer

METHODS = ("SlotCon", "DetConS", "DetConB", "CYBORGS", "SemCL")


def method_cfg(method: str, photos: Path, output_dir: Path, *opts: Any) -> CfgNode:
    """7 or 8 iterations of 4 images of a method, or of "Mask R-CNN" with an evaluation, a checkpoint every 3.

    Args:
        photos: see `tiny_runs.write_photos`; its folder also gets SemCL's labelled images.
    """
    if method == "Mask R-CNN":
        return finetune_cfg(output_dir, "DATASETS.TEST", ("scenes_tiny_val",), "TEST.EVAL_PERIOD", 3, *opts)
    if method == "CYBORGS":
        return cyborgs_cfg(photos, output_dir, *opts)
    if method == "SemCL":
        _register_pairs(photos.parent / "labelled")
        return semcl_run_cfg(output_dir, "DATASETS.TRAIN", ("killed_pairs",), *opts)
    detcon: list[Any] = []
    if method.startswith("DetCon"):
        detcon += ["MODEL.SSL.METHOD", "DetConB", "INPUT.REGIONS.SOURCE", "grid", "INPUT.REGIONS.GRID_SIZE", 3]
        detcon += ["MODEL.SSL.EXPORT_BRANCH", "student", "MODEL.SSL.DETCON.NUM_REGIONS", 4]
        detcon += ["MODEL.SSL.DETCON.MAX_REGION_IDS", 16]
        detcon += DETCON_S if method == "DetConS" else []
    return pretrain_cfg(photos, output_dir, *detcon, *opts)


def _register_pairs(folder: Path) -> None:
    if "killed_pairs" not in DatasetCatalog:
        register_pairs("killed_pairs", write_labelled(folder))


# ------------------------------------------------------------------------------------------------ in a child process


class _Log(HookBase):
    """Writes the loss of every step to a file at once: the process may not live to return it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def after_step(self) -> None:
        value, _ = self.trainer.storage.latest()["total_loss"]
        with open(self.file, "a") as f:
            f.write(json.dumps([self.trainer.iter, value]) + "\n")


class _AtStep(HookBase):
    """Calls a function before a step."""

    def __init__(self, iteration: int, function: Callable[[], None]) -> None:
        self.iteration = iteration
        self.function = function

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            self.function()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_soon(seed: int) -> None:
    """At a random moment of the next tenth of a second: in a step, between steps, in a checkpoint."""
    threading.Timer(random.Random(seed).uniform(0, 0.1), _kill).start()


def _half_a_checkpoint(number: int, save: Callable[..., None] = torch.save) -> Callable[..., None]:
    """torch.save that is killed in the middle of the file of iteration `number`."""

    def killed(content: Any, file: Any) -> None:
        if content.get("iteration") != number:
            return save(content, file)
        save(content, whole := io.BytesIO())
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        _kill()

    return killed


def _kill_behind(number: int, replace: Callable[..., None] = os.replace) -> Callable[..., None]:
    """os.replace that is killed when a checkpoint is there, but `last_checkpoint` does not name it yet."""

    def killed(source: str, target: str) -> None:
        replace(source, target)
        if str(target).endswith(f"model_{number:07d}.pth"):
            _kill()

    return killed


def _kill_at_call(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """A method that is killed in its call `number`, counted from 1."""
    calls = iter(range(1, sys.maxsize))

    def killed(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            _kill()
        return function(*args, **kwargs)

    return killed


def _inject(trainer: Trainer, kind: str, number: int) -> contextlib.AbstractContextManager[Any]:
    """Prepare a fault: see `run_in_child`."""
    if kind == "step":
        trainer.register_hooks([_AtStep(number, lambda: _kill_soon(number))])
    if kind == "hang":
        trainer.register_hooks([_AtStep(number, threading.Event().wait)])
    if kind == "write":
        return mock.patch("torch.save", _half_a_checkpoint(number))
    if kind == "rename":
        return mock.patch("os.replace", _kill_behind(number))
    if kind == "bootstrap":
        return mock.patch.object(FeatureClusterer, "cluster", _kill_at_call(number, FeatureClusterer.cluster))
    if kind == "evaluation":
        return mock.patch.object(GeneralizedRCNN, "inference", _kill_at_call(number, GeneralizedRCNN.inference))
    return contextlib.nullcontext()


def _main(config: str, resume: bool, fault: tuple[str, int], photos: Path, seed: int) -> None:
    torch.set_num_threads(1)
    # Workers of data loaders are forked, as in a process that was started by a command.
    multiprocessing.set_start_method("fork", force=True)
    _register_pairs(photos.parent / "labelled")
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.merge_from_other_cfg(CfgNode.load_cfg(config))
    finetune_cfg(Path(cfg.OUTPUT_DIR))  # enters its data sets into the catalogs
    output_dir = Path(cfg.OUTPUT_DIR)
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / "log.txt", "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    seed_all_rng(seed)
    trainer = Trainer(cfg)
    trainer.register_hooks([_Log(output_dir / "losses.jsonl")])
    with _inject(trainer, *fault):
        trainer.resume_or_load(resume=resume)
        trainer.train()


def start_child(
    cfg: CfgNode, photos: Path, *, resume: bool = False, fault: tuple[str, int] = ("none", 0)
) -> multiprocessing.process.BaseProcess:
    """Start `run_in_child` and do not wait for it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["d2_objssl", "d2_objssl.engine"])
    # What a resumed run does must not depend on how its process began. Without a checkpoint it begins again.
    seed = 12345 if resume and list(Path(cfg.OUTPUT_DIR).glob("model_*.pth")) else 0
    process = context.Process(target=_main, args=(cfg.dump(), resume, fault, photos, seed))
    process.start()
    return process


def run_in_child(cfg: CfgNode, photos: Path, *, resume: bool = False, fault: tuple[str, int] = ("none", 0)) -> None:
    """Train in a process of its own, to the end or to a fault, after which it must have died of SIGKILL.

    Losses are appended to OUTPUT_DIR/losses.jsonl; see `losses_of`.

    Args:
        fault: "step": within a tenth of a second after the start of iteration N. "write": when half of the checkpoint of
            iteration N is written. "rename": when it is there, but `last_checkpoint` does not name it. "bootstrap": in
            clustering N of the process. "evaluation": at its batch N. "none"; "hang": before step N, for ever.
    """
    process = start_child(cfg, photos, resume=resume, fault=fault)
    process.join(timeout=120)
    expected = 0 if fault[0] == "none" else -signal.SIGKILL
    if process.exitcode != expected:
        process.kill()
        log = Path(cfg.OUTPUT_DIR) / "log.txt"
        text = log.read_text(errors="replace")[-5000:] if log.exists() else "see above"
        raise AssertionError(f"{fault}: exit code {process.exitcode}\n{text}")


def losses_of(output_dir: Path) -> list[tuple[int, float]]:
    """Iteration and total loss of every step of all processes that ran there, in order."""
    return [tuple(json.loads(line)) for line in (output_dir / "losses.jsonl").read_text().splitlines()]
