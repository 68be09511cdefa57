"""Errors of depth computed by hand, the scored part of an image, and the mean over images, in one process and in two."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from multiprocess import run_in_processes

from d2_objssl import add_objssl_config
from d2_objssl.evaluation import build_evaluator
from d2_objssl.evaluation.depth import DepthEvaluator, depth_errors, scored_area


def test_errors_by_hand():
    """Ratios 1, 1.5 and 1 / 2; differences 0, 2 and -1."""
    errors = depth_errors(torch.tensor([2.0, 6.0, 1.0]), torch.tensor([2.0, 4.0, 2.0]))
    assert errors == pytest.approx(
        {
            "AbsRel": (0 + 0.5 + 0.5) / 3,
            "SqRel": (0 + 1 + 0.5) / 3,
            "RMSE": math.sqrt(5 / 3),
            "RMSElog": math.sqrt((math.log(1.5) ** 2 + math.log(2) ** 2) / 3),
            "log10": (math.log10(1.5) + math.log10(2)) / 3,
            "delta1": 1 / 3,  # 1.5 is above 1.25, below 1.5625
            "delta2": 2 / 3,
            "delta3": 2 / 3,  # 2 is above 1.953
        }
    )


def test_crops():
    """The pixels that AdaBins' and BinsFormer's released code scores."""
    assert scored_area("none", 5, 7) == (slice(0, 5), slice(0, 7))
    assert scored_area("eigen", 480, 640) == (slice(45, 471), slice(41, 601))
    assert scored_area("garg", 1024, 2048) == (slice(417, 1015), slice(73, 1974))
    # The benchmark's 352 x 1216 pixels begin at row 23 and column 13; Garg's crop of them is [143, 349) x [43, 1172).
    assert scored_area("garg_kitti", 375, 1242) == (slice(166, 372), slice(56, 1185))


@pytest.mark.parametrize(
    ("crop", "message"),
    [("eigen", "480 x 640 pixels.*not 300 x 1300"), ("garg_kitti", "352 x 1216.*300 x 1300"), ("top", '"top".*known')],
)
def test_a_crop_that_does_not_fit_is_explained(crop, message):
    with pytest.raises(ValueError, match=message):
        scored_area(crop, 300, 1300)


def evaluate(folder: Path, indices: list[int], **kwargs: Any) -> dict:
    """Images i of 2 x 2 pixels, of which one was not measured and one is 12 m deep; predictions are 10, 30 and 50 % off."""
    evaluator = DepthEvaluator(min_depth=0.5, max_depth=10.0, **kwargs)
    evaluator.reset()
    for i in indices:
        file = folder / f"{i}.png"
        cv2.imwrite(str(file), np.array([[2000, 0], [4000, 12000]], dtype=np.uint16))
        prediction = torch.tensor([[2.0, 9.0], [4.0, 1.0]]) * (1.1 + 0.2 * i)
        image = {"file_name": "a.png", "image_id": i, "depth_file_name": str(file), "depth_scale": 1000}
        evaluator.process([image], [{"depth": prediction}])
    return evaluator.evaluate()


def evaluate_shard(folder: Path, shards: list[list[int]]) -> dict:
    own = folder / str(torch.distributed.get_rank())
    own.mkdir()
    return evaluate(own, shards[torch.distributed.get_rank()])


def test_images_count_equally_and_only_measured_depths_in_range(tmp_path):
    results = evaluate(tmp_path, [0, 1, 2])["depth"]
    assert results["AbsRel"] == pytest.approx(0.3, rel=1e-5)
    assert results["RMSE"] == pytest.approx(0.3 * math.sqrt(10), rel=1e-5)  # not the root of the mean of all squares
    assert (results["delta1"], results["delta2"]) == (pytest.approx(1 / 3), 1.0)


def test_two_processes_equal_one_and_an_image_that_both_had_counts_once(tmp_path):
    main, other = run_in_processes(evaluate_shard, tmp_path, [[0, 1], [1, 2]])
    assert other == {} and main["depth"]["AbsRel"] == pytest.approx(0.3, rel=1e-5)


def test_predictions_are_brought_to_the_size_of_the_true_map_and_clipped(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((6, 8), 8000, dtype=np.uint16))
    image = {"file_name": "a.jpg", "image_id": 0, "depth_file_name": str(tmp_path / "a.png"), "depth_scale": 1000}
    evaluator = DepthEvaluator(min_depth=0.5, max_depth=10.0)
    evaluator.process([image], [{"depth": torch.full((3, 4), 20.0)}])
    assert evaluator.evaluate()["depth"]["AbsRel"] == pytest.approx(0.25)


def test_without_a_pixel_to_score_there_is_no_error(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((6, 8), 12000, dtype=np.uint16))
    image = {"file_name": "a.jpg", "image_id": 0, "depth_file_name": str(tmp_path / "a.png"), "depth_scale": 1000}
    evaluator = DepthEvaluator(min_depth=0.5, max_depth=10.0)
    evaluator.process([image], [{"depth": torch.ones(6, 8)}])
    with pytest.raises(
        ValueError, match=r"None of the 1 images.*0.5 and 10 m \(MODEL.DEPTH.MIN, MAX\) in the crop none"
    ):
        evaluator.evaluate()


@pytest.mark.parametrize(
    ("name", "crop"),
    [("nyu_depth_v2_test", "eigen"), ("kitti_eigen_test", "garg_kitti"), ("cityscapes_depth_val", "garg")],
)
def test_the_evaluator_takes_crop_and_range(name, crop):
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.MODEL.DEPTH.MAX = MetadataCatalog.get(name).max_depth
    evaluator = build_evaluator(cfg, name)
    assert isinstance(evaluator, DepthEvaluator)
    assert (evaluator.crop, evaluator.max_depth) == (crop, cfg.MODEL.DEPTH.MAX)
