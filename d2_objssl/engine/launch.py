"""From the command line to a config and to processes: Detectron2's `launch`, or torchrun."""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_setup as d2_default_setup
from detectron2.engine import launch as d2_launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..config import add_objssl_config
from ..data import register_image_folders
from .preemption import forward_signals


def setup_cfg(config_file: str, opts: list[str], *, stored: str = "") -> CfgNode:
    """Merge defaults, the YAML text of a config that a checkpoint stores, a config file and KEY VALUE overrides.

    `images:PATH` data sets are registered. Without a GPU, MODEL.DEVICE "cuda" becomes "cpu".

    Raises:
        FileNotFoundError: if the config file does not exist.
        KeyError: for an unknown key.
        ValueError: for a value of another type than the default's, or a key without a value.
    """
    cfg = get_cfg()
    add_objssl_config(cfg)
    if stored:
        cfg.merge_from_other_cfg(CfgNode.load_cfg(stored))
    if config_file:
        if not os.path.isfile(config_file):
            raise FileNotFoundError(f"--config-file {config_file} does not exist")
        cfg.merge_from_file(config_file)
    try:
        cfg.merge_from_list(_whole_numbers_as_floats(cfg, opts))
    except AssertionError as error:  # yacs asserts what the user may get wrong
        if len(opts) % 2:
            raise ValueError(f"Overrides come as KEY VALUE pairs, but {opts} are {len(opts)} words") from error
        raise KeyError(str(error)) from error
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).warning('No GPU is available: MODEL.DEVICE "%s" becomes "cpu"', cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    register_image_folders([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    return cfg


def _whole_numbers_as_floats(cfg: CfgNode, opts: list[str]) -> list[str]:
    """Let `SOLVER.BASE_LR 1` mean 1.0, where yacs would refuse an integer for a float."""
    opts = list(opts)
    for i in range(0, len(opts) - 1, 2):
        value: Any = cfg
        for part in str(opts[i]).split("."):
            value = value.get(part) if isinstance(value, CfgNode) else None
        if isinstance(value, float) and re.fullmatch(r"[+-]?\d+", str(opts[i + 1])):
            opts[i + 1] = f"{opts[i + 1]}.0"
    return opts


def default_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Detectron2's `default_setup`, with a logger for this package."""
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="d2_objssl")
    d2_default_setup(cfg, args)


def launch(main_func: Callable[..., Any], args: argparse.Namespace) -> Any:
    """Run `main_func(args)` in as many processes as the arguments of Detectron2's parser, or torchrun, ask for."""
    if dist.is_torchelastic_launched():
        return _run_under_torchrun(main_func, args)
    with forward_signals() if args.num_gpus * args.num_machines > 1 else nullcontext():
        return d2_launch(
            main_func,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )


def _run_under_torchrun(main_func: Callable[..., Any], args: argparse.Namespace) -> Any:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    try:
        return main_func(args)
    finally:
        dist.destroy_process_group()
