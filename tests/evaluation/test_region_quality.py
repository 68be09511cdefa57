"""Average best overlap: against naive loops, on label maps, bit sets and small maps."""

import copy
import math
from typing import Any

import cv2
import numpy as np
import pytest
from detectron2.structures import BoxMode
from pycocotools import mask as coco_mask

from d2_objssl.data.region_maps import GlobalRegions, GridRegions, SelectiveSearchRegions
from d2_objssl.evaluation.region_quality import (
    RegionQuality,
    best_overlaps,
    count_regions,
    evaluate_sources,
    instance_masks,
)
from d2_objssl.proposals import masks_to_bits
from d2_objssl.structures import NO_REGION


def random_masks(num: int, height: int = 12, width: int = 15, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((num, height, width)) < 0.3


def naive_best_overlaps(regions: list[np.ndarray], gt_masks: np.ndarray) -> list[float]:
    """Figure 7 of DetCon: "the IoU between each ground-truth mask and the closest pretraining mask"."""
    best = []
    for mask in gt_masks:
        ious = [0.0]
        for region in regions:
            union = sum(bool(a or b) for a, b in zip(mask.ravel(), region.ravel(), strict=True))
            intersection = sum(bool(a and b) for a, b in zip(mask.ravel(), region.ravel(), strict=True))
            ious.append(intersection / union if union else 0.0)
        best.append(max(ious))
    return best


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
def test_best_overlaps_of_a_label_map(dtype):
    # Ids with gaps, and pixels of no region, which cover nothing.
    region_map = np.random.default_rng(1).choice([NO_REGION, 0, 3, 4, 250], (12, 15)).astype(dtype)
    gt_masks = random_masks(6)
    gt_masks[0] = region_map == 4
    gt_masks[1] = region_map == NO_REGION
    expected = naive_best_overlaps([region_map == i for i in (0, 3, 4, 250)], gt_masks)
    overlaps = best_overlaps(region_map, gt_masks)
    assert np.allclose(overlaps, expected) and overlaps.dtype == np.float64
    assert overlaps[0] == 1 and overlaps[1] == 0 and 0 < overlaps[2:].min() < overlaps[2:].max() < 1
    assert count_regions(region_map) == 4


@pytest.mark.parametrize("num_regions", [1, 5, 16])
def test_best_overlaps_of_a_bit_set(num_regions):
    regions = random_masks(num_regions, seed=1)
    gt_masks = np.concatenate([random_masks(4), regions[-1:]])
    bits = masks_to_bits(regions)
    overlaps = best_overlaps(bits, gt_masks, overlapping=True)
    assert np.allclose(overlaps, naive_best_overlaps(list(regions), gt_masks))
    assert overlaps[-1] == 1
    assert count_regions(bits, overlapping=True) == num_regions


def test_an_empty_bit_of_a_bit_set_is_no_region():
    regions = random_masks(3, seed=1)
    regions[1] = False
    assert count_regions(masks_to_bits(regions), overlapping=True) == 2


@pytest.mark.parametrize("overlapping", [False, True])
def test_maps_without_regions_and_images_without_instances(overlapping):
    nothing = np.full((12, 15), 0 if overlapping else NO_REGION, np.int32)
    assert best_overlaps(nothing, random_masks(2), overlapping=overlapping).tolist() == [0, 0]
    assert count_regions(nothing, overlapping=overlapping) == 0
    assert best_overlaps(np.ones((12, 15), np.int32), random_masks(0), overlapping=overlapping).shape == (0,)


def test_a_small_map_is_enlarged_by_nearest():
    small = np.arange(6, dtype=np.int32).reshape(2, 3)
    gt_masks = random_masks(3)
    large = small.repeat(6, axis=0).repeat(5, axis=1)
    assert np.array_equal(best_overlaps(small, gt_masks), best_overlaps(large, gt_masks))


def test_quality_is_the_mean_over_instances_not_images():
    quality, other = RegionQuality(), RegionQuality()
    left, right = np.zeros((2, 4, 4), bool)
    left[:, :2], right[:, 2:] = True, True
    halves = right.astype(np.int32)
    quality.update(halves, np.stack([left, right, left]))  # 1, 1, 1
    other.update(np.zeros((4, 4), np.int32), left[None])  # 0.5
    other.update(halves, np.zeros((0, 4, 4), bool))
    other.update(masks_to_bits([left, right, left]), (~left & ~right)[None] | np.eye(4, dtype=bool), overlapping=True)
    quality.merge(other)
    result = quality.summarize()
    diagonal = 2 / 10  # two of its four pixels lie in a half of eight
    assert result["abo"] == pytest.approx((3 + 0.5 + diagonal) / 5)
    assert result["abo_per_image"] == pytest.approx((1 + 0.5 + diagonal) / 3)
    assert result["recall_at_50"] == pytest.approx(4 / 5)
    assert result["regions_per_image"] == pytest.approx((2 + 1 + 2 + 3) / 4)
    assert result["num_instances"] == 5 and result["num_images"] == 4


def test_quality_without_instances_is_not_a_number():
    quality = RegionQuality()
    quality.update(np.zeros((4, 4), np.int32), np.zeros((0, 4, 4), bool))
    result = quality.summarize()
    assert all(math.isnan(result[k]) for k in ("abo", "abo_per_image", "recall_at_50"))
    assert result["regions_per_image"] == 1 and result["num_instances"] == 0 and result["num_images"] == 1


def rle(mask: np.ndarray, compressed: bool) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    if compressed:
        return encoded
    changes = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel(), [0]]).astype(int)))
    counts = np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()
    return {"size": list(mask.shape), "counts": counts}


def labelled_image(tmp_path, height: int = 40, width: int = 50) -> dict[str, Any]:
    """A picture of one bright rectangle, and annotations of every kind that all say where it is."""
    mask = np.zeros((height, width), bool)
    mask[10:30, 5:25] = True
    image = np.where(mask[..., None], 220, 40).astype(np.uint8).repeat(3, axis=2)
    file = str(tmp_path / "image.png")
    cv2.imwrite(file, image)
    segmentations: list[Any] = [
        [[5.0, 10.0, 25.0, 10.0, 25.0, 30.0, 5.0, 30.0]],
        rle(mask, True),
        rle(mask, False),
        mask,
    ]
    annotations: list[dict[str, Any]] = [{"segmentation": s, "iscrowd": 0} for s in segmentations]
    box = {"bbox": [5.0, 10.0, 20.0, 20.0], "bbox_mode": BoxMode.XYWH_ABS}
    annotations += [box, {"segmentation": rle(~mask, True), "iscrowd": 1}, {"segmentation": rle(mask & ~mask, True)}]
    return {"file_name": file, "height": height, "width": width, "annotations": annotations, "image_id": 0}


def test_instance_masks_of_every_kind_of_annotation(tmp_path):
    """Crowds, objects without a pixel and those without a shape are left out."""
    d = labelled_image(tmp_path)
    d["annotations"].append({"category_id": 3})
    before = copy.deepcopy(d["annotations"])
    masks = instance_masks(d)
    assert masks.shape == (5, 40, 50) and masks.dtype == bool
    assert all(np.argwhere(m).min(axis=0).tolist() == [10, 5] and m.sum() == 400 for m in masks)
    assert str(d["annotations"]) == str(before)
    assert instance_masks({**d, "annotations": []}).shape == (0, 40, 50)
    assert instance_masks({k: v for k, v in d.items() if k != "annotations"}).shape == (0, 40, 50)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_sources_are_measured_on_a_data_set(tmp_path, num_workers):
    d = labelled_image(tmp_path)
    without = {**d, "annotations": []}
    sources = {"global": GlobalRegions(), "grid": GridRegions(2), "boxes": SelectiveSearchRegions(4)}
    result = evaluate_sources([d, without, d], sources, num_workers=num_workers)
    assert list(result) == list(sources)
    assert all(r["num_images"] == 3 and r["num_instances"] == 10 for r in result.values())
    assert result["global"]["abo"] == pytest.approx(400 / 2000)
    assert result["grid"]["regions_per_image"] == 4
    assert result["boxes"]["abo"] > 0.8 and result["boxes"]["regions_per_image"] <= 4
    assert all(0 < r["seconds_per_image"] < 60 for r in result.values())


def test_annotations_of_another_size_are_refused(tmp_path):
    d = labelled_image(tmp_path)
    turned = {**d, "height": 50, "width": 40, "annotations": d["annotations"][:1]}
    with pytest.raises(ValueError, match=r"image\.png.*50 x 40.*40 x 50"):
        evaluate_sources([turned], {"global": GlobalRegions()})


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="no image"):
        evaluate_sources([], {"global": GlobalRegions()})
