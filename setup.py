"""Package metadata. The verified, pinned stack is in requirements.txt; the bounds here let a user's own stack be."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Read `__version__` without importing the package, which needs Detectron2."""
    match = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "d2_objssl" / "__init__.py").read_text(), re.MULTILINE)
    assert match, "d2_objssl/__init__.py defines no __version__"
    return match.group(1)


setup(
    name="d2_objssl",
    version=read_version(),
    description="Object-level self-supervised pretraining of detection backbones inside Detectron2",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["d2_objssl", "d2_objssl.*"]),
    # What d2_objssl and tools/ import. Detectron2 is missing because it is not on PyPI under its own name:
    # tools/install_detectron2.py installs it where it is absent.
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "numpy>=1.26",
        "pillow>=10",
        # opencv-python's cv2 with selective search, and without windows, which need libGL: servers have none
        "opencv-contrib-python-headless>=4.8",
        "scikit-image>=0.22",  # Felzenszwalb's segmentation
        "scipy>=1.11",  # MATLAB files of proposals
        "fvcore>=0.1.5.post20221221",
        "iopath>=0.1.7,<0.1.11",
        "pycocotools>=2.0.7",
        "matplotlib>=3.6",
        "tabulate",
        "tqdm>4.29.0",
    ],
    extras_require={
        "faiss": ["faiss-cpu>=1.8"],
        "gpu": ["faiss-gpu>=1.14.3"],  # instead of `faiss`: both install the module faiss
        "fast-eval": ["faster-coco-eval>=1.8"],
        "fast-masks": ["numba>=0.60"],  # Felzenszwalb's segmentation, compiled
        "probes": ["scikit-learn>=1.3"],  # linear support vector machines
        "safetensors": ["safetensors>=0.4"],
        "timm": ["timm>=1.0"],  # what conversions of Swin Transformers are compared with
        # Score-CAM. grad-cam has it, too, but its opencv-python-headless overwrites the cv2 of the list above.
        "attention": ['torchcam>=0.5,<0.6; python_version >= "3.11"'],
        "dev": ["pytest>=8", "pytest-xdist>=3.5", "ruff", "mypy", "pre-commit>=4"],
    },
)
