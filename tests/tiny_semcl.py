"""A SemCL model, pairs for it and runs of it that are small enough for tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image
from tiny_slotcon import REPO_ROOT, SIDE

from d2_objssl import add_objssl_config
from d2_objssl.modeling import ObjectSSL

CLASSES = ("background", "square", "stripe")


def semcl_cfg(*opts: Any, norm: str = "BN", config: str = "configs/pretrain/Base-SemCL-R50.yaml") -> CfgNode:
    """The pretraining config with a narrow R50, 64-pixel views and small heads; `opts`: KEY VALUE pairs."""
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.merge_from_file(str(REPO_ROOT / config))
    tiny: list[Any] = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "VIS_PERIOD", 0]
    tiny += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.RESNETS.NORM", norm]
    tiny += ["INPUT.SSL.CROP_SIZE", SIDE, "DATALOADER.NUM_WORKERS", 0, "SOLVER.AMP.ENABLED", False]
    for head in ("PROJECTOR", "PREDICTOR"):
        node = f"MODEL.SSL.{head}"
        tiny += [f"{node}.FC_DIM", 32, f"{node}.OUT_DIM", 16, f"{node}.NORM", norm]
    cfg.merge_from_list([*tiny, *opts])
    cfg.freeze()
    return cfg


def semcl_run_cfg(output_dir: Path, *opts: Any) -> CfgNode:
    """7 iterations of 4 pairs of "tiny_pairs" with AdamW and OneCycle, a checkpoint every 3; see `register_pairs`."""
    run: list[Any] = ["DATASETS.TRAIN", ("tiny_pairs",), "OUTPUT_DIR", str(output_dir), "SEED", 0]
    run += ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 7, "SOLVER.WARMUP_ITERS", 2, "SOLVER.CHECKPOINT_PERIOD", 3]
    run += ["SOLVER.MAX_TO_KEEP", 0, "SOLVER.BASE_LR", 0.001, "SOLVER.REFERENCE_BATCH", 0]
    return semcl_cfg(*run, *opts, norm="SyncBN")


def semcl_model(*opts: Any, norm: str = "BN", seed: int = 0) -> ObjectSSL:
    """The model of `semcl_cfg` in training mode, initialised from `seed`."""
    torch.manual_seed(seed)
    return build_model(semcl_cfg(*opts, norm=norm)).train()


def semcl_batch(n: int = 4, *, seed: int = 0) -> list[dict[str, Any]]:
    """The mapper's dicts of n pairs, six views each: blocks of colour, the not-anchors darker."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for i in range(n):
        views = []
        for v in range(6):
            colours = torch.randint(0, 256 if v < 3 else 128, (3, 4, 4), generator=generator, dtype=torch.uint8)
            image = colours.repeat_interleave(SIDE // 4, 1).repeat_interleave(SIDE // 4, 2)
            views.append({"image": image, "crop_box": torch.tensor([0.0, 0, 90, 90]), "hflip": (i + v) % 2 == 0})
        batch.append({"file_name": f"{i}.jpg", "views": views})
    return batch


def write_labelled(folder: Path, count: int = 6, size: tuple[int, int] = (48, 64)) -> list[dict[str, Any]]:
    """Write images and label maps of `CLASSES`; returns their dataset dicts.

    Every image has a square of 16 x 16 pixels; those of odd number also a stripe of 2 rows; the first row is ignored.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    height, width = size
    dicts = []
    for i in range(count):
        label = np.zeros(size, dtype=np.uint8)
        label[8:24, 4 + i : 20 + i] = 1
        if i % 2:
            label[30:32] = 2
        label[0] = 255
        image = rng.integers(1, 256, (height, width, 3), dtype=np.uint8)
        files = folder / f"{i}.png", folder / f"{i}_label.png"
        for file, pixels in zip(files, (image, label), strict=True):
            # At once: the processes of a test may write and read the same folder.
            Image.fromarray(pixels).save(unfinished := file.with_suffix(f".{os.getpid()}.png"))
            os.replace(unfinished, file)
        dicts.append(
            {
                "file_name": str(files[0]), "image_id": i, "height": height, "width": width,
                "sem_seg_file_name": str(files[1]),
            }
        )  # fmt: skip
    return dicts


def register_pairs(name: str, dicts: list[dict[str, Any]], **metadata: Any) -> None:
    """Enter dataset dicts into the catalogs, with `CLASSES` and the ignored label 255."""
    DatasetCatalog.register(name, lambda: dicts)
    MetadataCatalog.get(name).set(**{"stuff_classes": list(CLASSES), "ignore_label": 255, **metadata})
