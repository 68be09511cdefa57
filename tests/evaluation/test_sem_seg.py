"""mIoU of label maps whose score is counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2_objssl import add_objssl_config
from d2_objssl.evaluation.build import build_evaluator

NAME = "two_rows_sem_seg"


@pytest.fixture
def dataset(tmp_path: Path):
    """One image of 2 x 4 pixels with a palette; 3 classes, of which class 2 is nowhere, and label 7 is ignored."""
    Image.new("RGB", (4, 2)).save(tmp_path / "image.png")
    labels = Image.fromarray(np.array([[0, 0, 0, 7], [1, 1, 1, 7]], dtype=np.uint8))
    labels.putpalette(bytes(range(200, 224)))
    labels.save(tmp_path / "labels.png")
    files = {"file_name": str(tmp_path / "image.png"), "sem_seg_file_name": str(tmp_path / "labels.png")}
    DatasetCatalog.register(NAME, lambda: [files])
    MetadataCatalog.get(NAME).set(stuff_classes=["a", "b", "c"], ignore_label=7, evaluator_type="sem_seg")
    yield files
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def evaluate(dataset, tmp_path: Path, predicted: torch.Tensor) -> dict[str, float]:
    """Results for predicted (2, 4) classes."""
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path)
    scores = torch.nn.functional.one_hot(predicted, 3).permute(2, 0, 1).float()
    evaluator = build_evaluator(cfg, NAME)
    evaluator.reset()
    evaluator.process([dataset], [{"sem_seg": scores}])
    return evaluator.evaluate()["sem_seg"]


def test_known_iou(dataset, tmp_path: Path):
    predicted = torch.tensor([[0, 0, 1, 0], [1, 1, 2, 1]])  # what is said of ignored pixels does not count
    results = evaluate(dataset, tmp_path, predicted)
    assert results["IoU-a"] == pytest.approx(100 * 2 / 3) and results["IoU-b"] == pytest.approx(100 * 2 / 4)
    assert np.isnan(results["IoU-c"]), "a class without a pixel has no part in the mean"
    assert results["mIoU"] == pytest.approx((200 / 3 + 50) / 2)
    assert results["pACC"] == pytest.approx(100 * 4 / 6)


@pytest.mark.parametrize("label", [3, 4, 200], ids=["the next", "another", "far off"])
def test_a_label_that_is_no_class_is_an_error(dataset, tmp_path: Path, label: int):
    """Detectron2 counts it for the class behind the predicted one, or as ignored."""
    Image.fromarray(np.array([[0, 0, 0, 7], [label, 1, 1, 7]], dtype=np.uint8)).save(dataset["sem_seg_file_name"])
    message = rf'labels\.png has the label\(s\) \[{label}\]; those of "{NAME}" are 0 to 2, and 7, which is ignored'
    with pytest.raises(ValueError, match=message):
        evaluate(dataset, tmp_path, torch.ones(2, 4, dtype=torch.int64))
