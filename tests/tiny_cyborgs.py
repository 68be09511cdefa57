"""CYBORGS runs, and bootstrappings of region masks, that take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from tiny_runs import pretrain_cfg
from torch import Tensor

from d2_objssl.data.datasets import list_images
from d2_objssl.data.region_keys import assign_region_keys
from d2_objssl.engine.feature_clustering import ClusterSettings, FeatureClusterer
from d2_objssl.engine.mask_round import MaskMaker

SETTINGS = ClusterSettings(feature="res3.1", min_clusters=2, max_clusters=6, kmeans_iters=5)


def cyborgs_cfg(photos: Path, output_dir: Path, *opts: Any) -> CfgNode:
    """20 photos in batches of 4: a warm-up of 2 iterations, masks before iterations 2 and 5; 8 iterations."""
    run: list[Any] = ["MODEL.SSL.METHOD", "CYBORGS", "INPUT.REGIONS.SOURCE", "bootstrap"]
    run += ["MODEL.SSL.IN_FEATURES", ["res3", "res4", "res5"], "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]]
    run += ["MODEL.SSL.TEACHER.MOMENTUM", 0.9, "MODEL.SSL.EXPORT_BRANCH", "student"]
    cyborgs = {
        "WARMUP_EPOCHS": 0.4,
        "WARMUP_CLUSTERS": 2,
        "BOOTSTRAP_PERIOD": 1.0,
        "VMF_PERIOD": 2,
        "BOOTSTRAP_FEATURE": SETTINGS.feature,
        "MIN_CLUSTERS": SETTINGS.min_clusters,
        "MAX_CLUSTERS": SETTINGS.max_clusters,
        "KMEANS_ITERS": SETTINGS.kmeans_iters,
        "IMAGES_PER_CLUSTERING": 6,
    }
    for key, value in cyborgs.items():
        run += [f"MODEL.SSL.CYBORGS.{key}", value]
    for head in ("PROJECTOR", "PREDICTOR"):
        run += [f"MODEL.SSL.{head}.NUM_FC", 2, f"MODEL.SSL.{head}.ACTIVATION", "relu"]
    run += ["SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 3]
    return pretrain_cfg(photos, output_dir, *run, *opts)


def normalize(pixels: Tensor) -> Tensor:
    """uint8 -> about [-2, 2]."""
    return pixels.float() / 64 - 2


def tiny_maker(photos: Path, *, seed: int = 0, max_unreadable: float = 0.2, repeat: int = 1) -> MaskMaker:
    """Bootstraps masks of the images in a folder with the narrow R50 initialised from `seed`, in batches of 6 images."""
    torch.manual_seed(seed)
    backbone = build_backbone(pretrain_cfg(photos, photos, "MODEL.RESNETS.NORM", "BN"))
    dataset: list[dict[str, Any]] = [{"file_name": file} for file in list_images(str(photos)) * repeat]
    assign_region_keys(dataset, [str(photos)])
    return MaskMaker(
        build_clusterer=lambda: FeatureClusterer(
            backbone, normalize=normalize, settings=SETTINGS, device_type="cpu", dtype=None
        ),
        images_per_clustering=6,
        dataset=dataset,
        dataset_names=["photos"],
        max_unreadable=max_unreadable,
    )


def files_in(folder: Path) -> dict[str, bytes]:
    """Content of all files below a folder, by relative path."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
