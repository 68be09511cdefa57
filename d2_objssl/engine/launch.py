"""From the command line to a config and to processes: Detectron2's `launch`, or torchrun."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DEFAULT_TIMEOUT
from detectron2.engine import default_setup as d2_default_setup
from detectron2.engine import launch as d2_launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..config import add_objssl_config
from .config_checks import find_mistakes
from .config_merging import merge_file, merge_node, merge_pairs, raise_mistakes
from .config_paths import expand_home, register_data_sets
from .output_lock import check_unlocked
from .preemption import Preempted, forward_signals


def setup_cfg(
    config_file: str, opts: list[str], *, stored: str = "", for_training: bool = False, resume: bool | None = None
) -> CfgNode:
    """Merge defaults, the YAML text of a config that a checkpoint stores, a config file and KEY VALUE overrides.

    Data sets such as `images:PATH` are registered. In MODEL.WEIGHTS, OUTPUT_DIR and INPUT.REGIONS.ROOT "~" is the home
    folder. Without a GPU, MODEL.DEVICE "cuda" becomes "cpu".

    Args:
        config_file: "" for none.
        opts: KEY VALUE overrides.
        stored: "" for none.
        for_training: also look for what would ruin a training run, see `config_checks.py`.
        resume: for training, whether checkpoints in OUTPUT_DIR come before MODEL.WEIGHTS; None: not known.

    Raises:
        FileNotFoundError: if the config file does not exist.
        ValueError: for an odd number of overrides, and a config file that holds no keys; with all unknown keys, values of
            another type than the default's, data sets that cannot be registered, and mistakes for training.
    """
    if len(opts) % 2:
        raise ValueError(f"Overrides come as KEY VALUE pairs, but {opts} are {len(opts)} words")
    if config_file and not os.path.isfile(config_file):
        raise FileNotFoundError(f"--config-file {config_file} does not exist")
    cfg = get_cfg()
    add_objssl_config(cfg)
    mistakes = merge_node(cfg, CfgNode.load_cfg(stored), "stored config") if stored else []
    if config_file:
        mistakes += merge_file(cfg, config_file)
    pairs = _whole_numbers_as_floats(cfg, opts)
    mistakes += merge_pairs(cfg, zip(pairs[::2], pairs[1::2], strict=True), "command line")
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).warning('No GPU is available: MODEL.DEVICE "%s" becomes "cpu"', cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"
    expand_home(cfg)
    cfg.freeze()
    mistakes += register_data_sets(cfg).values()
    if for_training:
        mistakes += find_mistakes(cfg, resume=resume)
    raise_mistakes(mistakes)
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
    """Detectron2's `default_setup`, with a logger for this package.

    Raises:
        RuntimeError: before training, if another process trains into OUTPUT_DIR, which is then left as it is.
    """
    if not getattr(args, "eval_only", False):
        check_unlocked(cfg.OUTPUT_DIR)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="d2_objssl")
    d2_default_setup(cfg, args)


def launch(main_func: Callable[..., Any], args: argparse.Namespace) -> None:
    """Run `main_func(args)` in as many processes as the arguments of Detectron2's parser, or torchrun, ask for.

    With several processes, `main_func` is importable by name: they are started anew.
    """
    if dist.is_torchelastic_launched():
        _run_under_torchrun(main_func, args)
        return
    several = args.num_gpus * args.num_machines > 1
    with forward_signals() if several else nullcontext():
        d2_launch(
            _run_in_group if several else main_func,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main_func, args) if several else (args,),
        )


def _run_under_torchrun(main_func: Callable[..., Any], args: argparse.Namespace) -> None:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=DEFAULT_TIMEOUT)  # as in Detectron2's launch
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    _run_in_group(main_func, args)


def _run_in_group(main_func: Callable[..., Any], args: argparse.Namespace) -> None:
    """Run `main_func(args)` and leave the process group, if all its processes have come to their end.

    Gloo's threads may hold tensors a moment longer than their collective lasts. If one lets go of them while the interpreter
    is finalised, the process aborts, and a run that has finished would look like one that has failed. The threads end
    with the group, and that with the last object that refers to it (a DistributedDataParallel, often in a reference cycle).
    After an error nobody waits: the other processes may be inside a collective.
    """
    preempted = None
    try:
        main_func(args)
    except Preempted as stop:
        preempted = stop.with_traceback(None)  # whose frames refer to the group
    comm._get_global_gloo_group.cache_clear()  # beside NCCL's: for Python objects, and kept there without a public way out
    gc.collect()
    dist.destroy_process_group()
    if preempted is not None:
        raise preempted
