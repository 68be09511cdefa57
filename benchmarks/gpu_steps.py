"""Training steps on batches that lie on the device: images/s and memory by method, batch, precision, and compilation.

A step is the trainer's own (`engine.train_step.TrainStep`: forward, backward, guard, optimiser) with the teacher's update;
schedules, log and checkpoints are left out, gpu_input.py has them. It is timed from the end of one step to the end of the
next one, by events on the device, so that nothing waits that does not wait in training.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from gpu_settings import METHODS, PRECISIONS, Settings, Task
from stages.step import make_batch

from d2_objssl.data.collation import SSLBatch
from d2_objssl.engine import EMATeacher, build_optimizer
from d2_objssl.engine.bootstrap import CyborgsPhases
from d2_objssl.engine.train_step import TrainStep, amp_dtype

_REGIONS_A_SIDE = 8  # an image has 8 x 8 rectangles as regions, about as many as Felzenszwalb's


class Stopwatch(HookBase):
    """Notes when the work of each step is done."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self._marks: list[Any] = []
        self.skipped = 0  # steps without an update, in float16

    def before_train(self) -> None:
        """Forget earlier steps."""
        self._marks, self.skipped = [self._mark()], 0

    def after_step(self) -> None:
        """Note the time."""
        self._marks.append(self._mark())
        self.skipped += self.trainer.step_skipped

    def seconds(self, *, skip: int) -> list[float]:
        """How long each step took, without the first `skip`."""
        pairs = itertools.pairwise(self._marks[skip:])
        if not self._on_gpu:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        method: a key of METHODS.
        batch_size: images of a step.
        precision: a key of PRECISIONS.
        compile_mode: of torch.compile, for both backbones; None: eager.
        note: says what `opts` changes.
        opts: KEY VALUE pairs.
    """

    method: str
    batch_size: int
    precision: str = "bfloat16"
    compile_mode: str | None = None
    note: str = ""
    opts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For tables."""
        parts = [self.method, f"batch {self.batch_size}", self.precision, self.note]
        if self.compile_mode is not None:
            parts.append(f'torch.compile "{self.compile_mode}"')
        return ", ".join(filter(None, parts))

    def cfg(self, settings: Settings) -> CfgNode:
        """Its config."""
        batch = ("SOLVER.IMS_PER_BATCH", str(self.batch_size))
        return settings.load_cfg(self.method, *PRECISIONS[self.precision], *batch, *self.opts)


def make_device_batch(cfg: CfgNode, settings: Settings) -> SSLBatch:
    """A batch on the device as the loader's workers collate it: random pixels, rectangles as regions."""
    batch = make_batch(cfg.SOLVER.IMS_PER_BATCH, settings.seed, cfg.INPUT.SSL.CROP_SIZE)
    side = torch.arange(cfg.INPUT.SSL.CROP_SIZE) * _REGIONS_A_SIDE // cfg.INPUT.SSL.CROP_SIZE
    maps = None
    if cfg.INPUT.REGIONS.SOURCE != "none":
        maps = (side[:, None] * _REGIONS_A_SIDE + side).to(torch.int16).repeat(len(batch), 1, 1)
    views = []
    for view in batch.views:
        images = view.images.contiguous(memory_format=torch.channels_last)
        views.append(replace(view, images=images, region_maps=maps).to(settings.device))
    return SSLBatch(views, batch.file_names)


def build_step(variant: Variant, settings: Settings) -> tuple[TrainStep, Stopwatch]:
    """Model, optimiser, teacher's update and a batch, as the trainer puts them together."""
    torch.manual_seed(settings.seed)
    cfg = variant.cfg(settings)
    model = build_model(cfg)
    if variant.compile_mode is not None:
        backend = "eager" if settings.tiny else "inductor"
        for branch in (model.student, model.teacher):
            branch.backbone.compile(backend=backend, mode=variant.compile_mode)
    step = TrainStep(
        model,
        itertools.repeat(make_device_batch(cfg, settings)),
        build_optimizer(cfg, model),
        device_type=settings.device,
        dtype=amp_dtype(cfg),
        output_dir=tempfile.gettempdir(),
        accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
    )
    stopwatch = Stopwatch(settings.device)
    teacher = cfg.MODEL.SSL.TEACHER
    hooks: list[HookBase] = [EMATeacher(model.teacher, model.student, teacher.MOMENTUM, teacher.MOMENTUM_SCHEDULE)]
    if cfg.MODEL.SSL.METHOD == "CYBORGS":
        num_images = settings.images_per_epoch(variant.method)
        period, size = cfg.MODEL.SSL.CYBORGS.VMF_PERIOD, variant.batch_size
        phases = {"warmup_iterations": 0, "period": period, "num_images": num_images, "batch_size": size}
        hooks.append(CyborgsPhases(model.criterion, **phases))
    step.register_hooks([*hooks, stopwatch])
    return step, stopwatch


@contextmanager
def backend_flags(*, precision: str, cudnn_benchmark: bool) -> Iterator[None]:
    """Set PyTorch's global switches, and put them back."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.benchmark = cudnn_benchmark
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.benchmark = before[1]


def measure_step(variant: Variant, settings: Settings) -> dict[str, Any]:
    """Images/s by the median step, and the peak of memory from the building of the model on."""
    cfg = variant.cfg(settings)
    on_gpu = settings.device == "cuda"
    if variant.compile_mode is not None:
        torch.compiler.reset()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with backend_flags(precision=variant.precision, cudnn_benchmark=cfg.CUDNN_BENCHMARK):
        step, stopwatch = build_step(variant, settings)
        step.train(0, settings.warmup_steps + settings.steps)
        seconds = stopwatch.seconds(skip=settings.warmup_steps)
        first = stopwatch.seconds(skip=0)[0]
    rate = variant.batch_size / statistics.median(seconds)
    return {
        "batch_size": variant.batch_size,
        "dtype": str(step.dtype or torch.float32).removeprefix("torch."),
        "images_per_second": rate,
        "epoch_seconds": settings.images_per_epoch(variant.method) / rate,
        "step_seconds": seconds,
        "first_step_seconds": first,
        "skipped_steps": stopwatch.skipped,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
    }


def step_tasks(settings: Settings) -> list[Task]:
    """Methods by batch; precisions; activation checkpointing, cuDNN's benchmark mode, accumulation."""
    sizes = settings.batch_sizes
    small, largest = sizes[min(1, len(sizes) - 1)], sizes[-1]  # small: 128, as a card has in SlotCon's Table 3
    variants = [Variant("SlotCon", largest), Variant("SlotCon", small)]
    variants += [Variant(method, small) for method in METHODS if method != "SlotCon"]
    num_essential = len(variants)
    variants += [Variant(method, size) for method in METHODS for size in sizes]
    variants += [Variant("SlotCon", size, precision) for precision in ("float16", "tf32") for size in sizes]
    variants += [Variant("SlotCon", small, "float32")]
    variants += [
        Variant(method, small, precision) for method in ("DetCon-B", "CYBORGS") for precision in ("float16", "tf32")
    ]
    for note, *opts in (
        ("activation checkpointing", "MODEL.SSL.CHECKPOINT_ACTIVATIONS", "True"),
        ("CUDNN_BENCHMARK", "CUDNN_BENCHMARK", "True"),
    ):
        variants.append(Variant("SlotCon", largest, note=note, opts=tuple(opts)))
    accumulation = ("SOLVER.ACCUMULATION_STEPS", "2")
    variants.append(Variant("SlotCon", 2 * largest, note="in 2 parts", opts=accumulation))
    unique = dict.fromkeys(variants)
    return [_task("step", v, settings, essential=i < num_essential) for i, v in enumerate(unique)]


def compile_tasks(settings: Settings) -> list[Task]:
    """torch.compile of the backbones, without and with CUDA graphs; "step" has the same without it."""
    sizes = settings.batch_sizes
    modes = {"default": sizes[-1:], "reduce-overhead": sizes[-1:] if len(sizes) == 1 else (sizes[0], sizes[-1])}
    variants = [Variant("SlotCon", size, compile_mode=mode) for mode, chosen in modes.items() for size in chosen]
    return [_task("compile", v, settings, essential=v.batch_size == sizes[-1]) for v in variants]


def _task(measurement: str, variant: Variant, settings: Settings, *, essential: bool) -> Task:
    run = partial(measure_step, variant, settings)
    return Task(measurement, variant.name, run, method=variant.method, essential=essential)
