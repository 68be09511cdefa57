"""A hook that knows a run from its first to its last iteration, and records its final evaluation."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from ..evaluation.evaluation_records import write_evaluation_records
from ..evaluation.results import config_identity, weights_identity

logger = logging.getLogger(__name__)


class RunRecord(HookBase):
    """Say in every checkpoint how it came about (`checkpoint.training_of`), and write the records of the last test.

    Must come after the hook that evaluates.
    """

    def __init__(self, cfg: CfgNode, config_file: str, max_iter: int) -> None:
        """
        Args:
            cfg: as `setup_cfg` returned it.
            config_file: its path, or "".
            max_iter: iterations of the run.
        """
        self._cfg = cfg
        self._config_file = config_file
        self._max_iter = max_iter
        self._before_s = 0.0  # wall time of the parts of the run that this process goes on from
        self._begun = time.monotonic()
        self._weights: dict[str, Any] | None = None
        self._is_resumed = False

    def before_train(self) -> None:
        """Identify MODEL.WEIGHTS, unless the run has begun before: it may have gone since."""
        self._begun = time.monotonic()
        if not comm.is_main_process():
            return
        if not self._is_resumed:
            self._weights = weights_identity(self._cfg.MODEL.WEIGHTS)
        is_pretraining = self._cfg.MODEL.META_ARCHITECTURE == "ObjectSSL"
        self.trainer.checkpointer.metadata["training"] = {
            "method": self._cfg.MODEL.SSL.METHOD if is_pretraining else None,
            "config": config_identity(self._cfg, self._config_file),
            "seed": self._cfg.SEED if self._cfg.SEED >= 0 else None,
            "precision": self._precision(),
            "num_images": self.trainer.data_loader.num_images,
            "max_iter": self._max_iter,
            "weights": self._weights,
        }

    def after_train(self) -> None:
        """Write the records, if the run has come to its end and was evaluated."""
        if self.trainer.iter < self._max_iter or not self.trainer.eval_results or not comm.is_main_process():
            return
        paths = write_evaluation_records(
            self._cfg,
            self.trainer.eval_results,
            checkpoint=os.path.join(self._cfg.OUTPUT_DIR, "model_final.pth"),
            config_file=self._config_file,
            precision=self._precision(),
            wall_time_s=round(self._wall_time_s(), 1),
            of_training=True,
        )
        logger.info("Records: %s", ", ".join(paths))

    def _precision(self) -> str:
        dtype = self.trainer.autocast_dtype
        return "float32" if dtype is None else str(dtype).removeprefix("torch.")

    def _wall_time_s(self) -> float:
        return self._before_s + time.monotonic() - self._begun

    def state_dict(self) -> dict[str, Any]:
        """Time so far, and what the run started from."""
        return {"wall_time_s": self._wall_time_s(), "weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        self._before_s = state_dict["wall_time_s"]
        self._weights = state_dict["weights"]
        self._is_resumed = True
