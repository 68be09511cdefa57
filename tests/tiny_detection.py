"""The detection configs, and versions of them that train in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from tiny_slotcon import REPO_ROOT

from d2_objssl import add_objssl_config

NUM_SCENE_CLASSES = 6


def load(config: str, *opts: Any) -> CfgNode:
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.merge_from_file(str(REPO_ROOT / config))
    cfg.merge_from_list(list(opts))
    cfg.freeze()
    return cfg


def narrow(config: str, *opts: Any) -> CfgNode:
    """The config with blocks of 4 to 32 channels, few proposals and small images, on the CPU."""
    tiny: list[Any] = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.STEM_OUT_CHANNELS", 8]
    tiny += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.FPN.OUT_CHANNELS", 16]
    tiny += ["MODEL.RPN.CONV_DIMS", [16], "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 100, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50]
    tiny += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 32]
    tiny += ["MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1]
    tiny += ["INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.LSJ.IMAGE_SIZE", 64, "DATALOADER.NUM_WORKERS", 0]
    return load(config, *tiny, "SOLVER.IMS_PER_BATCH", 2, *opts)


def narrow_run(config: str, output_dir: Path, *opts: Any) -> CfgNode:
    """`narrow` for two iterations on generated scenes, without a test."""
    cfg = load(config)
    dataset = "scenes_tiny_train" if cfg.MODEL.MASK_ON else "scenes_tiny_train_voc"
    run: list[Any] = ["DATASETS.TRAIN", (dataset,), "DATASETS.TEST", (), "OUTPUT_DIR", str(output_dir)]
    run += ["MODEL.ROI_HEADS.NUM_CLASSES", NUM_SCENE_CLASSES, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ()]
    run += ["SOLVER.WARMUP_ITERS", 1, "SOLVER.BASE_LR", min(cfg.SOLVER.BASE_LR, 0.02), "TEST.PRECISE_BN.NUM_ITER", 2]
    return narrow(config, *run, *opts)
