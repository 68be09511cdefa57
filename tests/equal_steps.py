"""Two steps of every method, in one process or, run as a script by a launcher, in several that then lose one of them.

Equal are steps only where what is random is fixed: regions are drawn from a seed of each image. What a method computes for
each process by itself is, in a single process, computed for each half of the batch: CYBORGS' clusters. SlotCon's slot loss,
a mean over the pairs of a process, is one over all of them where processes have equally many.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import HookBase, default_argument_parser
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from killed_runs import METHODS, method_cfg
from torch import Tensor, nn

from d2_objssl.engine import Trainer, launch
from d2_objssl.modeling.methods.cyborgs import CyborgsCriterion, PhasedSampler
from d2_objssl.modeling.region_pool import RegionSampler
from d2_objssl.structures import RegionEmbeddings, Regions, ViewBatch

BATCH = 4  # images of all processes

_COMMON: list[Any] = ["SOLVER.IMS_PER_BATCH", BATCH, "SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 0]
# Not AdamW: it makes whole steps of the rounding errors of gradients that are 0, those of biases before a batch norm.
# Not LARS: it takes the lengths of those for steps, too. And short steps: long ones lead to where a network of so few
# cells magnifies a rounding error a million times.
_COMMON += ["SOLVER.OPTIMIZER", "SGD", "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR", 1e-5]
_OF_METHOD: dict[str, list[Any]] = {
    # So few prototypes on so many cells that both processes have equally many pairs; a test checks that.
    "SlotCon": ["MODEL.SSL.SLOTCON.NUM_PROTOTYPES", 3, "INPUT.SSL.CROP_SIZE", 128],
    "CYBORGS": [
        "MODEL.SSL.CYBORGS.WARMUP_EPOCHS", 0.0, "MODEL.SSL.CYBORGS.VMF_PERIOD", 1,
        "INPUT.REGIONS.SOURCE", "grid", "INPUT.REGIONS.GRID_SIZE", 2,
    ],
}  # fmt: skip


class DrawnByImage:
    """Draws the regions of every image from a seed of its own, the same however images are spread over processes.

    In the second step, images of the second half, those of process 1 of 2, have no region in both views.
    """

    def __init__(self, sampler: RegionSampler, calls_per_step: int) -> None:
        self.sampler = sampler
        self.calls_per_step = calls_per_step
        self.calls = 0

    def __call__(self, views: list[ViewBatch]) -> list[Regions]:
        drawn = [self._draw(view, v) for v, view in enumerate(views)]
        self.calls += 1
        return drawn

    def _draw(self, view: ViewBatch, v: int) -> Regions:
        parts = []
        for i in range(len(view)):
            image = comm.get_rank() * len(view) + i
            with torch.random.fork_rng():
                torch.manual_seed(1000 * self.calls + 10 * image + v)
                (part,) = self.sampler([view[i : i + 1]])
            if self.calls >= self.calls_per_step and image >= BATCH // 2:
                part.ids += 100 * v
            parts.append(part)
        return Regions(torch.cat([p.ids for p in parts]), torch.cat([p.weights for p in parts]).double())


def _by_halves(criterion: CyborgsCriterion) -> Callable[..., Tensor]:
    """The consistency loss of the halves of a batch by themselves, of one half in each of two processes."""
    of_images = criterion._consistency_loss

    def part(embeddings: list[RegionEmbeddings], half: slice) -> list[RegionEmbeddings]:
        return [dataclasses.replace(e, features=e.features[half]) for e in embeddings if e.features is not None]

    def consistency_loss(student: list[RegionEmbeddings], teacher: list[RegionEmbeddings]) -> Tensor:
        losses = []
        for start in range(0, len(student[0].z), BATCH // 2):
            half = slice(start, start + BATCH // 2)
            torch.manual_seed(0)  # of the number of clusters and of k-means
            losses.append(of_images(part(student, half), part(teacher, half)))
        return torch.stack(losses).mean()

    return consistency_loss


class _FixedTrainer(Trainer):
    """With what is random fixed, and student and teacher in double precision: many layers magnify rounding errors."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        if isinstance(model.sample, RegionSampler):
            model.sample = DrawnByImage(model.sample, calls_per_step=1)
        if isinstance(model.sample, PhasedSampler):
            model.sample = DrawnByImage(model.sample.sampler, calls_per_step=2)
            model.criterion._consistency_loss = _by_halves(model.criterion)
        model.pixel_mean = model.pixel_mean.double()
        for branch in filter(None, (model.student, model.teacher)):
            branch.double().register_forward_hook(_to_single_precision)
        return model


def _to_single_precision(branch: nn.Module, inputs: Any, embeddings: RegionEmbeddings) -> RegionEmbeddings:
    values = {f.name: getattr(embeddings, f.name) for f in dataclasses.fields(embeddings)}
    return RegionEmbeddings(
        **{k: v.float() if v is not None and v.is_floating_point() else v for k, v in values.items()}
    )


class _Gradients(HookBase):
    """Keeps the gradients, averaged over the processes, and the number of positive pairs of every step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.pairs: list[float] = []

    def after_step(self) -> None:
        model = self.trainer.checkpointer.model
        self.gradients.append({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})
        self.pairs.append(float(model.criterion.metrics.get("positive_pairs", 0)))


def two_steps(method: str, photos: Path, folder: Path) -> dict[str, Any]:
    """Train; return gradients and pairs of each step (pairs of each process), the model's state before and after."""
    output_dir = folder / method
    output_dir.mkdir(parents=True, exist_ok=True)
    cfg = method_cfg(method, photos, output_dir, *_COMMON, *_OF_METHOD.get(method, []))
    seed_all_rng(0)
    trainer, log = _FixedTrainer(cfg), _Gradients()
    model = trainer.checkpointer.model
    start = copy.deepcopy(model.state_dict())
    trainer.register_hooks([log])
    trainer.train()
    return {
        "gradients": log.gradients,
        "pairs": comm.all_gather(log.pairs),
        "start": start,
        "end": model.state_dict(),
    }


def _differing_from_rank_0(state: dict[str, Tensor]) -> list[str]:
    different = []
    for name, value in state.items():
        dist.broadcast(reference := value.clone(), src=0)
        if not torch.equal(reference, value):
            different.append(name)
    return different


class _Dies(HookBase):
    """Process 1 gets SIGKILL before step 2; the file `pids` has the ids of all processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def before_step(self) -> None:
        if self.trainer.iter == 2:
            pids = comm.all_gather(os.getpid())
            if comm.get_rank() == 1:
                (self.folder / "pids").write_text(" ".join(map(str, pids)))
                os.kill(os.getpid(), signal.SIGKILL)


def _main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    photos, folder = map(Path, args.opts)
    for method in METHODS:
        results = two_steps(method, photos, folder)
        results["differing"] = comm.all_gather(_differing_from_rank_0(results["end"]))
        if comm.is_main_process():
            torch.save(results, folder / f"{method}.pth")
    trainer = Trainer(method_cfg("SlotCon", photos, folder / "SlotCon"))
    trainer.register_hooks([_Dies(folder)])
    trainer.train()


if __name__ == "__main__":
    launch(_main, default_argument_parser().parse_args())
