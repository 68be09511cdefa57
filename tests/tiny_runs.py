"""Pretraining and fine-tuning runs that take seconds, and exact comparison of what they leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from PIL import Image
from tiny_slotcon import REPO_ROOT, SIDE, tiny_cfg

from d2_objssl import add_objssl_config
from d2_objssl.data.scenes import register_scenes
from d2_objssl.engine import Trainer

# Bottleneck blocks of 4 to 32 channels: checkpoints of 2 MB, against 130 MB with ResNet-18.
_NARROW_R50: list[Any] = ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8]
_NARROW_R50 += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.WIDTH_PER_GROUP", 4]

_WIDE_AND_TALL = {"tiny_wide": (64, 96), "tiny_tall": (96, 64)}  # height, width


def write_photos(folder: Path, count: int = 20) -> Path:
    """Fill a folder with JPEGs of soft colour blobs, of several sizes."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        blobs = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        blobs.resize((96 + 4 * (i % 5), 80), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.jpg")
    return folder


def register_wide_and_tall() -> None:
    """Enter "tiny_wide" and "tiny_tall" into the catalogs: labelled scenes of two orientations, 8 images each."""
    for seed, (name, size) in enumerate(_WIDE_AND_TALL.items()):
        if name not in DatasetCatalog:
            register_scenes(name, num_images=8, size=size, seed=100 + seed)


def _merge(cfg: CfgNode, *opts: Any) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(list(opts))
    cfg.freeze()
    return cfg


def pretrain_cfg(photos: Path, output_dir: Path, *opts: Any) -> CfgNode:
    """SlotCon with LARS and a cosine schedule: narrow R50, 7 iterations of 4 images, a checkpoint every 3, float32."""
    run: list[Any] = ["DATASETS.TRAIN", (f"images:{photos}",), "OUTPUT_DIR", str(output_dir), "SEED", 0]
    run += ["INPUT.SSL.CROP_SIZE", SIDE, "DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 4]
    run += ["SOLVER.MAX_ITER", 7, "SOLVER.WARMUP_ITERS", 2, "SOLVER.WARMUP_EPOCHS", 0.0, "SOLVER.CHECKPOINT_PERIOD", 3]
    run += ["SOLVER.MAX_TO_KEEP", 0, "SOLVER.AMP.ENABLED", False, "SOLVER.REFERENCE_BATCH", 0]
    return _merge(tiny_cfg(norm="SyncBN"), *_NARROW_R50, *run, *opts)


def finetune_cfg(output_dir: Path, *opts: Any) -> CfgNode:
    """Mask R-CNN on wide and tall scenes: narrow R50-FPN, 7 iterations of 4 images, a checkpoint every 3, float32."""
    register_wide_and_tall()
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.merge_from_file(str(REPO_ROOT / "configs" / "quick" / "mask_rcnn_R_18_FPN_scenes.yaml"))
    run: list[Any] = ["DATASETS.TRAIN", tuple(_WIDE_AND_TALL), "DATASETS.TEST", (), "OUTPUT_DIR", str(output_dir)]
    run += ["INPUT.MIN_SIZE_TRAIN", (64, 80), "INPUT.MIN_SIZE_TEST", 64, "SEED", 0, "SOLVER.IMS_PER_BATCH", 4]
    run += ["SOLVER.MAX_ITER", 7, "SOLVER.WARMUP_ITERS", 2, "SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.AMP.ENABLED", False]
    run += ["MODEL.FPN.OUT_CHANNELS", 16, "MODEL.RPN.CONV_DIMS", [16], "MODEL.ROI_BOX_HEAD.FC_DIM", 32]
    run += ["MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 100]
    run += ["MODEL.RPN.POST_NMS_TOPK_TRAIN", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 20]
    run += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16]
    return _merge(cfg, *_NARROW_R50, *run, *opts)


class Killed(Exception):
    """Stands for the end of a process."""


class _Observer(HookBase):
    """Records the losses of every iteration; raises `Killed` before one of them."""

    def __init__(self, kill_before: int | None) -> None:
        self.kill_before = kill_before
        self.losses: dict[int, dict[str, float]] = {}

    def before_step(self) -> None:
        if self.trainer.iter == self.kill_before:
            raise Killed

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        now = self.trainer.iter
        self.losses[now] = {k: v for k, (v, i) in latest.items() if "loss" in k and i == now}


def train(cfg: CfgNode, *, resume: bool = False, seed: int = 0, kill_before: int | None = None) -> dict[int, Any]:
    """Train in this process; `Killed` does not come out.

    Args:
        seed: of the global generators.
        kill_before: iteration that is not reached any more.

    Returns:
        The losses of every iteration.
    """
    seed_all_rng(seed)
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    trainer = Trainer(cfg)
    observer = _Observer(kill_before)
    trainer.register_hooks([observer])
    trainer.resume_or_load(resume=resume)
    try:
        trainer.train()
        assert kill_before is None, "the run ended before it was killed"
    except Killed:
        pass
    return observer.losses


def final_checkpoint(output_dir: Path) -> dict[str, Any]:
    """All that model_final.pth holds, but for the config's text and name, which name the folder, and the wall time."""
    checkpoint = torch.load(output_dir / "model_final.pth", weights_only=True)
    checkpoint["d2_objssl"].pop("config")
    checkpoint["d2_objssl"]["training"]["config"].pop("file", None)
    checkpoint["trainer"]["hooks"]["RunRecord"].pop("wall_time_s")
    return checkpoint


def assert_identical(a: Any, b: Any, where: str = "checkpoint") -> None:
    """Compare nested containers of tensors and plain values bit by bit."""
    assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
    if isinstance(a, dict):
        assert list(a) == list(b), f"{where}: {a.keys() ^ b.keys()}"
        for key in a:
            assert_identical(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert torch.equal(a, b), f"{where} differs by up to {(a.double() - b.double()).abs().max()}"
    else:
        assert a == b, f"{where}: {a} and {b}"
