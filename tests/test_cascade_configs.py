"""The configs of Cascade R-CNN: values of their protocols, and tiny versions of them train."""

from pathlib import Path

import pytest
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import CascadeROIHeads
from tiny_detection import load, narrow, narrow_run
from tiny_runs import train

from d2_objssl.engine import resolve_norms

COCO = "configs/finetune/COCO/cascade_mask_rcnn_R_50_FPN_1x.yaml"
VOC = "configs/finetune/VOC/cascade_rcnn_R_50_FPN_24k.yaml"
CITYSCAPES = "configs/finetune/Cityscapes/cascade_mask_rcnn_R_50_FPN_24k.yaml"
CONFIGS = [COCO, VOC, CITYSCAPES]


@pytest.mark.parametrize("config", CONFIGS)
def test_cascade_is_detectron2s(config: str) -> None:
    cfg = load(config)
    assert cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads"
    assert cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG, "the heads after the first one cannot be built otherwise"
    assert cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS == (0.5, 0.6, 0.7)
    assert cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN == 2000
    assert (cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.NORM, cfg.MODEL.FPN.NORM) == (2, "", "SyncBN")
    assert cfg.TEST.PRECISE_BN.ENABLED


def test_voc_protocol() -> None:
    cfg = load(VOC)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("voc_2007_trainval", "voc_2012_trainval"), ("voc_2007_test",))
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.MASK_ON) == (20, False)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS) == (16, 0.02, 100)
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER) == ((18_000, 22_000), 24_000)
    assert cfg.INPUT.MIN_SIZE_TRAIN == tuple(range(480, 801, 32))
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 1333)


def test_cityscapes_protocol() -> None:
    cfg = load(CITYSCAPES)
    assert cfg.DATASETS.TRAIN == ("cityscapes_fine_instance_seg_train",)
    assert cfg.DATASETS.TEST == ("cityscapes_fine_instance_seg_val",)
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.MASK_ON) == (8, True)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (8, 0.01)
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER) == ((18_000,), 24_000)
    assert cfg.INPUT.MIN_SIZE_TRAIN == tuple(range(800, 1025, 32))
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TEST) == (1024, 2048, 2048)


@pytest.mark.parametrize("config", CONFIGS)
def test_model_has_three_box_heads_and_masks_where_there_are_labels_for_them(config: str) -> None:
    cfg = narrow(config)
    heads = build_model(resolve_norms(cfg)).roi_heads
    assert isinstance(heads, CascadeROIHeads) and len(heads.box_head) == 3
    assert heads.mask_on == (config != VOC)
    assert [p.cls_score.out_features for p in heads.box_predictor] == [cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1] * 3


@pytest.mark.parametrize("config", CONFIGS)
def test_tiny_version_trains(config: str, tmp_path: Path) -> None:
    losses = train(narrow_run(config, tmp_path))
    assert sorted(losses) == [0, 1]
    boxes = {f"loss_{kind}_stage{i}" for kind in ("cls", "box_reg") for i in range(3)}
    expected = boxes | {"loss_rpn_cls", "loss_rpn_loc", "total_loss"} | ({"loss_mask"} if config != VOC else set())
    assert set(losses[1]) == expected
    assert all(0 <= value < 20 for value in losses[1].values())
