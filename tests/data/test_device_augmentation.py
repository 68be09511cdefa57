"""device_augmentation.py: the same draws and, up to rounding, the same pixels as in the loader's workers."""

import cv2
import numpy as np
import pytest
import tiny_runs
import torch
import torchvision.transforms.functional as torchvision_functional
from PIL import Image

from d2_objssl.data import ObjSSLDatasetMapper, collate_views
from d2_objssl.data.augmentation import build_view_augmentations
from d2_objssl.data.color_transforms import (
    ColorJitterTransform,
    GaussianBlurTransform,
    GrayscaleTransform,
    SolarizeTransform,
)
from d2_objssl.data.device_augmentation import apply_colors, encode_colors, finish_colors
from d2_objssl.structures import ViewBatch


def photograph(side: int = 96, seed: int = 0) -> np.ndarray:
    """Smooth colours with some detail, (side, side, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = cv2.resize(rng.uniform(0, 255, (6, 6, 3)), (side, side), interpolation=cv2.INTER_CUBIC)
    return (coarse + rng.normal(0, 6, coarse.shape)).clip(0, 255).astype(np.uint8)


def on_device(image: np.ndarray, transforms: list) -> np.ndarray:
    images = torch.from_numpy(image).permute(2, 0, 1)[None]
    return apply_colors(images, encode_colors(transforms)[None])[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("transform", "mean_bound", "max_bound"),
    [
        (ColorJitterTransform([("brightness", 0.7)]), 0.01, 1),
        (ColorJitterTransform([("brightness", 1.4)]), 0.01, 1),
        (ColorJitterTransform([("contrast", 0.6)]), 0.05, 1),
        (ColorJitterTransform([("contrast", 1.4)]), 0.05, 1),
        (ColorJitterTransform([("saturation", 0.8)]), 0.05, 1),
        (ColorJitterTransform([("saturation", 1.2)]), 0.05, 1),
        (ColorJitterTransform([("hue", 0.1)]), 0.5, 8),
        (ColorJitterTransform([("hue", -0.07)]), 0.5, 8),
        (ColorJitterTransform([("hue", 0.0)]), 0.5, 8),
        (GrayscaleTransform(), 0.01, 1),
        (GaussianBlurTransform(0.3), 0.7, 2),
        (GaussianBlurTransform(1.3), 0.5, 4),
        (GaussianBlurTransform(2.0), 0.5, 4),
        (SolarizeTransform(), 0, 0),
    ],
)
def test_single_operations(transform, mean_bound, max_bound):
    image = photograph()
    expected = transform.apply_image(image).astype(float)
    difference = np.abs(on_device(image, [transform]) - expected)
    assert difference.mean() <= mean_bound and difference.max() <= max_bound
    assert np.abs(expected - image).max() > 3 or transform.operations == (("hue", 0.0),)


def test_chains_in_one_batch():
    """Images of one batch have their own chains; together with the one that keeps its colours."""
    np.random.seed(0)
    [augmentations] = build_view_augmentations(
        num_views=1, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter_prob=0.8, grayscale_prob=0.2,
        blur_probs=[0.5], blur_sigma=(0.1, 2.0), solarize_probs=[0.2],
    )  # fmt: skip
    images = [photograph(48, seed) for seed in range(24)]
    drawn = [[a.get_transform(image) for a in augmentations] for image in images[1:]]
    drawn.insert(0, [])
    colors = torch.stack([encode_colors(transforms) for transforms in drawn])
    assert len(colors.unique(dim=0)) > 20
    results = apply_colors(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), colors).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(results[0], images[0])
    for image, transforms, result in zip(images, drawn, results, strict=True):
        for transform in transforms:
            image = transform.apply_image(image)
        # An inversion at the threshold makes much of a rounding.
        solarized = any(isinstance(t, SolarizeTransform) for t in transforms)
        assert np.abs(image.astype(float) - result).mean() < (2.5 if solarized else 1.0)


def test_hue_is_that_of_pillow():
    image = photograph()
    for shift in (-0.1, 0.03, 0.5):
        expected = np.asarray(torchvision_functional.adjust_hue(Image.fromarray(image), shift)).astype(int)
        difference = np.abs(on_device(image, [ColorJitterTransform([("hue", shift)])]) - expected)
        assert difference.mean() < 0.02


def test_model_finishes_what_the_mapper_drew(tmp_path):
    """Crop, flip and chain of a sample do not depend on where its colours are changed; the batch says what is left."""
    photos = tiny_runs.write_photos(tmp_path / "photos", count=6)
    batches = {}
    for place in ("worker", "model"):
        cfg = tiny_runs.pretrain_cfg(photos, tmp_path, "INPUT.SSL.AUGMENT_DEVICE", place)
        mapper, dicts = ObjSSLDatasetMapper(cfg, True), []
        for i, path in enumerate(sorted(photos.iterdir())):
            np.random.seed(i)
            dicts.append(mapper({"file_name": str(path)}))
        batches[place] = collate_views(dicts)
    for by_worker, by_model in zip(batches["worker"].views, batches["model"].views, strict=True):
        assert by_worker.colors is None and by_model.colors.shape == (6, 11)
        assert torch.equal(by_model.crop_boxes, by_worker.crop_boxes) and torch.equal(by_model.hflip, by_worker.hflip)
        finished = finish_colors(by_model, torch.device("cpu"))
        assert finished.colors is None and finished.images.dtype == torch.uint8
        before = (by_model.images.int() - by_worker.images.int()).abs().float().mean()
        after = (finished.images.int() - by_worker.images.int()).abs().float().mean()
        assert after < 1.5 < 5 < before
        assert finish_colors(by_worker, torch.device("cpu")).images.equal(by_worker.images)


def test_a_run_with_colors_on_the_device_resumes_exactly(tmp_path):
    photos = tiny_runs.write_photos(tmp_path / "photos")
    opts = ("INPUT.SSL.AUGMENT_DEVICE", "model", "SOLVER.ACCUMULATION_STEPS", 2)
    whole = tiny_runs.train(tiny_runs.pretrain_cfg(photos, tmp_path / "whole", *opts))
    tiny_runs.train(tiny_runs.pretrain_cfg(photos, tmp_path / "killed", *opts), kill_before=5)
    resumed = tiny_runs.train(tiny_runs.pretrain_cfg(photos, tmp_path / "killed", *opts), resume=True)
    assert resumed and all(resumed[i] == whole[i] for i in resumed)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("INPUT.SSL.AUGMENT_DEVICE", "gpu"), 'AUGMENT_DEVICE is "gpu"'),
        (("INPUT.SSL.AUGMENT_DEVICE", "model", "INPUT.PAIRS.SOURCE", "sem_seg"), "INPUT.PAIRS.SOURCE"),
    ],
)
def test_what_does_not_go_is_named(tmp_path, opts, message):
    with pytest.raises(ValueError, match=message):
        ObjSSLDatasetMapper(tiny_runs.pretrain_cfg(tmp_path, tmp_path, *opts), True)


@pytest.mark.gpu
def test_on_the_gpu_as_on_the_cpu():
    """Float arithmetic of either device: a few values differ by a grey level."""
    colors = torch.stack([encode_colors([ColorJitterTransform([("hue", 0.1), ("contrast", 1.3)])])] * 2)
    images = torch.from_numpy(np.stack([photograph(64, seed) for seed in range(2)])).permute(0, 3, 1, 2)
    difference = apply_colors(images.cuda(), colors).cpu().int() - apply_colors(images, colors).int()
    assert difference.abs().float().mean() < 0.02


def test_autocast_of_training_leaves_the_colours_alone() -> None:
    """In half precision the blur failed: the pixels that it changes are float32."""
    images = torch.from_numpy(np.stack([photograph(32, seed) for seed in range(2)])).permute(0, 3, 1, 2)
    colors = torch.stack([encode_colors([GaussianBlurTransform(1.5)])] * 2)
    view = ViewBatch(images, torch.zeros(2, 4), torch.zeros(2, dtype=torch.bool), colors=colors)
    plain = finish_colors(view, torch.device("cpu")).images
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(finish_colors(view, torch.device("cpu")).images, plain)
