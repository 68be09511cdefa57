"""Prototypes as classes: counts, matching and scores by hand; images and labels move together; evaluate.py segmentation."""

import json

import cv2
import numpy as np
import pytest
import torch
from color_model import COLORS, ColorModel, write_color_images, write_slotcon
from detectron2.data import DatasetCatalog, MetadataCatalog
from tiny_detcon import tiny_detcon_cfg

from d2_objssl.data.center_crops import IGNORED_CLASS, CenterCrops
from d2_objssl.data.coco_stuff_27 import COARSE_CLASSES, fine_to_coarse, keep_listed_images
from d2_objssl.evaluation.unsupervised_segmentation import (
    UNMATCHED,
    confusion_histogram,
    match_majority,
    match_one_to_one,
    segment_dataset,
    segmentation_metrics,
)


def test_histogram_and_scores_by_hand():
    prediction = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 0], [1, 0, 2, 1]])
    classes = torch.tensor([[1, 1, 0, 255], [2, 2, 0, 1], [0, 2, 2, 3]], dtype=torch.uint8)
    histogram = confusion_histogram(prediction, classes, 3, 3).numpy()
    assert histogram.tolist() == [[0, 3, 1], [2, 0, 0], [1, 0, 3]]  # 255, and the label 3, do not count
    matched = match_one_to_one(histogram)
    assert matched.tolist() == [1, 0, 2]
    metrics, iou = segmentation_metrics(histogram, matched)
    assert iou == pytest.approx([100 * 2 / 3, 100 * 3 / 4, 100 * 3 / 5])
    assert metrics == pytest.approx({"mIoU": 100 * (2 / 3 + 3 / 4 + 3 / 5) / 3, "pAcc": 80})


def test_a_permuted_perfect_prediction_scores_100():
    classes = torch.from_numpy(np.random.default_rng(0).integers(0, 27, (4, 40, 40)))
    names = torch.randperm(27, generator=torch.Generator().manual_seed(0))
    histogram = confusion_histogram(names[classes], classes, 27, 27).numpy()
    matched = match_one_to_one(histogram)
    assert matched[names.numpy()].tolist() == list(range(27))
    assert segmentation_metrics(histogram, matched)[0] == {"mIoU": 100, "pAcc": 100}


def test_matching_is_the_best_of_all_not_greedy():
    """The greedy choice, prototype 0 to class 0, would leave 9 correct pixels."""
    histogram = np.array([[9, 8], [7, 0]])
    assert match_one_to_one(histogram).tolist() == [1, 0]
    assert segmentation_metrics(histogram, match_one_to_one(histogram))[0]["pAcc"] == pytest.approx(100 * 15 / 24)


def test_more_prototypes_than_classes():
    """The surplus prototype is wrong one-to-one, and right by majority; one without pixels has no class."""
    histogram = np.array([[6, 0], [4, 0], [0, 10], [0, 0]])
    matched, majority = match_one_to_one(histogram), match_majority(histogram)
    assert matched.tolist() == [0, UNMATCHED, 1, UNMATCHED] and majority.tolist() == [0, 0, 1, UNMATCHED]
    assert segmentation_metrics(histogram, matched)[0] == {"mIoU": 80, "pAcc": 80}
    assert segmentation_metrics(histogram, majority)[0] == {"mIoU": 100, "pAcc": 100}


def test_fewer_prototypes_than_classes_and_a_class_that_is_absent():
    """Class 1 has no prototype: IoU 0. The ground truth does not have class 2: it is left out of the mean."""
    histogram = np.array([[5, 3, 0], [0, 0, 0]])
    metrics, iou = segmentation_metrics(histogram, np.array([0, 2]))
    assert iou[:2] == pytest.approx([62.5, 0]) and np.isnan(iou[2])
    assert metrics == {"mIoU": 31.25, "pAcc": 62.5}


def test_labels_that_are_all_ignored_are_refused():
    with pytest.raises(ValueError, match="no pixel that counts"):
        segmentation_metrics(np.zeros((2, 2), np.int64), np.array([0, 1]))


def test_the_27_classes_partition_the_182_labels():
    table = fine_to_coarse()
    assert list(table) == list(range(182)) and sorted(set(table.values())) == list(range(27))
    names = list(COARSE_CLASSES)
    # COCO's category id - 1: person, car, dog, sky-other, wall-brick, water-other.
    expected = {0: "person", 2: "vehicle", 17: "animal", 156: "sky", 170: "wall", 177: "water"}
    assert {label: names[table[label]] for label in expected} == expected
    with pytest.raises(ValueError, match='label 1 belongs to "a" and to "b"'):
        fine_to_coarse({"a": (0, 1), "b": (1,)})
    with pytest.raises(ValueError, match='label 182 of the class "a"'):
        fine_to_coarse({"a": (182,)})


def test_only_listed_images_are_kept(tmp_path):
    dicts = [{"file_name": f"/images/{i:03d}.jpg"} for i in range(4)]
    listed = tmp_path / "list.txt"
    listed.write_text("003\n001\n")
    assert keep_listed_images(dicts, str(listed)) == [dicts[1], dicts[3]]
    listed.write_text("003\n009\n")
    with pytest.raises(ValueError, match=r"list.txt names 1 images .*: 009"):
        keep_listed_images(dicts, str(listed))


@pytest.mark.parametrize("size", [(48, 72), (75, 50), (150, 200)])
@pytest.mark.parametrize("axis", [0, 1])
def test_labels_move_with_the_image(tmp_path, size, axis):
    """Stripes, dark where the label is 0: edges of the resized, blended image lie where those of the labels do."""
    widths = np.random.default_rng(0).integers(4, 12, 60)
    stripe = np.repeat(np.arange(60) % 2, widths)[: size[axis]]
    labels = np.broadcast_to(stripe if axis else stripe[:, None], size).astype(np.uint8)
    files = {"file_name": str(tmp_path / "image.png"), "sem_seg_file_name": str(tmp_path / "labels.png")}
    cv2.imwrite(files["file_name"], np.repeat(200 * labels[..., None], 3, axis=2))
    cv2.imwrite(files["sem_seg_file_name"], labels)
    item = CenterCrops([files], short_side=96, crop_size=80, class_of_label={0: 0, 1: 1})[0]
    assert item["image"].shape == (3, 80, 80) and item["classes"].shape == (80, 80)
    brightness, classes = item["image"][0].int() - 100, item["classes"]
    clear = brightness.abs() > 20
    assert clear.float().mean() > 0.9 and torch.equal(brightness[clear] > 0, classes[clear] == 1)
    assert 0.2 < classes.float().mean() < 0.8


def test_an_unknown_label_is_named(tmp_path):
    dicts = write_color_images(tmp_path, 1)
    with pytest.raises(ValueError, match=r"0_labels.png has the label 3"):
        CenterCrops(dicts, short_side=48, crop_size=48, class_of_label={0: 0, 1: 1, 2: 2})[0]
    with pytest.raises(ValueError, match="crop of 64 pixels does not fit into a short side of 48"):
        CenterCrops(dicts, short_side=48, crop_size=64)


def test_colors_are_found_exactly(tmp_path):
    """Features that are colours, prototypes that are the colours in another order: the labels come back."""
    dataset = CenterCrops(
        write_color_images(tmp_path), short_side=48, crop_size=48, class_of_label={0: 0, 1: 1, 2: 2, 3: IGNORED_CLASS}
    )
    model = ColorModel(COLORS[[2, 0, 3, 1]])
    found = segment_dataset(model, dataset, 3, num_samples=2, batch_size=2)
    assert match_one_to_one(found.histogram).tolist() == [2, 0, UNMATCHED, 1]
    metrics, _ = segmentation_metrics(found.histogram, match_one_to_one(found.histogram))
    assert metrics == {"mIoU": 100, "pAcc": 100}
    # The crop cuts 12 pixels off either side, and with them the frame of 8 pixels that does not count.
    assert found.histogram.sum() == 5 * 48 * 48
    # First and last image.
    assert len(found.images) == 2
    for image, prediction, index in zip(found.images, found.predictions, (0, 4), strict=True):
        assert np.array_equal(model.prototypes.numpy()[prediction] + 128, image)
        assert np.array_equal(image, dataset[index]["image"].permute(1, 2, 0).numpy())


@pytest.fixture
def tool(load_tool):
    return load_tool("evaluate")


@pytest.fixture
def color_dataset(tmp_path, catalog):
    """A registered data set whose label 3 is merged into class 0."""
    dicts = write_color_images(tmp_path)
    DatasetCatalog.register("colors", lambda: dicts)
    merged = {0: 0, 1: 1, 2: 1, 3: 0}
    MetadataCatalog.get("colors").set(stuff_classes=["a", "b"], fine_to_coarse=merged, num_curated_images=2)
    return dicts


def test_segmentation_of_a_checkpoint(tool, tmp_path, color_dataset, capsys, caplog):
    """The config comes from the checkpoint; merged labels, the list of images, record and picture."""
    weights = write_slotcon(tmp_path / "model.pth", num_prototypes=2)
    (tmp_path / "list.txt").write_text("0\n1\n4\n")
    options = [
        "--short-side",
        "48",
        "--crop-size",
        "48",
        "--image-list",
        str(tmp_path / "list.txt"),
        "--batch-size",
        "2",
    ]
    files = ["--output", str(tmp_path / "record.json"), "--picture", str(tmp_path / "sheet.png")]
    tool.main(["segmentation", "--dataset", "colors", "--weights", weights, *options, *files, "--picture-side", "64"])
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["num_images"] == 3 and record["num_prototypes"] == 2 and record["seed"] is None
    assert (record["image_list"], record["limit"], record["overrides"]) == ("list.txt", None, [])
    assert record["weights"]["file"] == "model.pth" and len(record["iou_per_class"]) == 2
    assert 50 <= record["metrics"]["pAcc"] <= record["metrics"]["majority/pAcc"] <= 100
    assert f"mIoU {record['metrics']['mIoU']:.2f}" in capsys.readouterr().out
    assert "colors: 3 images, but published numbers are of 2" in caplog.text
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert sheet.shape[1] > 3 * 64 and sheet.shape[0] > 3 * (64 + 20)


def test_what_cannot_be_segmented_is_explained(tool, tmp_path, color_dataset):
    def refused(message: str, *arguments: str) -> None:
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            tool.main(["segmentation", *arguments])

    refused("is not in the DatasetCatalog", "--dataset", "colours")
    refused('"scenes_tiny_val" has no semantic label maps', "--dataset", "scenes_tiny_val")
    refused("give --weights", "--dataset", "colors", "--crop-size", "48", "--short-side", "48")
    config = tmp_path / "detcon.yaml"
    config.write_text(tiny_detcon_cfg().dump())
    refused("DetConB has no prototypes", "--dataset", "colors", "--config-file", str(config))
