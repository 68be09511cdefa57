#!/usr/bin/env python3
"""Install Detectron2 into the environment of this Python, unless it has one already.

    python -m pip install -r requirements.txt
    python tools/install_detectron2.py

Detectron2 is not on PyPI under its own name. requirements-detectron2.txt pins, by hash, a re-upload with upstream's
Python files, in a wheel that `pip install -r` alone does not install properly:

* It is tagged for Python 3.10 and claims numpy<2, but runs on Python 3.10 to 3.13 and NumPy 2: hence `--python-version`
  and `--no-deps`. `pip check` goes on complaining; harmless. The compiled module inside fits no current PyTorch:
  Detectron2 then goes without its own operators (rotated boxes, deformable convolution), which nothing here uses.
* It brings Detectron2's scripts as a top-level package `tools`, which would shadow every folder of that name: left out.

pip unpacks the wheel into a temporary folder next to its destination, and moving it comes last: an interrupted run
leaves no half of a package behind.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements-detectron2.txt"
STRAY_PACKAGE = "tools"


def import_error() -> str | None:
    """Import most of Detectron2 in a process of its own and return what went wrong, if anything."""
    command = [sys.executable, "-W", "ignore", "-c", "import detectron2.engine, detectron2.model_zoo"]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if result.returncode == 0:
        return None
    return (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]


def download(folder: Path) -> None:
    """Unpack the pinned wheel into `folder`."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--only-binary=:all:"]
    command += ["--python-version", "3.10", "--require-hashes", "--target", str(folder), "-r", str(REQUIREMENTS)]
    if subprocess.run(command).returncode != 0:
        raise SystemExit(
            f"error: {REQUIREMENTS.name} could not be installed (see above). Its wheel is for Linux on x86-64; "
            "elsewhere build Detectron2 from source: https://detectron2.readthedocs.io/tutorials/install.html"
        )


def drop_stray_package(folder: Path) -> None:
    """Delete the wheel's package `tools` from `folder`, and from the list of files that an uninstall would delete."""
    shutil.rmtree(folder / STRAY_PACKAGE)
    (record,) = folder.glob("*.dist-info/RECORD")
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(line for line in lines if not line.startswith(f"{STRAY_PACKAGE}/")))


def move_into(folder: Path, site_packages: Path) -> None:
    """Move everything in `folder` to `site_packages`, the importable package last."""
    for entry in sorted(folder.iterdir(), key=lambda path: path.suffix != ".dist-info"):
        target = site_packages / entry.name
        if target.suffix == ".dist-info":
            shutil.rmtree(target, ignore_errors=True)  # of an install whose package is gone
        entry.rename(target)


def main() -> None:
    found = importlib.util.find_spec("detectron2")
    if found is None:
        site_packages = Path(sysconfig.get_paths()["purelib"])
        print(f"Installing Detectron2 into {site_packages}", flush=True)
        with tempfile.TemporaryDirectory(prefix="detectron2-", dir=site_packages) as staging:
            download(Path(staging))
            drop_stray_package(Path(staging))
            move_into(Path(staging), site_packages)
    else:
        print(f"Using the Detectron2 in {', '.join(found.submodule_search_locations or [])}", flush=True)
    if error := import_error():
        raise SystemExit(
            f"error: the installed Detectron2 cannot be imported: {error}\nIf a dependency is missing, run "
            "`pip install -r requirements.txt`; otherwise repair or uninstall that Detectron2 and run this again."
        )


if __name__ == "__main__":
    main()
