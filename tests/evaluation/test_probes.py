"""Linear SVMs on features made by hand: separable classes, difficult objects, the choice of the cost, and the command."""

import json
import sys

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from PIL import Image

from d2_objssl.evaluation import probes
from d2_objssl.evaluation.probes import ABSENT, DIFFICULT, PRESENT, evaluate_class, evaluate_classes, presence_labels


def unit(features: np.ndarray) -> np.ndarray:
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def separable() -> tuple[np.ndarray, np.ndarray]:
    """(40, 8) features and (40, 3) labels: a class is present where its coordinate is high."""
    rng = np.random.default_rng(0)
    labels = np.where(rng.random((40, 3)) < 0.4, PRESENT, ABSENT).astype(np.int8)
    features = rng.normal(0, 0.05, (40, 8))
    features[:, :3] += labels
    features[:, 7] = 1
    return unit(features), labels


def test_separable_classes_have_an_ap_of_one(separable):
    features, labels = separable
    results = evaluate_classes(features[:24], labels[:24], features[24:], labels[24:], ["a", "b", "c"])
    assert list(results) == ["a", "b", "c"]
    for c, result in enumerate(results.values()):
        assert result.ap == result.cross_validation_ap == 1
        assert result.cost == probes.COSTS[0]  # the smallest of equals
        assert result.test_share == pytest.approx((labels[24:, c] == PRESENT).mean())


def test_ap_and_difficult_images_by_hand():
    """Test images are ranked by their first coordinate: present, absent, present, absent have an AP of (1/1 + 2/3) / 2.

    Between them lie two difficult images, which would change it, whether they counted as present or as absent.
    """
    angles = np.linspace(0.1, 1.4, 6)
    test = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    labels = np.array([PRESENT, DIFFICULT, ABSENT, DIFFICULT, PRESENT, ABSENT], dtype=np.int8)
    train = unit(np.array([[1, 0], [1, 0.1], [1, 0.2], [0.2, 1], [0.1, 1], [0, 1]]))
    train_labels = np.array([1, 1, 1, ABSENT, ABSENT, DIFFICULT], dtype=np.int8)
    result = evaluate_class(train, train_labels, test, labels)
    assert result.ap == pytest.approx((1 + 2 / 3) / 2)
    assert (result.train_share, result.test_share) == (0.5, 0.5)


def test_the_cost_is_the_one_of_the_highest_ap_in_cross_validation(monkeypatch):
    """By accuracy all costs here are equal; by AP the largest is best (found by trying each one alone)."""
    rng = np.random.default_rng(3)
    labels = np.where(np.arange(60) < 18, PRESENT, ABSENT).astype(np.int8)
    order = rng.permutation(60)
    features = rng.normal(0, 1, (60, 6))
    features[:, 0] *= 6  # large, and says nothing
    features[:, 1] += 0.8 * labels
    features, labels = unit(features)[order], labels[order]
    single = {}
    for cost in probes.COSTS:
        with monkeypatch.context() as m:
            m.setattr(probes, "COSTS", (cost,))
            single[cost] = evaluate_class(features, labels, features, labels).cross_validation_ap
    chosen = evaluate_class(features, labels, features, labels)
    assert len(set(single.values())) > 1
    assert (chosen.cost, chosen.cross_validation_ap) == max(single.items(), key=lambda item: item[1])


def test_classes_that_cannot_be_learned_or_tested_are_left_out(separable, caplog):
    features, labels = separable
    labels = labels.copy()
    labels[2:24, 0] = ABSENT
    labels[24:, 1] = DIFFICULT
    labels[:2, 0] = PRESENT
    with caplog.at_level("WARNING"):
        results = evaluate_classes(features[:24], labels[:24], features[24:], labels[24:], ["a", "b", "c"])
    assert list(results) == ["c"]
    assert "a: 2 training images have it and 22 do not" in caplog.text and "b: no test image has it" in caplog.text
    with pytest.raises(ValueError, match="no class can be learned and tested:\n  a: 2 training"):
        evaluate_classes(features[:24], labels[:24, :1], features[24:], labels[24:, :1], ["a"])


# ------------------------------------------------------------------------------------------------------- labels


def test_difficult_objects_are_read_from_vocs_files(tmp_path, catalog):
    objects = {
        "1": [("cat", 0), ("cat", 1), ("dog", 1)],
        "2": [("dog", 1), ("dog", 1)],
        "3": [],
    }
    (tmp_path / "Annotations").mkdir()
    for image_id, listed in objects.items():
        box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        nodes = (f"<object><name>{n}</name><difficult>{d}</difficult>{box}</object>" for n, d in listed)
        (tmp_path / "Annotations" / f"{image_id}.xml").write_text(f"<annotation>{''.join(nodes)}</annotation>")
    MetadataCatalog.get("tiny_voc").set(dirname=str(tmp_path))
    labels = presence_labels([{"image_id": i} for i in objects], "tiny_voc", ["cat", "dog", "cow"])
    MetadataCatalog.remove("tiny_voc")
    assert labels.tolist() == [
        [PRESENT, DIFFICULT, ABSENT],
        [ABSENT, DIFFICULT, ABSENT],
        [ABSENT, ABSENT, ABSENT],
    ]


def test_presence_by_annotations_and_by_folders():
    boxes = [{"category_id": 1, "iscrowd": 1}, {"category_id": 1}]
    dicts = [{"annotations": boxes}, {"annotations": []}, {"label": 0}]
    assert presence_labels(dicts, "any", ["a", "b"]).tolist() == [[-1, 1], [-1, -1], [1, -1]]
    with pytest.raises(ValueError, match=r'"any" has no class labels and no objects: x\.jpg'):
        presence_labels([{"file_name": "x.jpg"}], "any", ["a", "b"])


# -------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def stripes(tmp_path):
    """folders:PATH of images of horizontal and of vertical stripes, which random features tell apart."""
    y, x = np.mgrid[:32, :40]
    for split in ("train", "test"):
        for name, position in {"horizontal": y, "vertical": x}.items():
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(6):
                pixels = (((position + i) // 4 % 2) * 200).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return [f"folders:{tmp_path / split}" for split in ("train", "test")]


def test_command(load_tool, stripes, tmp_path, capsys, catalog):
    train, test = stripes
    record = tmp_path / "svm.json"
    sizes = ["INPUT.CLASSIFICATION.TEST_SHORT_SIDE", "32", "INPUT.CLASSIFICATION.CROP_SIZE", "32"]
    options = ["--train", train, "--test", test, "--weights", "random", "--depth", "18", "--output", str(record)]
    load_tool("evaluate").main(["svm", *options, *sizes])
    content = json.loads(record.read_text())
    assert content["task"] == "linear SVM" and (content["trained_on"], content["dataset"]) == (train, test)
    assert content["metrics"]["mAP"] == 100 and content["metrics"]["mAP_by_chance"] == 50
    assert (content["num_train_images"], content["num_images"]) == (12, 12)
    assert content["weights"] is None and content["seed"] == 0 and content["wall_time_s"] > 0
    assert content["costs"].keys() == {"horizontal", "vertical"}
    table = capsys.readouterr().out
    assert "vertical" in table and "mean of 2" in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "voc_2012_trianval"], '--train names "voc_2012_trianval".*did you mean voc_2012_trainval'),
        (["--train", "voc_2007_trainval"], '--train names "voc_2007_trainval", but there is no .*Annotations'),
        (["--weights", "none.pth"], "none.pth: no such file"),
        (["MODEL.RESNET.DEPTH", "18"], r"\n 1. MODEL.RESNET.DEPTH .*did you mean MODEL.RESNETS.DEPTH"),
    ],
)
def test_what_cannot_be_used_is_named(load_tool, stripes, catalog, options, message):
    usual = ["--train", stripes[0], "--test", stripes[1], "--weights", "random"]
    with pytest.raises(SystemExit, match=f"error: (?s:.*){message}"):
        load_tool("evaluate").main(["svm", *usual, *options])


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    for module in [m for m in sys.modules if m == "sklearn" or m.startswith("sklearn.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"d2_objssl\[probes\]"):
        probes.import_sklearn()
