"""Records of what was run: numbers travel with the command, the seed, the versions and the hardware that made them."""

from __future__ import annotations

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


def write_record(path: str | Path, record: dict[str, Any]) -> None:
    """Write a JSON record with `environment()`, whole or not at all; creates the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({**record, **environment()}, indent=2) + "\n")
    os.replace(temporary, path)
