"""Checkpoints: metadata, loading into a model with a guard, saving whole or not at all.

Data flow of `MODEL.WEIGHTS`: `load_checkpoint` (weight_files.py) -> input contract (load_guard.py) -> names of the
model (weight_names.py) -> load -> `LoadReport` -> `check_backbone_loaded` (load_guard.py). All public names are here.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.config import CfgNode
from torch import nn

from .earlier_checkpoints import earlier_checkpoints
from .load_guard import (
    LAYOUT_CONTRACTS,
    PADDING_ERROR,
    LoadReport,
    backbone_keys,
    build_report,
    check_backbone_loaded,
    check_input_contract,
    compare_contracts,
    input_contract,
    stored_contract,
)
from .weight_files import CheckpointError, file_sha256, load_checkpoint, write_atomically, write_checkpoint
from .weight_names import (
    LAYOUTS,
    backbone_prefix,
    detect_layout,
    from_detectron2,
    infer_resnet,
    network_roots,
    to_detectron2,
    unwrap_state_dict,
)

__all__ = [
    "FORMAT_VERSION",
    "LAYOUTS",
    "LAYOUT_CONTRACTS",
    "PADDING_ERROR",
    "CheckpointError",
    "LoadReport",
    "ObjSSLCheckpointer",
    "backbone_keys",
    "backbone_prefix",
    "build_report",
    "check_backbone_loaded",
    "check_input_contract",
    "checkpoint_metadata",
    "detect_layout",
    "file_sha256",
    "from_detectron2",
    "infer_resnet",
    "input_contract",
    "load_checkpoint",
    "to_detectron2",
    "training_of",
    "unwrap_state_dict",
    "write_atomically",
    "write_checkpoint",
]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


def checkpoint_metadata(cfg: CfgNode) -> dict[str, Any]:
    """Describe, in plain types, what a checkpoint made with `cfg` holds and which input it expects.

    Returns:
        format_version (int), method (MODEL.SSL.METHOD), export_branch ("student" or "teacher", the default branch of
        `to_detectron2`), both None unless `cfg` pretrains; input_contract (see `input_contract`), config (YAML text).
    """
    is_pretraining = cfg.MODEL.META_ARCHITECTURE == "ObjectSSL"
    return {
        "format_version": FORMAT_VERSION,
        "method": cfg.MODEL.SSL.METHOD if is_pretraining else None,
        "export_branch": cfg.MODEL.SSL.EXPORT_BRANCH if is_pretraining else None,
        "input_contract": input_contract(cfg),
        "config": cfg.dump(),
    }


def training_of(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the content of a checkpoint was trained; None if it does not tell.

    Returns:
        method (MODEL.SSL.METHOD; None for fine-tuning), branch ("student", "teacher"; None for fine-tuning), config
        (`evaluation.results.config_identity`), seed (None: drawn) and precision ("float32", "bfloat16", "float16"), both
        absent in older files, num_images (that it was trained on), max_iter (length of the run), iterations (of them done),
        weights (`evaluation.results.weights_identity` of what it started from).
    """
    metadata = checkpoint.get("d2_objssl") or {}
    training = metadata.get("training")
    if training is None:
        return None
    training = {**training, "branch": metadata.get("export_branch")}
    if "iterations" not in training:  # a converted file has it
        training["iterations"] = checkpoint.get("iteration", -1) + 1
    return training


class ObjSSLCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with safe loading, conversion of names, a load guard and atomic saving.

    `MODEL.WEIGHTS` may be, in any format of `load_checkpoint`: a checkpoint of pretraining (of its branches the one
    that `to_detectron2` takes: the teacher's backbone for SlotCon, the student's for CYBORGS, DetCon-B and SemCL), a
    file of torchvision, timm, MoCo, SlotCon..., of DetCon in JAX, a backbone with Detectron2's names, a model of the
    Detectron2 or Caffe2 zoo, a fine-tuned model. A backbone goes to every place where the model has one: an ObjectSSL
    model's student and teacher, `backbone.bottom_up`, `backbone`, a C4 model's `roi_heads.res5`.

    When resuming, everything must load; a last checkpoint that is damaged, or is none of a run, is passed over for the newest
    one before it. Those of an earlier run (`earlier_checkpoints`) do not count.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        metadata: Mapping[str, Any] | None = None,
        save_to_disk: bool | None = None,
        check_resumed: Callable[[Mapping[str, Any], str], None] | None = None,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: may be wrapped by DDP.
            save_dir: folder of the checkpoints.
            metadata: `checkpoint_metadata(cfg)`. It is saved as "d2_objssl", and its input contract is compared with
                that of a file that is loaded. None: neither.
            save_to_disk: None: on the main process only.
            check_resumed: gets content and path of a checkpoint to resume from before anything is taken from it, and may raise.
            checkpointables: objects with `state_dict` and `load_state_dict`, e.g. `trainer`.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.metadata = None if metadata is None else dict(metadata)
        self._check_resumed = check_resumed

    def save(self, name: str, **kwargs: Any) -> None:
        """Save everything as `NAME.pth`, and only when that is safely on the disk let `last_checkpoint` point to it.

        Raises:
            OSError: if it cannot be written; what was there before is untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data: dict[str, Any] = {"model": self.model.state_dict()}
        data.update((key, obj.state_dict()) for key, obj in self.checkpointables.items())
        if self.metadata is not None:
            data["d2_objssl"] = self.metadata
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        write_checkpoint(data, path)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Let `last_checkpoint` name the file to resume from."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(path, lambda file: file.write(last_filename_basename.encode()))

    def load(self, path: str, checkpointables: list[str] | None = None, *, require: str = "backbone") -> dict[str, Any]:
        """Load a file into the model.

        Args:
            path: see `load_checkpoint`. With "?matching_heuristics=True" behind it, Detectron2 matches the names of a
                file of unknown layout. Empty: the model keeps its random initialisation.
            checkpointables: names of the other objects to load; None: all that the file has.
            require: see `check_backbone_loaded`.

        Returns:
            What else is in the file.

        Raises:
            CheckpointError: if the file cannot be read.
            ValueError: if its input contract is another one, or it does not fill what `require` says.
        """
        if path:
            # The optimiser keeps tensors that it loads: they must not stay in the file.
            checkpoint = self._load_file(path, mmap=checkpointables is not None)
            return self._restore(checkpoint, path, checkpointables, require)
        if require == "all":
            raise ValueError("MODEL.WEIGHTS is empty: there is no model to evaluate")
        self.logger.info("MODEL.WEIGHTS is empty: the model starts from its random initialisation")
        return {}

    def resume_or_load(self, path: str, *, resume: bool = True, require: str = "backbone") -> dict[str, Any]:
        """Resume from the last checkpoint if there is one, else load `path` into the model only.

        Args:
            path: MODEL.WEIGHTS.
            resume: False: always load `path`.
            require: for `path`, see `check_backbone_loaded`. What is resumed must fill the whole model.

        Raises:
            CheckpointError: if there are checkpoints to resume from and none of them can be read.
        """
        candidates = self._resume_candidates() if resume else []
        if not candidates:
            return self.load(path, checkpointables=[], require=require)
        failures = []
        for candidate in candidates:
            try:
                checkpoint = self._load_run(candidate)
            except CheckpointError as error:
                self.logger.warning("Cannot resume from the checkpoint %s", error)
                failures.append(str(error))
                continue
            if failures:
                self.logger.warning("Resuming from the older checkpoint %s instead", candidate)
            if self._check_resumed is not None:
                self._check_resumed(checkpoint, candidate)
            return self._restore(checkpoint, candidate, None, "all")
        listed = "\n  ".join(failures)
        raise CheckpointError(
            f"no checkpoint in {self.save_dir} can be read:\n  {listed}\nRestore one, or start again without --resume"
        )

    def has_checkpoint(self) -> bool:
        """Whether there is anything of this run to resume from: a file `last_checkpoint`, or checkpoints without it."""
        return bool(self._resume_candidates())

    def periodic_checkpoints(self) -> dict[str, int]:
        """Paths of the run's files `model_0000000.pth` in the folder, and their iterations, from the oldest to the newest."""
        iterations = {}
        for file in os.listdir(self.save_dir) if os.path.isdir(self.save_dir) else []:
            if match := re.fullmatch(r"model_(\d+)\.pth", file):
                iterations[os.path.join(self.save_dir, file)] = int(match[1])
        for path in earlier_checkpoints(self.save_dir):
            iterations.pop(path, None)
        return dict(sorted(iterations.items(), key=lambda item: item[1]))

    def _resume_candidates(self) -> list[str]:
        """The last checkpoint, then the periodic ones before it, from the newest to the oldest."""
        iterations = self.periodic_checkpoints()
        last = self.get_checkpoint_file() if super().has_checkpoint() else ""
        if not last or last in earlier_checkpoints(self.save_dir):
            if iterations:
                self.logger.warning(
                    "%s has checkpoints, but no file last_checkpoint that names one of them: the newest counts",
                    self.save_dir,
                )
            return list(iterations)[::-1]
        # "model_final", or whatever a damaged `last_checkpoint` says, comes after all of them.
        newest = iterations.pop(last, math.inf)
        return [last, *[path for path, iteration in iterations.items() if iteration < newest][::-1]]

    def _load_run(self, path: str) -> dict[str, Any]:
        """As `_load_file`, for a file to resume from.

        Raises:
            CheckpointError: also if it holds weights, but not the state of a run.
        """
        checkpoint = self._load_file(path, mmap=False)
        if missing := [key for key in self.checkpointables if key not in checkpoint]:
            raise CheckpointError(f"{path}: it has no {', '.join(missing)}, so it is not the checkpoint of a run")
        return checkpoint

    def _load_file(self, filename: str, *, mmap: bool = True) -> dict[str, Any]:
        """Read a file as a dict with "model", a dict of tensors, and what else it has."""
        path, _, query = filename.partition("?")
        if query not in ("", "matching_heuristics=True"):
            raise CheckpointError(f'{filename}: the query "{query}" is unknown; only matching_heuristics=True is')
        checkpoint = load_checkpoint(path, mmap=mmap)
        flags: dict[str, Any] = {"matching_heuristics": True} if query or path.endswith(".pyth") else {}
        if path.endswith(".pkl") and "model" not in checkpoint and _layout(checkpoint) is None:
            # Caffe2's and Detectron1's model zoo. Detection models have "blobs", ImageNet models do not.
            blobs = checkpoint.get("blobs", checkpoint)
            checkpoint = {"model": {k: v for k, v in blobs.items() if not k.endswith("_momentum")}}
            flags = {"matching_heuristics": True, "__author__": "Caffe2"}
        try:
            model = copy.copy(unwrap_state_dict(checkpoint))  # of an OrderedDict, keeps the attribute _metadata
            assert isinstance(model, dict)
            for name, value in model.items():
                model[name] = torch.as_tensor(value)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{filename}: {error}") from error
        rest = {key: value for key, value in checkpoint.items() if not hasattr(value, "shape")}
        return {**rest, **flags, "model": model}

    def _restore(
        self, checkpoint: dict[str, Any], path: str, checkpointables: list[str] | None, require: str
    ) -> dict[str, Any]:
        """Load the content of the file `path`."""
        self._check_contract(checkpoint, path)
        state = _rename_for(self.model, checkpoint, path)
        incompatible = self._load_model({"model": copy.copy(state)})  # it drops what does not fit
        # FrozenBatchNorm gives itself the statistics that the Caffe2 zoo has folded into its weights.
        is_caffe2 = checkpoint.get("__author__") == "Caffe2"
        report = build_report(self.model, state, path, absent=incompatible.missing_keys if is_caffe2 else None)
        check_backbone_loaded(self.model, report, require=require)
        rest = {key: value for key, value in checkpoint.items() if key != "model"}
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in rest:
                self.logger.info("Loading %s from %s", key, path)
                self.checkpointables[key].load_state_dict(rest.pop(key))
        return rest

    def _check_contract(self, checkpoint: Mapping[str, Any], path: str) -> None:
        if self.metadata is not None:
            compare_contracts(stored_contract(checkpoint), self.metadata["input_contract"], path)


def _layout(checkpoint: Mapping[str, Any]) -> str | None:
    """As `detect_layout`; None where that raises."""
    try:
        return detect_layout(checkpoint)
    except ValueError:
        return None


def _rename_for(model: nn.Module, checkpoint: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Give the weights of a checkpoint the names that they have in `model`.

    A file whose network stands at the same place in the model stays as it is, heads included, and so does a file of no
    known layout. Of any other the backbone is taken.
    """
    state = checkpoint["model"]
    own = model.state_dict()
    branches = [b for b in ("student", "teacher") if any(name.startswith(f"{b}.backbone.") for name in own)]
    layout = _layout(state)
    if layout == "d2_objssl" and branches:
        return _fill_teacher(state, own)
    if layout is None or any(root in own for root in network_roots(state, layout)):
        if not checkpoint.get("matching_heuristics", False):
            return state
    else:
        try:
            state = to_detectron2({"model": state, "d2_objssl": checkpoint.get("d2_objssl")}, layout)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        logger.info("Taking the backbone, %d tensors, of the %s names in %s", len(state), layout, path)
        if branches:
            return {f"{b}.backbone.{name}": value for b in branches for name, value in state.items()}
    return align_and_update_state_dicts(own, state, c2_conversion=checkpoint.get("__author__") == "Caffe2")


def _fill_teacher(state: dict[str, Any], own: Collection[str]) -> dict[str, Any]:
    """Let a teacher that the file does not have start as a copy of the file's student."""
    if any(name.startswith("teacher.") for name in state):
        return state
    copies = {"teacher." + name.removeprefix("student."): v for name, v in state.items() if name.startswith("student.")}
    return state | {name: value for name, value in copies.items() if name in own}
