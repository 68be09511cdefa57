"""Hooks of CYBORGS (Wang et al., ECCV 2022): which losses an iteration has, and when region masks are made anew.

    W  warm-up, epochs      N  epochs between bootstrappings      M  epochs between those with the consistency loss
    r  number of a round of bootstrapping, from 1; 0: there are no masks yet
    b_r  the iteration that is the first to see the masks of round r

Source: sections 3.3 (bootstrapping), 3.4 (warm-up, period of the consistency loss), 4.4 ("on epoch N, 2N, ..."). So b_1 is
the end of the warm-up, and b_2, b_3, ... are the multiples of N epochs, counted from the start of the run, behind it. (The
paper also says once that masks are made for the first time at epoch 100; that contradicts its section 3.4.) The features
are those of the online network, the student, as in the notation of section 3.3. An epoch has `num_images / batch`
iterations, not rounded; epochs are counted from 0, and the consistency loss is on in those divisible by M.
"""

from __future__ import annotations

import itertools
import logging
import re
import shutil
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn

from .feature_clustering import ClusterSettings, FeatureClusterer
from .mask_report import MaskReport
from .mask_round import MaskMaker
from .processes import fail_together, on_main_process

logger = logging.getLogger(__name__)


def bootstrap_iterations(
    warmup_epochs: float, period_epochs: float, *, iterations_per_epoch: float, num_iterations: int
) -> list[int]:
    """List b_1, b_2, ..., all before `num_iterations`.

    Args:
        warmup_epochs: W.
        period_epochs: N; 0: the masks of round 1 stay.
    """
    first = round(warmup_epochs * iterations_per_epoch)
    starts = {first}
    if period_epochs > 0:
        multiples = (round(n * period_epochs * iterations_per_epoch) for n in itertools.count(1))
        starts.update(itertools.takewhile(lambda i: i < num_iterations, multiples))
    return sorted(i for i in starts if first <= i < num_iterations)


class CyborgsPhases(HookBase):
    """Tells the criterion which of its losses an iteration has. Depends on the iteration alone, so it needs no state."""

    def __init__(self, criterion: nn.Module, *, warmup_iterations: int, period: int, num_images: int, batch_size: int):
        """
        Args:
            criterion: has `set_phase(warmup: bool, consistency: bool)`.
            warmup_iterations: of W epochs; in them the consistency loss is the only one.
            period: M, epochs; 0: no consistency loss behind the warm-up.
            num_images, batch_size: images of an epoch and of an iteration.
        """
        self._criterion = criterion
        self._warmup_iterations = warmup_iterations
        self._period = period
        self._num_images = num_images
        self._batch_size = batch_size

    def before_step(self) -> None:
        """Set the phase."""
        iteration = self.trainer.iter
        warmup = iteration < self._warmup_iterations
        epoch = iteration * self._batch_size // self._num_images
        consistency = warmup or (self._period > 0 and epoch % self._period == 0)
        self._criterion.set_phase(warmup=warmup, consistency=consistency)  # type: ignore[operator]


class MaskBootstrap(HookBase):
    """Makes the region masks of round r before iteration b_r, and lets the training loader read them.

    Masks lie in `folder`/round_NNNN, which all processes must see. The number of the live round is in the checkpoint. The
    data loader starts anew with a new round, so that no batch that was prefetched brings masks of the one before, whatever
    the number of workers.

    A checkpoint is written right before a round (`checkpoint_before`): what is killed during a round goes on with the same
    network, and keeps the masks that are done. Older rounds are deleted when neither of the last two checkpoints needs
    them any more; two, because a damaged last checkpoint is passed over for the one before.
    """

    def __init__(self, *, maker: MaskMaker, report: MaskReport, starts: Sequence[int], folder: Path) -> None:
        """
        Args:
            maker: makes the masks.
            report: says how good they are.
            starts: b_1, b_2, ..., see `bootstrap_iterations`.
            folder: of the rounds.
        """
        self._maker = maker
        self._report = report
        self._starts = list(starts)
        self._folder = folder
        self._live = 0
        self._saved: list[int] = []  # live rounds of the last two checkpoints of this process, the newest last
        self._has_old_rounds = False
        self.checkpoint_before = frozenset(starts)

    def before_train(self) -> None:
        """Take up the masks of a resumed run; find what would stop a round, before it stops it."""
        if self._starts:
            self._maker.try_out()
        if self._live:
            logger.info("Going on with the region masks of round %d in %s", self._live, self._root(self._live))
            with fail_together():
                self._use_live_round()

    def before_step(self) -> None:
        """Make the masks that are due."""
        self._delete_old_rounds()
        due = bisect_right(self._starts, self.trainer.iter)
        if due > self._live:
            logger.info("Bootstrapping region masks, round %d of %d", due, len(self._starts))
            self._maker.make(due, self._root(due), self.trainer.data_loader.sampler.seed)
            self._live = due
            with fail_together():
                self._use_live_round()
            self.trainer.restart_data_loader()
            on_main_process(lambda: self._report.write(self._root(due), self.trainer.storage))

    def _root(self, number: int) -> Path:
        return self._folder / f"round_{number:04d}"

    def _use_live_round(self) -> None:
        root = self._root(self._live)
        try:
            self.trainer.data_loader.set_region_root(str(root))
        except ValueError as error:
            raise ValueError(
                f"The region masks that the run goes on with, {root}, are missing or incomplete: {error}\n"
                "Put them back, or resume from a checkpoint of another round, or start again without --resume"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """The live round. Called when a checkpoint is written: its masks must stay."""
        self._saved = [*self._saved[-1:], self._live]
        self._has_old_rounds = True
        return {"round": self._live}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the live round; its masks are looked for when training starts."""
        self._live = state_dict["round"]
        self._saved = [self._live]

    def _delete_old_rounds(self) -> None:
        """After a checkpoint was written, delete what is older than all that is needed."""
        if not (self._has_old_rounds and comm.is_main_process() and self._folder.is_dir()):
            return
        self._has_old_rounds = False
        oldest = min([self._live, *self._saved])
        for path in self._folder.iterdir():
            match = re.fullmatch(r"round_(\d{4,})(\.partial)?", path.name)
            if match and path.is_dir() and int(match[1]) < oldest:
                logger.info("No checkpoint needs the region masks in %s any more: they are deleted", path)
                shutil.rmtree(path, ignore_errors=True)


def build_bootstrap_hooks(trainer: Any) -> list[HookBase]:
    """Build CYBORGS' hooks for a `Trainer`; without INPUT.REGIONS.SOURCE "bootstrap" masks are not made.

    Raises:
        ValueError: naming the key of MODEL.SSL.CYBORGS that is out of range.
    """
    cfg, model, loader = trainer.cfg, trainer.checkpointer.model, trainer.data_loader
    settings = cfg.MODEL.SSL.CYBORGS
    for key, smallest in (("BOOTSTRAP_PERIOD", 0), ("VMF_PERIOD", 0), ("IMAGES_PER_CLUSTERING", 1)):
        if settings[key] < smallest:
            raise ValueError(f"MODEL.SSL.CYBORGS.{key} is {settings[key]}; it must be at least {smallest}")
    per_epoch = loader.num_images / cfg.SOLVER.IMS_PER_BATCH
    phases = CyborgsPhases(
        model.criterion,
        warmup_iterations=round(settings.WARMUP_EPOCHS * per_epoch),
        period=settings.VMF_PERIOD,
        num_images=loader.num_images,
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
    )
    if cfg.INPUT.REGIONS.SOURCE != "bootstrap":
        return [phases]
    starts = bootstrap_iterations(
        settings.WARMUP_EPOCHS,
        settings.BOOTSTRAP_PERIOD,
        iterations_per_epoch=per_epoch,
        num_iterations=cfg.SOLVER.MAX_ITER,
    )
    logger.info("Region masks are bootstrapped before the iterations %s", starts)

    dtype = trainer.autocast_dtype

    def normalize(pixels: Tensor) -> Tensor:
        images = pixels.to(model.device).contiguous(memory_format=model.memory_format)
        return (images - model.pixel_mean) / model.pixel_std

    def build_clusterer() -> FeatureClusterer:
        return FeatureClusterer(
            model.student.backbone,
            normalize=normalize,
            settings=ClusterSettings(
                feature=settings.BOOTSTRAP_FEATURE,
                min_clusters=settings.MIN_CLUSTERS,
                max_clusters=settings.MAX_CLUSTERS,
                kmeans_iters=settings.KMEANS_ITERS,
            ),
            device_type=model.device.type,
            dtype=dtype,
        )

    folder = Path(cfg.OUTPUT_DIR) / "regions"
    maker = MaskMaker(
        build_clusterer=build_clusterer,
        images_per_clustering=settings.IMAGES_PER_CLUSTERING,
        dataset=loader.dataset.dataset,
        dataset_names=list(cfg.DATASETS.TRAIN),
        max_unreadable=cfg.DATALOADER.MAX_BAD_IMAGES,
        between_batches=trainer.preemption.stop_between,
    )
    report = MaskReport(dataset=loader.dataset.dataset, dataset_names=list(cfg.DATASETS.TRAIN))
    return [phases, MaskBootstrap(maker=maker, report=report, starts=starts, folder=folder)]
