"""The configs of C4 models, LVIS, Cityscapes, DetCon's recipe and frozen backbones: their protocols, and tiny runs."""

from pathlib import Path

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import build_resnet_backbone
from tiny_detection import load, narrow, narrow_run
from tiny_runs import train
from torch import nn

from d2_objssl.engine import Trainer, resolve_norms

VOC_C4 = "configs/finetune/VOC/faster_rcnn_R_50_C4_24k.yaml"
COCO_C4 = "configs/finetune/COCO/mask_rcnn_R_50_C4_1x.yaml"
LVIS = "configs/finetune/LVIS/mask_rcnn_R_50_FPN_2fc_180k.yaml"
CITYSCAPES = "configs/finetune/Cityscapes/mask_rcnn_R_50_FPN_2fc_24k.yaml"
DETCON = "configs/finetune/COCO/mask_rcnn_R_50_FPN_detcon_1x.yaml"
FROZEN = "configs/finetune/COCO/mask_rcnn_R_50_FPN_2fc_frozen_1x.yaml"
DETCON_FROZEN = "configs/finetune/COCO/mask_rcnn_R_50_FPN_detcon_frozen_1x.yaml"
TWO_FC = "configs/finetune/COCO/mask_rcnn_R_50_FPN_2fc_1x.yaml"


@pytest.mark.parametrize("config", [VOC_C4, COCO_C4])
def test_c4_protocol(config: str) -> None:
    cfg = load(config)
    assert cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeadsExtraNorm"
    assert (cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST) == (6000, 1000)
    assert (cfg.MODEL.RESNETS.OUT_FEATURES, cfg.MODEL.ROI_HEADS.IN_FEATURES) == (["res4"], ["res4"])
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS) == (16, 0.02, 100)
    assert cfg.MODEL.MASK_ON == (config == COCO_C4) and cfg.TEST.PRECISE_BN.ENABLED


def test_voc_protocol() -> None:
    cfg = load(VOC_C4)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("voc_2007_trainval", "voc_2012_trainval"), ("voc_2007_test",))
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER) == (20, (18_000, 22_000), 24_000)
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST) == (tuple(range(480, 801, 32)), 800)


def test_lvis_protocol() -> None:
    cfg = load(LVIS)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("lvis_v1_train",), ("lvis_v1_val",))
    assert (cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD) == ("RepeatFactorTrainingSampler", 0.001)
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST) == (1203, 1e-4)
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 300
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS) == ((120_000, 160_000), 180_000, 1000)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (16, 0.02)


def test_cityscapes_protocol_is_that_of_the_cascade() -> None:
    cfg, cascade = load(CITYSCAPES), load("configs/finetune/Cityscapes/cascade_mask_rcnn_R_50_FPN_24k.yaml")
    for part in ("DATASETS", "INPUT", "SOLVER", "TEST"):
        assert cfg[part] == cascade[part], part
    assert (cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.NUM_CLASSES) == ("StandardROIHeads", 8)


@pytest.mark.parametrize(("schedule", "epochs"), [("1x", 12), ("2x", 24), ("frozen_1x", 12)])
def test_detcon_protocol(schedule: str, epochs: int) -> None:
    cfg = load(f"configs/finetune/COCO/mask_rcnn_R_50_FPN_detcon_{schedule}.yaml")
    solver, lsj = cfg.SOLVER, cfg.INPUT.LSJ
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.WEIGHT_DECAY, solver.WARMUP_ITERS) == (64, 0.3, 4e-5, 500)
    assert solver.MAX_ITER * 64 / 118_287 == pytest.approx(epochs, abs=1e-3)
    assert solver.STEPS == pytest.approx((2 / 3 * solver.MAX_ITER, 8 / 9 * solver.MAX_ITER), abs=1)
    assert (cfg.INPUT.AUGMENTATION, lsj.IMAGE_SIZE, lsj.MIN_SCALE, lsj.MAX_SCALE) == (
        "large_scale_jitter", 1024, 0.8, 1.25,
    )  # fmt: skip


@pytest.mark.parametrize(("frozen", "trained"), [(FROZEN, TWO_FC), (DETCON_FROZEN, DETCON)])
def test_frozen_config_differs_in_what_trains_alone(frozen: str, trained: str) -> None:
    cfg, expected = load(frozen), load(trained).clone()
    expected.defrost()
    expected.MODEL.BACKBONE.FREEZE_AT = 5
    assert cfg == expected


_SLOW = [pytest.param(config, marks=pytest.mark.slow) for config in (COCO_C4, CITYSCAPES)]


@pytest.mark.parametrize("config", [VOC_C4, LVIS, DETCON, *_SLOW])
def test_tiny_version_trains(config: str, tmp_path: Path) -> None:
    losses = train(narrow_run(config, tmp_path))
    masks = {"loss_mask"} if config != VOC_C4 else set()
    assert set(losses[1]) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "total_loss"} | masks
    assert all(0 <= value < 20 for value in losses[1].values())


def test_lvis_model_has_its_classes() -> None:
    heads = build_model(resolve_norms(narrow(LVIS))).roi_heads
    assert heads.box_predictor.cls_score.out_features == 1204
    assert heads.mask_head.predictor.out_channels == 1203


def test_nothing_of_a_frozen_backbone_moves(tmp_path: Path) -> None:
    """Neither a parameter nor a statistic; FPN and heads do. The weights are random, so that an identity would show."""
    cfg = narrow_run(FROZEN, tmp_path, "MODEL.WEIGHTS", str(tmp_path / "resnet.pth"), "SOLVER.WEIGHT_DECAY", 0.1)
    torch.manual_seed(0)
    resnet = build_resnet_backbone(resolve_norms(narrow(TWO_FC)), ShapeSpec(channels=3))
    for value in resnet.state_dict().values():
        if value.is_floating_point() and value.ndim == 1:
            nn.init.uniform_(value, 0.5, 1.0)
    torch.save(resnet.state_dict(), tmp_path / "resnet.pth")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    frozen = [k for k in after if k.startswith("backbone.bottom_up.")]
    given = resnet.state_dict()
    assert len(frozen) > 250
    assert all(torch.equal(after[k], given[k.removeprefix("backbone.bottom_up.")]) for k in frozen)
    assert not any(p.requires_grad for p in trainer.model.backbone.bottom_up.parameters())
    moved = [
        k for k in after if k not in frozen and after[k].is_floating_point() and not torch.equal(after[k], before[k])
    ]
    assert {"backbone.fpn_lateral2.weight", "backbone.fpn_lateral2.norm.running_mean"} <= set(moved)
    assert len(moved) > 40
