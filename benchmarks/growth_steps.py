"""Training steps of `Trainer` on made-up batches, whole and without the backbone: their time and their memory."""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import create_ddp_model
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from stages.plain_updates import teacher_hook
from stages.step import make_batch
from stages.timing import peak_memory, repeat_in_turns, use_one_thread
from torch import Tensor, nn

from d2_objssl.data import SSLBatch
from d2_objssl.engine import build_optimizer, resolve_norms, setup_cfg
from d2_objssl.engine.train_step import TrainStep, amp_dtype
from d2_objssl.modeling import ObjectSSL
from d2_objssl.proposals import grid_regions
from d2_objssl.structures import ViewBatch

_CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "pretrain"
_FILES = {"SlotCon": "Base-SlotCon-R50.yaml", "DetCon-B": "Base-DetCon-R50.yaml"}
# With a learning rate of 0 every step has the same weights, hence the same work: slots stay active or not.
_SETTINGS = ("MODEL.DEVICE", "cpu", "VIS_PERIOD", 0, "SOLVER.BASE_LR", 0.0, "INPUT.REGIONS.SOURCE", "grid")
_TOP_OPERATORS = 6


def step_cfg(method: str, *opts: Any) -> CfgNode:
    """The paper's config of "SlotCon" or "DetCon-B", on the CPU; `opts`: KEY VALUE pairs."""
    return setup_cfg(str(_CONFIGS / _FILES[method]), [str(o) for o in (*_SETTINGS, *opts)])


def step_batch(cfg: CfgNode, num_images: int, seed: int) -> SSLBatch:
    """Two views of random pixels, with the config's grid of regions in each."""
    size = cfg.INPUT.SSL.CROP_SIZE
    batch = make_batch(num_images, seed, size)
    grid = torch.from_numpy(grid_regions(size, size, cfg.INPUT.REGIONS.GRID_SIZE))
    for view in batch.views:
        view.region_maps = grid.expand(num_images, -1, -1)
    return batch


class Step:
    """A training step as the trainer makes it, in as many processes as there are; the weights stay."""

    def __init__(self, cfg: CfgNode, seed: int) -> None:
        """Build the model of `cfg` and what trains it, and make a first step, which makes the buffers."""
        torch.manual_seed(seed)
        self.cfg = resolve_norms(cfg)
        model = build_model(self.cfg)
        assert isinstance(model, ObjectSSL) and model.teacher is not None
        self.model = model
        self.trainer = TrainStep(
            create_ddp_model(
                model, broadcast_buffers=False, find_unused_parameters=model.idle_parameters, device_ids=None
            ),
            (),
            build_optimizer(self.cfg, model),
            device_type="cpu",
            dtype=amp_dtype(self.cfg),
            output_dir=self.cfg.OUTPUT_DIR,
        )
        self.move_teacher = teacher_hook(model.teacher, model.student)
        self(step_batch(self.cfg, 2, seed))

    def __call__(self, batch: SSLBatch) -> None:
        """Make a step."""
        self.trainer.reset_data_loader(lambda: [batch])
        with EventStorage():
            self.trainer.run_step()
        self.move_teacher()

    def free_gradients(self) -> None:
        """Leave what lives between two steps: weights, teacher, momentum."""
        self.trainer.optimizer.zero_grad()

    @property
    def state_mb(self) -> float:
        """Size of weights, teacher and momentum, MB."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return 4e-6 * (sum(p.numel() for p in self.model.parameters()) + trained)


class Heads:
    """Forward and backward of everything but the backbones, whose features were computed before.

    Takes the step's model to pieces: make no further step with it.
    """

    def __init__(self, step: Step, batch: SSLBatch) -> None:
        self.model, self.dtype = step.model, step.trainer.dtype
        views = self.model.preprocess_views(batch.views)
        for branch in (self.model.student, self.model.teacher):
            assert branch is not None
            with self._autocast():
                branch.backbone = StoredFeatures(branch.backbone, views)

    def __call__(self, batch: SSLBatch) -> None:
        """Losses and gradients."""
        with self._autocast():
            loss = sum(self.model(batch).values())
        loss.backward()

    def free_gradients(self) -> None:
        """Leave the weights alone."""
        self.model.zero_grad()

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not None)


class StoredFeatures(nn.Module):
    """Gives what a backbone made of the views, one view after the other, again and again."""

    def __init__(self, backbone: nn.Module, views: Sequence[ViewBatch]) -> None:
        super().__init__()
        with torch.no_grad():
            features = [backbone(view.images) for view in views]
        for f in itertools.chain(*(of_view.values() for of_view in features)):
            f.requires_grad_()
        self._features = itertools.cycle(features)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of the next view."""
        return next(self._features)


Work = Step | Heads


def cpu_seconds(work: Work, batch: SSLBatch) -> float:
    """CPU time of one run."""
    work.free_gradients()
    start = time.process_time()
    work(batch)
    return time.process_time() - start


def peak_mb(work: Work, batch: SSLBatch) -> float:
    """What one run needs at its peak beyond what lives between the runs, MB: activations, gradients, copies."""
    work.free_gradients()
    return peak_memory(partial(work, batch))


def peak_of_process(cfg: CfgNode, num_images: int, seed: int) -> float:
    """`peak_mb` of a step in this process, which does nothing else: what others left in the allocator would hide some."""
    use_one_thread()
    logging.getLogger("d2_objssl").setLevel(logging.ERROR)
    return peak_mb(Step(cfg, seed), step_batch(cfg, num_images, seed))


def measure(
    contestants: Mapping[Any, tuple[Work, SSLBatch]], repeats: int, seed: int, peaks: Mapping[Any, float] | None = None
) -> dict[Any, dict[str, Any]]:
    """Memory of each, unless `peaks` has it already, MB; then time, taking turns.

    Returns:
        For each contestant cpu_s (median), cpu_s_runs, ms_per_image, peak_mb.
    """
    peaks = peaks or {key: peak_mb(*contestant) for key, contestant in contestants.items()}
    turns: dict[Any, Callable[[], float]] = {key: partial(cpu_seconds, *c) for key, c in contestants.items()}
    runs: dict[Any, list[float]] = repeat_in_turns(turns, repeats, seed)
    figures = {}
    for key, (_, batch) in contestants.items():
        seconds = statistics.median(runs[key])
        figures[key] = {"cpu_s": seconds, "cpu_s_runs": runs[key], "ms_per_image": 1e3 * seconds / len(batch)}
        figures[key]["peak_mb"] = peaks[key]
    return figures


def top_operators(work: Work, batch: SSLBatch) -> dict[str, float]:
    """The operators of PyTorch that take most of the time of a run, and their shares of it."""
    work.free_gradients()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work(batch)
    events = sorted(profiler.key_averages(), key=lambda e: e.self_cpu_time_total, reverse=True)
    total = sum(e.self_cpu_time_total for e in events)
    return {e.key: e.self_cpu_time_total / total for e in events[:_TOP_OPERATORS]}
