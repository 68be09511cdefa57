"""DetCon models and batches for them that are small enough for tests."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from tiny_slotcon import REPO_ROOT, SIDE, tiny_batch
from torch import Tensor

from d2_objssl import add_objssl_config
from d2_objssl.modeling import ObjectSSL

# What turns the configs of DetCon-B into those of DetCon-S.
DETCON_S: list[Any] = ["MODEL.SSL.METHOD", "DetConS", "MODEL.SSL.TEACHER.ENABLED", False]


def tiny_detcon_cfg(*opts: Any, norm: str = "BN") -> CfgNode:
    """DetCon-B's config with R18, 64-pixel views, small heads and 4 regions; `opts`: KEY VALUE pairs."""
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.merge_from_file(str(REPO_ROOT / "configs" / "pretrain" / "Base-DetCon-R50.yaml"))
    tiny: list[Any] = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    tiny += ["MODEL.RESNETS.NORM", norm, "MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"], "VIS_PERIOD", 0]
    # Of 64 pixels res4 has 4 x 4 cells.
    tiny += ["MODEL.SSL.IN_FEATURES", ["res4", "res5"], "MODEL.SSL.GRID_FEATURE", "res4"]
    tiny += ["MODEL.SSL.DETCON.NUM_REGIONS", 4, "MODEL.SSL.DETCON.MAX_REGION_IDS", 16]
    tiny += ["INPUT.REGIONS.SOURCE", "grid", "INPUT.SSL.CROP_SIZE", SIDE]
    for head in ("PROJECTOR", "PREDICTOR"):
        node = f"MODEL.SSL.{head}"
        tiny += [f"{node}.FC_DIM", 32, f"{node}.OUT_DIM", 16, f"{node}.NORM", norm]
    cfg.merge_from_list([*tiny, *opts])
    cfg.freeze()
    return cfg


def tiny_detcon(*opts: Any, norm: str = "BN", seed: int = 0) -> ObjectSSL:
    """The model of `tiny_detcon_cfg` in training mode, initialised from `seed`."""
    torch.manual_seed(seed)
    return build_model(tiny_detcon_cfg(*opts, norm=norm)).train()


def quadrants(num_ids: int = 4) -> Tensor:
    """A (SIDE, SIDE) int16 region map of four squares with the ids 0 to 3, modulo `num_ids`."""
    ids = torch.arange(4, dtype=torch.int16) % num_ids
    return ids.view(2, 2).repeat_interleave(SIDE // 2, 0).repeat_interleave(SIDE // 2, 1)


def tiny_region_batch(
    n: int = 4, *, num_views: int = 2, region_map: Tensor | None = None, overlapping: bool = False, seed: int = 0
) -> list[dict[str, Any]]:
    """The mapper's dicts of n images, all views with the same region map.

    Args:
        region_map: (SIDE, SIDE) integers; default `quadrants()`.
        overlapping: whether the map is made of bit sets.
    """
    batch = tiny_batch(n, seed=seed)
    for image in batch:
        image["views"] = image["views"][:num_views]
        image["overlapping_regions"] = overlapping
        for view in image["views"]:
            view["region_map"] = quadrants() if region_map is None else region_map
    return batch
