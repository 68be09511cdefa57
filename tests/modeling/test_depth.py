"""DepthEstimator: the loss, what it predicts, runs through the trainer, and configs that it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from tiny_depth import write_rooms
from tiny_runs import train

from d2_objssl import add_objssl_config
from d2_objssl.data.depth_datasets import load_listed_depths
from d2_objssl.engine import Trainer
from d2_objssl.modeling.depth import DepthEstimator, silog_loss

ROOT = Path(__file__).resolve().parents[2]


def make_cfg(*opts: Any) -> CfgNode:
    """The config of NYUv2 with blocks of 4 to 32 channels, on the CPU, without data sets."""
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "finetune" / "Depth" / "depth_R_50_FPN_nyu.yaml"))
    tiny: list[Any] = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.NORM", "BN"]
    tiny += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.FPN.OUT_CHANNELS", 16]
    tiny += ["MODEL.FPN.NORM", "BN", "MODEL.DEPTH.NORM", "BN", "MODEL.DEPTH.CONVS_DIM", 16, "SEED", 0]
    cfg.merge_from_list([*tiny, "DATASETS.TRAIN", (), "DATASETS.TEST", (), *opts])
    return cfg


def make_model(*opts: Any) -> DepthEstimator:
    torch.manual_seed(0)
    return build_model(make_cfg(*opts))


def test_loss_by_hand():
    """Errors of the logarithms 1, 1 and 4: their mean is 2, the mean of their squares 6."""
    target = torch.tensor([1.0, 2.0, 4.0, 0.0, 99.0])
    log_depth = torch.tensor([1.0, 1 + math.log(2), 4 + math.log(4), 7.0, math.nan])
    valid = torch.tensor([True, True, True, False, False])
    for focus in (0.0, 0.5, 0.85, 1.0):
        expected = math.sqrt(6 - focus * 4)
        assert silog_loss(log_depth, target, valid, focus).item() == pytest.approx(expected, rel=1e-6), focus


def test_loss_forgives_a_common_factor_only_with_lambda_1():
    generator = torch.Generator().manual_seed(0)
    target, depth = (1 + 9 * torch.rand(2, 8, 8, generator=generator) for _ in range(2))
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    losses = {f: [silog_loss((s * depth).log(), target, valid, f).item() for s in (1, 3)] for f in (0.85, 1.0)}
    assert losses[1.0][0] == pytest.approx(losses[1.0][1], rel=1e-5)
    assert losses[0.85][1] > 1.1 * losses[0.85][0]


@pytest.mark.parametrize("case", ["perfect", "nothing valid"])
def test_loss_has_a_finite_gradient_where_it_is_0(case):
    target = torch.tensor([1.0, 2.0, 4.0])
    log_depth = target.log().requires_grad_()
    loss = silog_loss(log_depth, target, torch.full((3,), case == "perfect"))
    loss.backward()
    assert 0 <= loss.item() < 1e-5 and log_depth.grad is not None and log_depth.grad.isfinite().all()


@pytest.mark.parametrize(
    "opts",
    [(), ("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.DEPTH.IN_FEATURES", ["res2", "res4", "res5"])],
    ids=["fpn", "resnet"],
)
def test_any_size_of_images_in_and_their_own_size_out(opts):
    """Also the start: in the middle of the range everywhere, where the sigmoid has its slope."""
    model = make_model(*opts).eval()
    images = (
        torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8),
        torch.randint(0, 256, (3, 64, 33), dtype=torch.uint8),
    )
    first, second = model([{"image": images[0]}, {"image": images[1], "height": 128, "width": 66}])
    assert first["depth"].shape == (50, 70) and second["depth"].shape == (128, 66)
    for depth in (first["depth"], second["depth"]):
        assert 1 < depth.min() and depth.max() < 9  # of 10 m


def test_what_was_not_measured_or_is_out_of_range_does_not_count():
    """Depths of 0, above MODEL.DEPTH.MAX, and the padding of the smaller image leave the loss as it is."""
    model = make_model()
    images = [torch.randint(0, 256, (3, 64, 64 - 32 * i), dtype=torch.uint8) for i in range(2)]
    depths = [1 + 8 * torch.rand(64, 64 - 32 * i) for i in range(2)]
    losses = []
    for filler in (0.0, 11.0, 65.5):
        for depth in depths:
            depth[:20] = filler
        inputs = [{"image": image, "depth": depth} for image, depth in zip(images, depths, strict=True)]
        losses.append(model(inputs)["loss_depth"].item())
    assert losses[0] == losses[1] == losses[2] > 0
    depths[0][0, 0] = 9.0
    inputs = [{"image": image, "depth": depth} for image, depth in zip(images, depths, strict=True)]
    assert model(inputs)["loss_depth"].item() != losses[0]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("MODEL.DEPTH.MIN", 0.0), "MODEL.DEPTH.MIN is 0.0 and MAX 10.0"),
        (("MODEL.DEPTH.SILOG_LAMBDA", 1.5), "MODEL.DEPTH.SILOG_LAMBDA is 1.5"),
        (("MODEL.DEPTH.IN_FEATURES", ["res5"]), r"MODEL.DEPTH.IN_FEATURES is \['res5'\].* gives p2"),
        (("DATASETS.TEST", ("kitti_eigen_test",)), 'MAX is 10, but depths of "kitti_eigen_test" are scored up to 80 m'),
    ],
)
def test_a_wrong_config_is_explained(opts, message):
    with pytest.raises(ValueError, match=message):
        make_model(*opts)


@pytest.mark.slow
def test_depth_is_learned(tmp_path, catalog):
    """Rooms of which the best constant, 4.2 m, has an AbsRel of 0.30."""
    write_rooms(tmp_path, num_train=24, num_test=8, height=96, width=128)
    for split, folder in (("train", "sync"), ("test", "official_splits/test")):
        root = tmp_path / "nyu_depth_v2"
        listed, images = root / f"nyudepthv2_{split}_files_with_gt.txt", root / folder
        dicts = load_listed_depths(str(listed), str(images), str(images), 1000)
        DatasetCatalog.register(f"tiny_rooms_{split}", lambda dicts=dicts: dicts)
        MetadataCatalog.get(f"tiny_rooms_{split}").set(evaluator_type="depth", max_depth=10.0)
    run: list[Any] = ["DATASETS.TRAIN", ("tiny_rooms_train",), "DATASETS.TEST", ("tiny_rooms_test",)]
    run += ["INPUT.CROP.SIZE", (80, 96), "SOLVER.IMS_PER_BATCH", 8, "SOLVER.MAX_ITER", 40, "SOLVER.WARMUP_ITERS", 5]
    run += ["SOLVER.BASE_LR", 0.003, "DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", str(tmp_path / "run")]
    cfg = make_cfg(*run)
    losses = train(cfg)
    assert losses[39]["total_loss"] < 0.5 * losses[0]["total_loss"]
    model = build_model(cfg)
    model.load_state_dict(torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["model"])
    errors = Trainer.test(cfg, model)["depth"]
    assert errors["AbsRel"] < 0.15 and errors["delta1"] > 0.8
