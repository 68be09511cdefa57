"""Records of what was run: numbers travel with the command, the seed, the versions and the hardware that made them.

A record of an evaluation, one JSON file each, has beside `environment()`:

    task         what was evaluated, e.g. "detection", "semantic segmentation", "unsupervised segmentation"
    dataset      the catalog name of what it was evaluated on
    metrics      name -> number, e.g. {"bbox/AP": 41.0}; percentages as papers print them
    weights      `weights_identity`; None: random initialisation
    config       `config_identity`; None: the task has no config
    seed         an integer, or None
    precision    "float32", "bfloat16", "float16"
    wall_time_s  seconds
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
from detectron2.config import CfgNode

import d2_objssl

_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "fvcore", "pycocotools", "faster-coco-eval", "scikit-image")


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


def weights_identity(path: str) -> dict[str, str] | None:
    """File name, and SHA-256 of the content, of a file of weights; None for "", random initialisation.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not path:
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(2**20):
            digest.update(chunk)
    return {"file": os.path.basename(path), "sha256": digest.hexdigest()}


def config_identity(cfg: CfgNode, config_file: str = "") -> dict[str, str]:
    """Path of the config file as it was given, and SHA-256 of the settings that decide about numbers.

    OUTPUT_DIR, MODEL.WEIGHTS and SEED are left out of the hash: the first says nothing, the others have fields of their own.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS, cfg.SEED = "", "", -1
    return {"file": config_file, "sha256": hashlib.sha256(cfg.dump(sort_keys=True).encode()).hexdigest()}


def write_record(path: str | Path, record: dict[str, Any]) -> None:
    """Write a JSON record with `environment()`, whole or not at all; creates the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({**record, **environment()}, indent=2) + "\n")
    os.replace(temporary, path)
