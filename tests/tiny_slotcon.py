"""A SlotCon model and batches for it that are small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from d2_objssl import add_objssl_config
from d2_objssl.modeling import ObjectSSL

REPO_ROOT = Path(__file__).resolve().parent.parent
SIDE = 64  # of a view, pixels; res5 has 2 x 2 cells


def tiny_cfg(*opts: Any, norm: str = "BN") -> CfgNode:
    """The pretraining config with R18, 64-pixel views, small heads and 8 prototypes; `opts`: KEY VALUE pairs."""
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.merge_from_file(str(REPO_ROOT / "configs" / "pretrain" / "Base-SlotCon-R50.yaml"))
    tiny: list[Any] = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
    tiny += ["MODEL.SSL.SLOTCON.NUM_PROTOTYPES", 8, "MODEL.RESNETS.NORM", norm, "VIS_PERIOD", 0]
    for head in ("PROJECTOR", "PREDICTOR"):
        node = f"MODEL.SSL.{head}"
        tiny += [f"{node}.FC_DIM", 32, f"{node}.OUT_DIM", 16, f"{node}.NORM", norm]
    cfg.merge_from_list([*tiny, *opts])
    cfg.freeze()
    return cfg


def tiny_model(*opts: Any, norm: str = "BN", seed: int = 0) -> ObjectSSL:
    """The model of `tiny_cfg` in training mode, initialised from `seed`."""
    torch.manual_seed(seed)
    return build_model(tiny_cfg(*opts, norm=norm)).train()


def tiny_batch(n: int = 4, *, seed: int = 0, overlap: bool = True) -> list[dict[str, Any]]:
    """The mapper's dicts of n images with two views each, of which every second one is flipped.

    Args:
        overlap: whether the two crops of an image share some of it.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for i in range(n):
        views = []
        for v in range(2):
            # Blocks of colour: noise would look the same everywhere to the network.
            colours = torch.randint(0, 256, (3, 4, 4), generator=generator, dtype=torch.uint8)
            start = torch.tensor([4.0 * i, 10.0 * v]) if overlap else torch.tensor([500.0 * v, 3.0 * i])
            views.append(
                {
                    "image": colours.repeat_interleave(SIDE // 4, 1).repeat_interleave(SIDE // 4, 2),
                    "crop_box": torch.cat([start, start + 90 - 20 * v]),
                    "hflip": (i + v) % 2 == 0,
                }
            )
        batch.append({"file_name": f"{i}.jpg", "views": views})
    return batch
