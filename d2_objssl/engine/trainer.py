"""One trainer for pretraining and fine-tuning: Detectron2's DefaultTrainer with exact resume and AMP on any device."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from ..checkpoint import ObjSSLCheckpointer, checkpoint_metadata
from ..data import build_test_loader, build_train_loader
from ..data.build import TrainLoader
from ..data.labelled_images import check_classes
from ..evaluation.build import build_evaluator, check_evaluators, check_test_sets
from .collapse import build_collapse_monitor
from .config_checks import check_config, run_checks
from .disk_space import DiskSpace
from .hooks import Checkpoints, EMATeacher, Evaluation, PreciseBN, RandomState
from .log_writers import GuardedWriter
from .optimizer import build_optimizer
from .output_lock import OutputLock
from .preemption import Preemption
from .resuming import check_resumed, recompute_rates, with_settings_of
from .run_record import RunRecord
from .schedule import build_lr_scheduler, resolve_norms, resolve_schedule
from .train_step import TrainStep, amp_dtype

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains whatever the config describes; resumes exactly.

    Differs from `DefaultTrainer` in: the data order and its randomness resume (`data.build`), random generators are in
    the checkpoint, checkpoints are atomic and guarded on loading (`checkpoint`), AMP runs on CPUs and in bfloat16, DDP
    runs on CPUs, schedules may be given in epochs, and a teacher is moved where the model has one. SIGTERM and Ctrl-C
    stop a run without loss (`preemption`), and an OUTPUT_DIR has one run at a time (`output_lock`).
    """

    def __init__(self, cfg: CfgNode, *, config_file: str = "") -> None:
        """
        Args:
            cfg: Detectron2's config with `add_objssl_config`.
            config_file: what it was made from, for the records.
        """
        self._run_record = (cfg, config_file)
        # DefaultTrainer.__init__ would fix the checkpointer, the AMP trainer and GPU-only DDP; only its base is called.
        super(DefaultTrainer, self).__init__()
        cfg = resolve_norms(DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size()))
        check_config(cfg)
        data_loader = self.build_train_loader(cfg)
        check_test_sets(cfg)
        run_checks(partial(check_classes, cfg), partial(check_evaluators, cfg))
        cfg = resolve_schedule(cfg, data_loader.num_images)
        data_loader.bad_images.list_in(os.path.join(cfg.OUTPUT_DIR, "bad_images.tsv"))
        self.cfg = cfg
        dtype = amp_dtype(cfg)
        logger.info("Precision: %s on %s", "float32" if dtype is None else f"autocast in {dtype}", cfg.MODEL.DEVICE)

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
        ddp_args = {} if on_gpu else {"device_ids": None}
        # What takes no part in a step must have no gradient, rather than one of 0: LARS scales weight decay up.
        find_unused = getattr(model, "idle_parameters", False)
        ddp_model = create_ddp_model(model, broadcast_buffers=False, find_unused_parameters=find_unused, **ddp_args)
        self._trainer = TrainStep(
            ddp_model,
            data_loader,
            optimizer,
            device_type="cuda" if on_gpu else "cpu",
            dtype=dtype,
            output_dir=cfg.OUTPUT_DIR,
            accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = ObjSSLCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            metadata=checkpoint_metadata(cfg),
            check_resumed=partial(check_resumed, cfg),
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.preemption = Preemption()
        self.register_hooks(self.build_hooks())

    @property
    def data_loader(self) -> TrainLoader:
        """The training loader."""
        return self._trainer.data_loader

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Autocast's data type in training; None without AMP."""
        return self._trainer.dtype

    @property
    def step_skipped(self) -> bool:
        """Whether the last iteration left the weights as they were; see `TrainStep`."""
        return self._trainer.step_skipped

    @property
    def eval_results(self) -> dict[str, Any]:
        """Results of the last evaluation; empty before there is one."""
        return getattr(self, "_last_eval_results", {})

    def restart_data_loader(self) -> None:
        """Load the batches from the current iteration on anew: what they are made of has changed."""
        loader = self.data_loader
        loader.seek(self.iter)
        self._trainer.reset_data_loader(lambda: loader)

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from the last checkpoint of OUTPUT_DIR if asked to and there is one; else load MODEL.WEIGHTS.

        Raises:
            ValueError: if the config does not fit the checkpoint, see `check_resumed`.
            RuntimeError: if processes read different checkpoints: OUTPUT_DIR is not one folder for them, or a file is bad.
        """
        super().resume_or_load(resume)
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise RuntimeError(
                f"The processes would start at different iterations, {starts}: check that all of them can read every "
                f"checkpoint in OUTPUT_DIR {self.cfg.OUTPUT_DIR}"
            )
        self.data_loader.seek(self.start_iter)
        if self.start_iter > 0:
            logger.info("Resuming at iteration %d of %d", self.start_iter, self.max_iter)
        elif resume:
            logger.info("OUTPUT_DIR has no checkpoint of this run to resume from: it starts from the beginning")

    def write_checkpoint(self) -> None:
        """Write a checkpoint of the iteration that was just done, unless there is one; in all processes."""
        self._random_state.collect()
        self._checkpoints.write(self.iter)

    def build_hooks(self) -> list[hooks.HookBase | None]:
        """Detectron2's hooks, the teacher's update and the method's hooks, the generators' state before the checkpoint.

        Behind the checkpoint, a run that got a signal stops; then come evaluation and log.
        """
        cfg = self.cfg
        # The parent would read the data set once more for its PreciseBN, which forgets its place when resumed.
        self.cfg = cfg.clone()
        self.cfg.defrost()
        self.cfg.TEST.PRECISE_BN.ENABLED = False
        try:
            parents = super().build_hooks()
        finally:
            self.cfg = cfg
        ret = [h for h in parents if h is not None and not isinstance(h, hooks.PeriodicCheckpointer)]
        model = self.checkpointer.model
        of_method = model.build_method_hooks(self) if getattr(model, "build_method_hooks", None) is not None else []
        # Hooks say by this attribute before which iterations they want a checkpoint.
        wanted = frozenset(i for h in of_method for i in getattr(h, "checkpoint_before", ()))
        period, keep = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.MAX_TO_KEEP or None
        self._random_state = RandomState(period, wanted)
        self._checkpoints = Checkpoints(self.checkpointer, period, max_to_keep=keep, also_before=wanted)
        before = next(i for i, h in enumerate(ret) if isinstance(h, hooks.EvalHook))
        ret[before] = Evaluation(cfg.TEST.EVAL_PERIOD, self._evaluate)
        ret[before:before] = [self._random_state, self._checkpoints, self.preemption]
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model):
            batches = self.data_loader.from_start
            ret.insert(before, PreciseBN(cfg.TEST.EVAL_PERIOD, self.model, batches, cfg.TEST.PRECISE_BN.NUM_ITER))
        ret.append(RunRecord(*self._run_record, max_iter=cfg.SOLVER.MAX_ITER))
        if cfg.MODEL.META_ARCHITECTURE == "ObjectSSL":
            ret.append(build_collapse_monitor(cfg, model, cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()))
        num_masks = self.data_loader.num_images if cfg.INPUT.REGIONS.SOURCE == "bootstrap" else 0
        self._output_lock = OutputLock(cfg.OUTPUT_DIR)
        ret[:0] = [self._output_lock, DiskSpace(cfg.OUTPUT_DIR, period, keep, num_masks), *of_method]
        if getattr(model, "teacher", None) is not None:
            teacher = cfg.MODEL.SSL.TEACHER
            ret.insert(0, EMATeacher(model.teacher, model.student, teacher.MOMENTUM, teacher.MOMENTUM_SCHEDULE))
        return ret

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's writers of losses and metrics; a log that cannot be written does not end the run."""
        return [GuardedWriter(writer, self.cfg.OUTPUT_DIR) for writer in super().build_writers()]

    def _evaluate(self) -> dict[str, Any]:
        self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

    def after_train(self) -> None:
        """End the loader's workers, close the hooks, unlock OUTPUT_DIR, and say how many images were unreadable."""
        loader = self.data_loader
        # Else they are ended by force where the process is a child of Detectron2's launcher.
        self._trainer.reset_data_loader(lambda: loader)
        try:
            super().after_train()
        finally:
            self._output_lock.release()
        if self.data_loader.bad_images.num_bad:
            logger.warning("%s", self.data_loader.bad_images.summary())
        if self.data_loader.num_cut:
            logger.warning(
                "%d of %d images had more regions than MODEL.SSL.DETCON.MAX_REGION_IDS; their smallest ones were dropped.",
                self.data_loader.num_cut,
                self.data_loader.bad_images.num_seen,
            )

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to resume, beside the model."""
        data = {
            "seed": self.data_loader.sampler.seed,
            "num_images": self.data_loader.num_images,
            "total_batch_size": self.cfg.SOLVER.IMS_PER_BATCH,
        }
        return {**super().state_dict(), "data": data}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, but for the settings of optimiser and schedule, which are those of the config.

        A change of the data or the batch is warned about.

        Raises:
            ValueError: if the checkpoint was written by another trainer, or for other parameter groups.
        """
        data = state_dict.get("data")
        if data is None:
            raise ValueError(
                f"The checkpoint in OUTPUT_DIR {self.cfg.OUTPUT_DIR} does not know its place in the data: it was written "
                "by another trainer. Give it as MODEL.WEIGHTS, without --resume and with another OUTPUT_DIR."
            )
        super().load_state_dict(with_settings_of(state_dict, self.optimizer, self.scheduler))
        recompute_rates(self.scheduler)
        self.data_loader.sampler.seed = data["seed"]
        for key, now in (
            ("num_images", self.data_loader.num_images),
            ("total_batch_size", self.cfg.SOLVER.IMS_PER_BATCH),
        ):
            if data[key] != now:
                logger.warning(
                    "The run began with %s %d, now it is %d: it goes on, but not exactly.", key, data[key], now
                )

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See `engine.optimizer.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """See `engine.schedule.build_lr_scheduler`."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """See `data.build.build_train_loader`."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[Any]:
        """See `data.build.build_test_loader`."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See `evaluation.build.build_evaluator`."""
        return build_evaluator(cfg, dataset_name)
