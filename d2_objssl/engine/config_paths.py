"""Which files and folders a config names, and whether they are there and fit."""

from __future__ import annotations

import functools
import glob
import os
from collections.abc import Iterator, Mapping
from typing import Any

from detectron2.config import CfgNode

from ..data.datasets import IMAGE_PREFIX, register_image_folders
from ..data.known_sizes import check_datasets
from ..earlier_checkpoints import earlier_checkpoints
from ..load_guard import compare_contracts, input_contract, stored_contract
from ..weight_files import CheckpointError, load_checkpoint


def expand_home(cfg: CfgNode) -> None:
    """Replace "~" (in place) where nobody else does: in MODEL.WEIGHTS, OUTPUT_DIR and INPUT.REGIONS.ROOT."""
    for node, key in ((cfg.MODEL, "WEIGHTS"), (cfg, "OUTPUT_DIR"), (cfg.INPUT.REGIONS, "ROOT")):
        if node[key]:  # YAML's null is possible, too
            node[key] = os.path.expanduser(node[key])


def register_data_sets(cfg: CfgNode) -> dict[str, str]:
    """Enter `images:PATH`, `voc:PATH:SPLIT` and `folders:PATH` into the catalogs; what cannot be -> what is wrong with it."""
    wrong: dict[str, str] = {}
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            try:
                register_image_folders([name])
            except (ValueError, OSError) as error:
                wrong.setdefault(name, str(error) if name in str(error) else f'DATASETS.{key} names "{name}": {error}')
    return wrong


def check_data_sets(cfg: CfgNode) -> Iterator[str]:
    """That data sets are known, and that their folders and files of labels are there; images are not looked at."""
    if not cfg.DATASETS.TRAIN:
        yield "DATASETS.TRAIN is empty; name a data set, or a folder as ('images:/path/to/folder',)"
    wrong = register_data_sets(cfg)
    yield from wrong.values()
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            path = os.path.expanduser(name.removeprefix(IMAGE_PREFIX))
            if name in wrong:
                continue
            if not name.startswith(IMAGE_PREFIX):
                try:
                    check_datasets([name], f"DATASETS.{key}")
                except (ValueError, OSError) as error:
                    yield str(error)
            elif not (os.path.exists(path) or (glob.has_magic(path) and any(glob.iglob(path, recursive=True)))):
                yield f'DATASETS.{key} names "{name}", but there is no {path}'


def check_output_dir(cfg: CfgNode) -> Iterator[str]:
    """That checkpoints in OUTPUT_DIR can be named."""
    if "?" in cfg.OUTPUT_DIR:
        yield (
            f'OUTPUT_DIR is "{cfg.OUTPUT_DIR}"; it must not have a "?", which ends the name of a file of weights: its '
            "checkpoints could not be loaded"
        )


def check_weights(cfg: CfgNode, resume: bool | None) -> Iterator[str]:
    """That MODEL.WEIGHTS is there, if it will be read, and was trained on what the config describes.

    What cannot be read is left to the loading, which says why.

    Args:
        resume: whether checkpoints in OUTPUT_DIR come first; None: not known, they may.
    """
    try:
        current = input_contract(cfg)
    except ValueError as error:
        yield str(error)
        return
    path = cfg.MODEL.WEIGHTS.partition("?")[0]
    if not path or "://" in path or (resume is not False and _has_checkpoint(cfg.OUTPUT_DIR)):
        return
    if not os.path.isfile(path):
        yield f'MODEL.WEIGHTS is "{cfg.MODEL.WEIGHTS}"; there is no such file'
        return
    try:
        compare_contracts(_read_contract(path, os.path.getmtime(path)), current, f"MODEL.WEIGHTS {path}")
    except ValueError as error:
        yield str(error)


def _has_checkpoint(folder: str) -> bool:
    """As `ObjSSLCheckpointer.has_checkpoint`."""
    if os.path.isfile(os.path.join(folder, "last_checkpoint")):
        return True
    return bool({*glob.glob(os.path.join(glob.escape(folder), "model_*.pth"))} - earlier_checkpoints(folder))


@functools.lru_cache(maxsize=1)
def _read_contract(path: str, modified: float) -> Mapping[str, Any]:
    """`stored_contract` of a file; empty if it cannot be read. A run asks twice for the same file."""
    try:
        return stored_contract(load_checkpoint(path))
    except (CheckpointError, OSError):
        return {}
