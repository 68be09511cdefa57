"""The loader alone, and whole training with it, on generated JPEGs."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from gpu_settings import PRECISIONS, Settings, Task, Workspace
from gpu_steps import Stopwatch, backend_flags

from d2_objssl.data import build_train_loader
from d2_objssl.data.device_augmentation import finish_colors
from d2_objssl.engine import Trainer

_COLOURS = ("worker", "model")  # INPUT.SSL.AUGMENT_DEVICE
_METHODS = ("SlotCon", "DetCon-B", "CYBORGS")


def measure_loader(
    method: str, *, colours: str, num_workers: int, workspace: Workspace, settings: Settings
) -> dict[str, Any]:
    """Images/s that the loader delivers, and how long the device works on what is left to it.

    Each worker makes whole batches, so they come in waves of as many as there are workers: the first wave is not timed,
    the next two are.
    """
    batch_size, wave = settings.batch_sizes[-1], max(num_workers, 1)
    opts = ["INPUT.SSL.AUGMENT_DEVICE", colours, "DATALOADER.NUM_WORKERS", str(num_workers)]
    opts += ["SOLVER.IMS_PER_BATCH", str(batch_size), *workspace.data_opts(method)]
    batches: Iterator[Any] = iter(build_train_loader(settings.load_cfg(method, *opts)))
    for _ in islice(batches, wave):
        pass
    start = time.perf_counter()
    for batch in islice(batches, 2 * wave):
        last = batch
    rate = 2 * wave * batch_size / (time.perf_counter() - start)
    del batches  # ends the workers
    return {
        "num_workers": num_workers,
        "batch_size": batch_size,
        "images_per_second": rate,
        "epoch_seconds": settings.images_per_epoch(method) / rate,
        "device_ms_per_batch": 1e3 * _time_on_device(last, torch.device(settings.device)),
    }


def _time_on_device(batch: Any, device: torch.device, repeats: int = 5) -> float:
    """Seconds to copy a batch to the device and do there what is left to do to its colours; the least of the repeats."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for view in batch.views:
            finish_colors(view, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure_training(method: str, *, colours: str, workspace: Workspace, settings: Settings) -> dict[str, Any]:
    """Images/s of a run of the trainer, with hooks and log, by the mean iteration after the loader's first wave."""
    num_workers, batch_size = settings.workers[-1], settings.batch_sizes[-1]
    warmup = settings.warmup_steps + num_workers
    num_timed = settings.steps + 2 * num_workers
    with tempfile.TemporaryDirectory(dir=workspace.folder) as output_dir:
        opts = ["INPUT.SSL.AUGMENT_DEVICE", colours, "DATALOADER.NUM_WORKERS", str(num_workers)]
        opts += ["SOLVER.IMS_PER_BATCH", str(batch_size), *PRECISIONS["bfloat16"], *workspace.data_opts(method)]
        opts += ["SOLVER.MAX_EPOCHS", "0.0", "SOLVER.WARMUP_EPOCHS", "0.0", "SOLVER.WARMUP_ITERS", "1"]
        opts += ["SOLVER.MAX_ITER", str(warmup + num_timed + 1), "SOLVER.STEPS", "()", "OUTPUT_DIR", output_dir]
        opts += ["SOLVER.CHECKPOINT_EPOCHS", "0.0", "SOLVER.CHECKPOINT_PERIOD", "1000000"]
        opts += ["MODEL.SSL.CYBORGS.WARMUP_EPOCHS", "0.0"]
        cfg = settings.load_cfg(method, *opts)
        with backend_flags(precision="bfloat16", cudnn_benchmark=cfg.CUDNN_BENCHMARK):
            trainer = Trainer(cfg)
            stopwatch = Stopwatch(settings.device)
            trainer.register_hooks([stopwatch])
            trainer.train()
        seconds = stopwatch.seconds(skip=warmup)[:-1]  # a checkpoint follows the last step
    history = trainer.storage.history("data_time").values()
    waits = [value for value, iteration in history if warmup <= iteration < warmup + num_timed]
    rate = batch_size * len(seconds) / sum(seconds)
    return {
        "num_workers": num_workers,
        "batch_size": batch_size,
        "images_per_second": rate,
        "epoch_seconds": settings.images_per_epoch(method) / rate,
        "step_seconds": seconds,
        "waiting_share": sum(waits) / sum(seconds),
    }


def loader_tasks(settings: Settings, workspace: Workspace) -> list[Task]:
    """SlotCon's views by workers and by where the colours are changed; views with region maps by the latter."""
    tasks = []
    for method in ("SlotCon", "DetCon-B"):
        for num_workers in settings.workers if method == "SlotCon" else settings.workers[-1:]:
            for colours in _COLOURS:
                run = partial(
                    measure_loader,
                    method,
                    colours=colours,
                    num_workers=num_workers,
                    workspace=workspace,
                    settings=settings,
                )
                name = f"{method}, {num_workers} of {os.cpu_count()} cores, colours: {colours}"
                essential = method == "SlotCon" and num_workers == settings.workers[-1]
                tasks.append(Task("loader", name, run, method=method, essential=essential))
    return tasks


def training_tasks(settings: Settings, workspace: Workspace) -> list[Task]:
    """Every method with its loader; CYBORGS without its rounds of masks, with Felzenszwalb's in their place."""
    tasks = []
    for method in _METHODS:
        for colours in _COLOURS:
            run = partial(measure_training, method, colours=colours, workspace=workspace, settings=settings)
            name = f"{method}, batch {settings.batch_sizes[-1]}, bfloat16, {settings.workers[-1]} workers, colours: {colours}"
            tasks.append(Task("end_to_end", name, run, method=method, essential=method == "SlotCon"))
    return tasks
