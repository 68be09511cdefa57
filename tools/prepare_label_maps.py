#!/usr/bin/env python
"""Turn the label maps of a data set, as it is released, into the PNGs that training reads: 0 is a class, 255 is ignored.

Examples:
    # ADE20K (SceneParse150): annotations/*/*.png, 0 unlabelled, 1 to 150 -> annotations_detectron2/*/*.png
    python tools/prepare_label_maps.py ade20k datasets/ADEChallengeData2016
    # COCO-Stuff 10k, release 1.1: annotations/*.mat, COCO's category ids -> annotations_detectron2/*.png, 171 classes
    python tools/prepare_label_maps.py cocostuff10k datasets/cocostuff10k

Files that exist already are left alone. The layout of the folders is that of d2_objssl/data/label_map_datasets.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat

from d2_objssl.data.ground_truth import read_label_map
from d2_objssl.data.label_map_datasets import COCO_STUFF_10K_CLASSES

_IGNORED = 255


def convert_ids(labels: np.ndarray, ids: list[int], source: str) -> np.ndarray:
    """Number labels anew.

    Args:
        labels: (H, W) integer; 0 is unlabelled.
        ids: the label that becomes class i, for each i.
        source: file of the labels, for messages.

    Returns:
        (H, W) uint8: classes, 255 where there is none.

    Raises:
        ValueError: for labels that are neither 0 nor in `ids`.
    """
    unknown = set(np.unique(labels).tolist()) - {0, *ids}
    if unknown:
        raise ValueError(f"{source} has the label(s) {sorted(unknown)[:10]}, which are neither 0 nor those of a class")
    table = np.full(max(ids) + 1, _IGNORED, dtype=np.uint8)
    table[ids] = np.arange(len(ids))
    return table[labels]


def read_matlab_labels(file: Path) -> np.ndarray:
    """The label map `S` of a file of COCO-Stuff 10k."""
    contents = loadmat(file, variable_names=["S"])
    if "S" not in contents:
        raise ValueError(f"{file} has no label map S: is it one of COCO-Stuff 10k?")
    return contents["S"]


# Data set: suffix of its label maps, how one is read, and the labels of its classes in their order.
_DATASETS: dict[str, tuple[str, Callable[[Path], np.ndarray], list[int]]] = {
    "ade20k": (".png", lambda file: read_label_map(str(file)), list(range(1, 151))),
    "cocostuff10k": (".mat", read_matlab_labels, list(COCO_STUFF_10K_CLASSES)),
}


def prepare(dataset: str, root: Path) -> int:
    """Convert all label maps below root/annotations to root/annotations_detectron2.

    Returns:
        How many were written.

    Raises:
        FileNotFoundError: if there is none.
    """
    suffix, read, ids = _DATASETS[dataset]
    source, target = root / "annotations", root / "annotations_detectron2"
    files = sorted(source.rglob(f"*{suffix}"))
    if not files:
        raise FileNotFoundError(f"there is no *{suffix} below {source}")
    written = 0
    for file in files:
        output = target / file.relative_to(source).with_suffix(".png")
        if output.exists():
            continue
        labels = convert_ids(read(file), ids, str(file))
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(".partial")
        Image.fromarray(labels).save(partial, format="PNG")
        partial.replace(output)
        written += 1
    return written


def main(argv: list[str] | None = None) -> None:
    """Convert one data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=sorted(_DATASETS))
    parser.add_argument("root", type=Path, help="the folder that holds annotations/")
    args = parser.parse_args(argv)
    try:
        written = prepare(args.dataset, args.root)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{written} label maps written to {args.root / 'annotations_detectron2'}")


if __name__ == "__main__":
    main()
