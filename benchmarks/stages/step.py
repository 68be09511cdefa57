"""A whole training step of SlotCon's ResNet-50, against contiguous tensors and one-by-one convolutions in float32.

The plain way is this project's own network without what makes it fast: images and weights in PyTorch's default memory
layout, the projector's layers as 1x1 convolutions, the optimiser and the teacher as loops. Its losses are the same.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from d2_objssl.data.collation import SSLBatch
from d2_objssl.engine import LARS
from d2_objssl.modeling.heads import MLP
from d2_objssl.structures import ViewBatch

from .models import build_slotcon
from .plain_updates import PlainLARS, move_plainly, teacher_hook
from .timing import Measurement, Row, repeat_in_turns, status_mb, use_one_thread

SUMMARY = "a training step of SlotCon, ResNet-50, 224 px"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this stage."""
    parser.add_argument("--batch-size", type=int, default=8, help="images (default: %(default)s; --quick: 4)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")


def run(args: argparse.Namespace) -> Measurement:
    """Time whole steps: forward, backward, optimiser, teacher; wall time, because threads share the work."""
    torch.set_num_threads(args.threads)
    batch_size = min(args.batch_size, 4) if args.quick else args.batch_size
    batch = make_batch(batch_size, args.seed)
    contestants = {name: build_step(name, args.seed) for name in ("plain", "float32", "bfloat16")}
    losses = {name: step(batch) for name, step in contestants.items()}  # the first step makes buffers, too
    print("losses of the first step: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    repeats = min(args.repeats, 2) if args.quick else args.repeats
    runs = repeat_in_turns({k: partial(_time, f, batch) for k, f in contestants.items()}, repeats, args.seed)
    torch.set_num_threads(1)
    seconds = {name: statistics.median(values) for name, values in runs.items()}
    name = f"SlotCon R50 step, batch {batch_size}, {args.threads} thread(s)"
    goals = {"float32": 1.3 if args.threads == 1 else 1.4, "bfloat16": 2.4}
    rows = [Row(f"{name}, {k}", seconds["plain"], seconds[k], unit="s", goal=goal) for k, goal in goals.items()]
    del contestants
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        measure = partial(pool.submit, peak_of_process, batch_size=batch_size, seed=args.seed, threads=args.threads)
        peaks = {k: measure(k).result() for k in ("plain", "bfloat16")}
    goal = 1.33 if batch_size >= 8 else None  # weights, and what is computed in float32, do not shrink
    rows.append(Row(f"{name}, bfloat16, peak", peaks["plain"], peaks["bfloat16"], unit="MB of a process", goal=goal))
    details = {"batch_size": batch_size, "threads": args.threads, "seconds": runs, "losses": losses, "peak_mb": peaks}
    return Measurement(rows, details)


def build_step(name: str, seed: int) -> OwnStep:
    """A contestant: "plain", "float32" or "bfloat16"."""
    if name == "plain":
        return PlainStep(seed)
    return OwnStep(seed, dtype=torch.bfloat16 if name == "bfloat16" else None)


def peak_of_process(name: str, batch_size: int, seed: int, threads: int) -> float:
    """Resident memory of this process at its peak, libraries included, behind two steps of a contestant, MB."""
    use_one_thread()
    torch.set_num_threads(threads)
    step, batch = build_step(name, seed), make_batch(batch_size, seed)
    for _ in range(2):
        step(batch)
    return status_mb("VmHWM")


def make_batch(num_images: int, seed: int, crop_size: int = 224) -> SSLBatch:
    """Two views of random pixels; their crops share three quarters of their sides."""
    generator = torch.Generator().manual_seed(seed)
    views = []
    for corner in (0.0, 56.0):
        box = torch.tensor([corner, corner, corner + crop_size, corner + crop_size])
        images = torch.randint(0, 256, (num_images, 3, crop_size, crop_size), dtype=torch.uint8, generator=generator)
        views.append(ViewBatch(images, box.repeat(num_images, 1), torch.rand(num_images, generator=generator) < 0.5))
    return SSLBatch(views, [""] * num_images)


class OwnStep:
    """A training step as the trainer makes it."""

    def __init__(self, seed: int, dtype: torch.dtype | None) -> None:
        torch.manual_seed(seed)
        self.dtype = dtype
        self.model = build_slotcon()
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer: Any = LARS(self.params, lr=0.1, weight_decay=1e-5)
        assert self.model.teacher is not None
        self.move_teacher = teacher_hook(self.model.teacher, self.model.student)

    def __call__(self, batch: SSLBatch) -> float:
        """Make a step and return the loss."""
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not None):
            loss = sum(self.model(batch).values())
        self.model.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.move_teacher()
        return loss.item()


class PlainStep(OwnStep):
    """The same in the plain way; see the module."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, dtype=None)
        self.model.memory_format = torch.contiguous_format
        self.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        for branch in (self.model.student, self.model.teacher):
            assert branch is not None
            branch.embedder.projector = ConvMLP(branch.embedder.projector)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = PlainLARS(self.params)
        self.move_teacher = partial(move_plainly, self.model.teacher, self.model.student)


class ConvMLP(nn.Module):
    """A projector of 1x1 convolutions with the weights of a `heads.MLP`, on (N, h, w, C) maps."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for layer in mlp.layers:
            if isinstance(layer, nn.Linear):
                conv = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None)
                conv.weight = nn.Parameter(layer.weight.detach()[:, :, None, None].contiguous())
                conv.bias = layer.bias
                layers.append(conv.requires_grad_(layer.weight.requires_grad))
            elif isinstance(layer, nn.BatchNorm1d):
                norm = nn.BatchNorm2d(layer.num_features, affine=layer.affine)
                norm.load_state_dict(layer.state_dict())
                layers.append(norm.requires_grad_(next(mlp.parameters()).requires_grad))
            else:
                layers.append(layer)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(N, h, w, C) to (N, h, w, D)."""
        return self.layers(x.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)


def _time(step: OwnStep, batch: SSLBatch) -> float:
    """Wall time of one step, s."""
    start = time.perf_counter()
    step(batch)
    return time.perf_counter() - start
