"""What gpu.py measures: methods, sizes, and the settings of one run; images and region maps that it generates."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from stages.data import make_photographs

from d2_objssl.data.known_sizes import expected_size
from d2_objssl.engine import resolve_norms, setup_cfg

REPO_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Method:
    """A pretraining method with the paper's settings on COCO.

    Attributes:
        config: file below configs/pretrain.
        overrides: KEY VALUE pairs.
    """

    config: str
    overrides: tuple[str, ...] = ()


# Four of five epochs of CYBORGS are without the consistency loss.
METHODS = {
    "SlotCon": Method("slotcon_R_50_800ep_coco.yaml"),
    "DetCon-B": Method("detcon_b_R_50_324ep_coco.yaml"),
    "CYBORGS": Method("cyborgs_R_50_800ep_coco.yaml", ("MODEL.SSL.CYBORGS.VMF_PERIOD", "0")),
    "CYBORGS, consistency loss": Method("cyborgs_R_50_800ep_coco.yaml", ("MODEL.SSL.CYBORGS.VMF_PERIOD", "1")),
}

# Precisions by name; "tf32" also in matrix products, where PyTorch's default, "float32", has it in convolutions alone.
PRECISIONS = {
    "float32": ("SOLVER.AMP.ENABLED", "False"),
    "tf32": ("SOLVER.AMP.ENABLED", "False"),
    "bfloat16": ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16"),
    "float16": ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16"),
}

# Blocks of 4 to 32 channels, views of 64 pixels, small heads.
_TINY = "MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 MODEL.RESNETS.WIDTH_PER_GROUP 4 "
_TINY += "MODEL.SSL.PROJECTOR.FC_DIM 32 MODEL.SSL.PROJECTOR.OUT_DIM 16 INPUT.SSL.CROP_SIZE 64 "
_TINY += "MODEL.SSL.PREDICTOR.FC_DIM 32 MODEL.SSL.PREDICTOR.OUT_DIM 16 MODEL.SSL.SLOTCON.NUM_PROTOTYPES 8 "
_TINY += "MODEL.SSL.DETCON.NUM_REGIONS 4 MODEL.SSL.CYBORGS.MAX_CLUSTERS 4 MODEL.SSL.CYBORGS.KMEANS_ITERS 2"


@dataclass(frozen=True)
class Settings:
    """How large the measurements are.

    Attributes:
        device: "cuda" or "cpu".
        tiny: whether networks are narrow and compiled models are not compiled: to see that everything runs.
        batch_sizes: images of a step, from small to large; the last one is that of loader and whole training, too.
        warmup_steps, steps: that are not timed and that are.
        workers: processes of the loader, from few to many.
        num_photographs: how many JPEGs of 640x480 are generated.
        seed: of weights, pixels and order.
    """

    device: str
    tiny: bool = False
    batch_sizes: tuple[int, ...] = (64, 128, 256, 512)
    warmup_steps: int = 5
    steps: int = 10
    workers: tuple[int, ...] = (4, 8, 16)
    num_photographs: int = 128
    seed: int = 0

    def load_cfg(self, method: str, *opts: str) -> CfgNode:
        """The config of a method, for one process on `device`; `opts`: KEY VALUE pairs, the last word."""
        chosen = METHODS[method]
        common = ["MODEL.DEVICE", self.device, "SEED", str(self.seed), "VIS_PERIOD", "0"]
        # A rate that random weights stand without a warm-up.
        common += ["SOLVER.BASE_LR", "0.01", "SOLVER.REFERENCE_BATCH", "0"]
        words = [*common, *chosen.overrides, *(_TINY.split() if self.tiny else ()), *opts]
        return resolve_norms(setup_cfg(str(REPO_ROOT / "configs" / "pretrain" / chosen.config), words))

    def images_per_epoch(self, method: str) -> int:
        """Images of the data set that the method's config names."""
        (name,) = self.load_cfg(method).DATASETS.TRAIN
        num_images = expected_size(MetadataCatalog.get(name))
        assert num_images is not None, name
        return num_images


@dataclass(frozen=True)
class Task:
    """One figure to measure.

    Attributes:
        measurement: the kind, as in --only.
        name: what it is about.
        run: measures; returns plain types.
        method: a key of METHODS.
        essential: whether it comes before those that are not.
    """

    measurement: str
    name: str
    run: Callable[[], dict[str, Any]]
    method: str = "SlotCon"
    essential: bool = False


class Workspace:
    """A folder of generated JPEGs, and region maps for them, made when they are first asked for."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self._settings = settings

    @cached_property
    def photographs(self) -> Path:
        """The folder of JPEGs."""
        folder = self.folder / "photographs"
        folder.mkdir()
        make_photographs(folder, self._settings.num_photographs, self._settings.seed)
        return folder

    @cached_property
    def region_maps(self) -> Path:
        """The root of Felzenszwalb's regions of all JPEGs, with one of the settings of DetCon's COCO configs."""
        root = self.folder / "region_maps"
        command = [sys.executable, str(REPO_ROOT / "tools" / "generate_masks.py"), "--source", "felzenszwalb"]
        command += ["--dataset", f"images:{self.photographs}", "--setting", "1000", "1000", "--output", str(root)]
        command += ["--num-workers", str(self._settings.workers[-1])]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            raise RuntimeError(f"tools/generate_masks.py failed: {made.stderr[-500:]}")
        return root

    def data_opts(self, method: str) -> list[str]:
        """KEY VALUE pairs that let a config of the method train on these images."""
        opts = ["DATASETS.TRAIN", f"('images:{self.photographs}',)"]
        if method != "SlotCon":
            opts += ["INPUT.REGIONS.SOURCE", "file", "INPUT.REGIONS.ROOT", str(self.region_maps)]
        return opts
