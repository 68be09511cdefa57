"""What growth.py measures: one function for each quantity that grows.

Each returns plain types for the record: "setting", text, and "points", one dict for each size; see growth.py.

    N  images of a process    G  images of all processes    K  prototypes    M  regions of a view    D  dimension
    h, w  cells of a view
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from growth_pieces import time_pieces
from growth_processes import Processes, count_traffic, wall_seconds
from growth_steps import Heads, Step, measure, peak_mb, peak_of_process, step_batch, step_cfg, top_operators
from stages.timing import repeat_in_turns

_LOCAL_BN = [f"MODEL.{node}.NORM" for node in ("RESNETS", "SSL.PROJECTOR", "SSL.PREDICTOR")]
_STRIDE = 32  # of res5


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        batch_sizes, prototypes, regions: N, K, M.
        batch_size: N where it does not grow.
        side: of a view, pixels, where prototypes and regions grow.
        small_side: the same, where the batch and the processes grow.
        repeats: runs whose median is taken.
        seed: of weights and images.
        opts: KEY VALUE pairs on top of the methods' configs; they do not change what grows.
    """

    batch_sizes: Sequence[int] = (4, 8, 16, 32)
    prototypes: Sequence[int] = (256, 2048, 16384)
    regions: Sequence[int] = (1, 4, 16, 64)
    batch_size: int = 8
    side: int = 224
    small_side: int = 112
    repeats: int = 3
    seed: int = 0
    opts: Sequence[str] = ()

    def cfg(self, method: str, side: int, *opts: Any) -> CfgNode:
        """The config of `method` for views of `side` pixels, unless `self.opts` give another size."""
        return step_cfg(method, "INPUT.SSL.CROP_SIZE", side, *self.opts, *opts)


def grow_batch(sizes: Sizes) -> dict[str, Any]:
    """Steps of SlotCon over the batch size, in both precisions, with and without checkpointed activations."""
    kinds = [(amp, checkpointing) for checkpointing in (False, True) for amp in (True, False)]
    cfgs = {}
    for amp, checkpointing in kinds:
        opts = ["SOLVER.AMP.ENABLED", amp, "MODEL.SSL.CHECKPOINT_ACTIVATIONS", checkpointing]
        cfgs[amp, checkpointing] = sizes.cfg("SlotCon", sizes.small_side, *opts)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        calls = {(k, n): (peak_of_process, c, n, sizes.seed) for k, c in cfgs.items() for n in sizes.batch_sizes}
        peaks = {key: pool.submit(*call).result() for key, call in calls.items()}
    steps = {kind: Step(cfg, sizes.seed) for kind, cfg in cfgs.items()}
    cfg = steps[True, False].cfg
    batches = {n: step_batch(cfg, n, sizes.seed) for n in sizes.batch_sizes}
    contestants = {(kind, n): (step, batch) for kind, step in steps.items() for n, batch in batches.items()}
    figures = measure(contestants, sizes.repeats, sizes.seed, peaks)
    points, lines = [], []
    for amp, checkpointing in kinds:
        kind = {"precision": "bfloat16" if amp else "float32", "checkpointing": checkpointing}
        of_kind = [figures[(amp, checkpointing), n] for n in sizes.batch_sizes]
        points += [{**kind, "batch_size": n, **f} for n, f in zip(sizes.batch_sizes, of_kind, strict=True)]
        lines.append({**kind, **_lines(sizes.batch_sizes, of_kind)})
    setting = f"SlotCon, {_describe(cfg)}, K = {cfg.MODEL.SSL.SLOTCON.NUM_PROTOTYPES}"
    return {"setting": setting, "state_mb": steps[True, False].state_mb, "points": points, "lines": lines}


def _lines(batch_sizes: Sequence[int], figures: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The lines a + b N through time and memory, for the smallest relative errors."""
    lines: dict[str, float] = {}
    for key in ("cpu_s", "peak_mb"):
        values = np.array([f[key] for f in figures])
        slope, start = np.polyfit(batch_sizes, values, 1, w=1 / values)
        lines |= {key: float(start), f"{key}_per_image": float(slope)}
    return lines


def grow_prototypes(sizes: Sizes) -> dict[str, Any]:
    """SlotCon over K: whole steps, all but the backbone, and the pieces of that which grow."""
    cfgs = {k: sizes.cfg("SlotCon", sizes.side, "MODEL.SSL.SLOTCON.NUM_PROTOTYPES", k) for k in sizes.prototypes}
    points = _steps_and_heads("prototypes", cfgs, sizes)
    for point in points:
        k, cfg = point["prototypes"], cfgs[point["prototypes"]]
        cells = math.ceil(cfg.INPUT.SSL.CROP_SIZE / _STRIDE) ** 2
        # In float32, each of one view and one branch.
        point["tensors_mb"] = {
            "scores (N, K, h, w)": 4e-6 * sizes.batch_size * k * cells,
            "slots (N, K, D)": 4e-6 * sizes.batch_size * k * cfg.MODEL.SSL.PROJECTOR.OUT_DIM,
        }
        point["pieces"] = time_pieces(cfg, math.isqrt(cells), sizes.batch_size, sizes.repeats, sizes.seed)
    return {"setting": f"SlotCon, {_describe(cfg)}, batch {sizes.batch_size}, bfloat16", "points": points}


def grow_regions(sizes: Sizes) -> dict[str, Any]:
    """DetCon-B over the number of regions drawn from a grid: whole steps, and all but the backbone."""
    cfgs = {m: sizes.cfg("DetCon-B", sizes.side, "MODEL.SSL.DETCON.NUM_REGIONS", m) for m in sizes.regions}
    points = _steps_and_heads("regions", cfgs, sizes)
    for point in points:
        rows, cfg = sizes.batch_size * point["regions"], cfgs[point["regions"]]
        # Each of one view and one branch; there are four such matrices of logits.
        point["tensors_mb"] = {
            "hidden layer (N M, FC_DIM)": 2e-6 * rows * cfg.MODEL.SSL.PROJECTOR.FC_DIM,
            "logits (N M, G M)": 4e-6 * rows * rows,
        }
    return {"setting": f"DetCon-B, {_describe(cfg)}, batch {sizes.batch_size}, bfloat16", "points": points}


def _steps_and_heads(name: str, cfgs: dict[int, CfgNode], sizes: Sizes) -> list[dict[str, Any]]:
    """Measure steps, and then all but their backbones, of each config."""
    steps = {size: Step(cfg, sizes.seed) for size, cfg in cfgs.items()}
    batch = step_batch(next(iter(cfgs.values())), sizes.batch_size, sizes.seed)
    of_steps = measure({size: (step, batch) for size, step in steps.items()}, sizes.repeats, sizes.seed)
    heads = {size: Heads(step, batch) for size, step in steps.items()}
    of_heads = measure({size: (work, batch) for size, work in heads.items()}, sizes.repeats, sizes.seed)
    return [
        {
            name: size,
            "step": of_steps[size],
            "heads": of_heads[size],
            "operators": top_operators(heads[size], batch),
        }
        for size in cfgs
    ]


def grow_processes(sizes: Sizes) -> dict[str, Any]:
    """SlotCon and DetCon-B in one and two processes: the same batch a process, and the same batch in all.

    In two processes SyncBN is Detectron2's naiveSyncBN, which needs float32; batch norm of each process alone shows what it
    costs.
    """
    points = []
    for method in ("SlotCon", "DetCon-B"):
        cfgs = {
            "SyncBN": sizes.cfg(method, sizes.small_side, "SOLVER.AMP.ENABLED", False),
            "BN": sizes.cfg(
                method, sizes.small_side, "SOLVER.AMP.ENABLED", False, *(x for key in _LOCAL_BN for x in (key, "BN"))
            ),
        }
        with Processes(2, cfgs, sizes.seed) as pair:
            points += _one_and_two(method, cfgs["BN"], pair, sizes)
    setting = f"{_describe(cfgs['BN'])}, float32, gloo, one thread a process"
    return {"setting": setting, "points": points}


def _one_and_two(method: str, cfg: CfgNode, pair: Processes, sizes: Sizes) -> list[dict[str, Any]]:
    """Steps of one process, and of two, taking turns."""
    n = sizes.batch_size
    step, batch = Step(cfg, sizes.seed), step_batch(cfg, n, sizes.seed)

    def alone(function: Callable[..., Any]) -> list[Any]:
        return [function(step, batch)]

    calls: dict[Any, Callable[[Callable[..., Any]], list[Any]]] = {(1, n, "BN"): alone}
    for norm, size in (("SyncBN", n), ("BN", n), ("SyncBN", n // 2)):
        calls[2, size, norm] = partial(pair.call, name=norm, batch_size=size)
    peaks = {key: max(call(peak_mb)) for key, call in calls.items()}
    traffic = {key: call(count_traffic)[0] for key, call in calls.items() if key[0] > 1}
    turns: dict[Any, Callable[[], list[Any]]] = {key: partial(call, wall_seconds) for key, call in calls.items()}
    runs: dict[Any, list[Any]] = repeat_in_turns(turns, sizes.repeats, sizes.seed)
    points = []
    for (processes, size, norm), of_ranks in runs.items():
        # A step ends when the last process is done.
        walls = [max(wall for wall, _ in ranks) for ranks in of_ranks]
        wall = statistics.median(walls)
        point = {"method": method, "processes": processes, "batch_size": size, "norm": norm, "wall_s": wall}
        point |= {"wall_s_runs": walls, "ms_per_image": 1e3 * wall / (processes * size)}
        point["waiting_s"] = statistics.median(statistics.mean(w for _, w in ranks) for ranks in of_ranks)
        point |= {"peak_mb": peaks[processes, size, norm], "traffic": traffic.get((processes, size, norm))}
        points.append(point)
    return points


def _describe(cfg: CfgNode) -> str:
    return f"ResNet-{cfg.MODEL.RESNETS.DEPTH}, {cfg.INPUT.SSL.CROP_SIZE} px"
