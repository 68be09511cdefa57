"""Records of what was run: numbers travel with the command, the seed, the versions and the hardware that made them.

A record of an evaluation, one JSON file each, has beside `environment()`:

    task           what was evaluated, e.g. "detection", "semantic segmentation", "unsupervised segmentation"
    dataset        the catalog name of what it was evaluated on
    metrics        name -> number, e.g. {"bbox/AP": 41.0}; percentages as papers print them; None: there is none
    weights        `weights_identity` of what training started from, or, where nothing was trained, of what was evaluated;
                   None: random initialisation, or the task has no network
    config         `config_identity`; None: the task has no config
    seed           an integer, or None: there is none
    precision      "float32", "bfloat16", "float16"; None: the task has no network
    wall_time_s    seconds
    num_images     images of `dataset` that it is of

tools/train_net.py (`evaluation_record`) adds:

    checkpoint     `weights_identity` of the fine-tuned model that was evaluated, but for what stands in "weights"
    num_processes  that trained or, with --eval-only, evaluated it

and counts as wall time training with its evaluations (of a resumed run every part of it, up to the checkpoint that the
next one went on from), with --eval-only the evaluation. "seed" and "precision" are those of the command that wrote the
record, too: with --eval-only of the evaluation. Those of the trainings stand in "checkpoint" and "weights", in "training".
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

import d2_objssl

from ..checkpoint import training_of
from ..config import add_objssl_config
from ..weight_files import CheckpointError, file_sha256, load_checkpoint

_PACKAGES: tuple[str, ...] = ("torch", "torchvision", "numpy", "pillow", "fvcore", "pycocotools", "faster-coco-eval")
_PACKAGES += ("opencv-python", "scipy", "scikit-image", "scikit-learn", "numba")


def environment() -> dict[str, Any]:
    """Versions, hardware and date of this process, in plain types."""
    import detectron2

    versions = {"python": platform.python_version(), "d2_objssl": d2_objssl.__version__}
    versions |= {"detectron2": detectron2.__version__, "opencv": cv2.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
        "hardware": {
            "cpu": _cpu_name(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "num_cpus": os.cpu_count(),
            "gpus": gpus,
        },
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def weights_identity(path: str) -> dict[str, Any] | None:
    """Say which file of weights this is and how it came about; None for "", random initialisation.

    Args:
        path: a file or an address, as MODEL.WEIGHTS takes it.

    Returns:
        file (its name) and sha256 (of its content); where the file tells, also source (name of the file that it was
        converted from) and training (see `checkpoint.training_of`).

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not path:
        return None
    path = path.partition("?")[0]
    local = PathManager.get_local_path(path)
    identity: dict[str, Any] = {"file": os.path.basename(path), "sha256": file_sha256(local)}
    try:
        checkpoint = load_checkpoint(local)
    except CheckpointError:  # of a kind that only its own command reads
        return identity
    metadata = checkpoint.get("d2_objssl") or {}
    if "source" in metadata:
        identity["source"] = metadata["source"]["file"]
    if (training := training_of(checkpoint)) is not None:
        identity["training"] = training
    return identity


# What says where, how fast and how often something is done, or has a field of its own in a record.
WITHOUT_EFFECT = {"OUTPUT_DIR", "SEED", "VERSION", "VIS_PERIOD", "CUDNN_BENCHMARK", "MODEL.DEVICE", "MODEL.WEIGHTS"}
WITHOUT_EFFECT |= {"DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.CHECKPOINT_EPOCHS"}
WITHOUT_EFFECT |= {"SOLVER.MAX_TO_KEEP", "TEST.EVAL_PERIOD", "TEST.EXPECTED_RESULTS"}


def config_identity(cfg: CfgNode, config_file: str = "") -> dict[str, str]:
    """Path of the config file as it was given, and SHA-256 of the settings that decide about numbers.

    Settings count where they differ from the defaults: a key that is new, and off, changes no hash. Left out are those
    that say where and how often something is done (`WITHOUT_EFFECT`), MODEL.WEIGHTS and SEED, which have fields of their own.

    Args:
        cfg: as `setup_cfg` returns it: the trainer's own depends on the number of processes and images.
    """
    defaults = get_cfg()
    add_objssl_config(defaults)
    usual = flatten_config(defaults)
    settings = {k: v for k, v in flatten_config(cfg).items() if k not in WITHOUT_EFFECT and usual.get(k) != v}
    return {"file": config_file, "sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()}


def flatten_config(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Settings by their full key; sequences as lists."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            flat |= flatten_config(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.loads(json.dumps(value))
    return flat


def write_record(path: str | Path, record: dict[str, Any]) -> None:
    """Write a JSON record with `environment()`, whole or not at all; creates the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({**record, **environment()}, indent=2) + "\n")
    os.replace(temporary, path)
