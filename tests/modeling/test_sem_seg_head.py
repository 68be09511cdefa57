"""FCN head: where cells lie, which pixels count; sliding windows against models whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_model
from torch import Tensor, nn

from d2_objssl import add_objssl_config
from d2_objssl.modeling.sem_seg_head import FCNHead, enlarge_cells
from d2_objssl.modeling.sliding_window import SlidingWindowSegmentor, window_starts


def make_cfg(*opts: Any) -> CfgNode:
    """FCN-16s on a narrow ResNet-50 with 5 classes."""
    cfg = get_cfg()
    add_objssl_config(cfg)
    model: list[Any] = ["MODEL.META_ARCHITECTURE", "SlidingWindowSegmentor", "MODEL.DEVICE", "cpu"]
    model += ["MODEL.BACKBONE.NAME", "build_objssl_resnet_backbone", "MODEL.BACKBONE.FREEZE_AT", 0]
    for key, value in {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 16, "WIDTH_PER_GROUP": 4, "NORM": "BN"}.items():
        model += [f"MODEL.RESNETS.{key}", value]
    model += ["MODEL.RESNETS.OUT_FEATURES", ["res5"], "MODEL.RESNETS.RES5_DILATION", 2]
    for key, value in {"NAME": "FCNHead", "IN_FEATURES": ["res5"], "COMMON_STRIDE": 16, "CONVS_DIM": 8}.items():
        model += [f"MODEL.SEM_SEG_HEAD.{key}", value]
    model += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5, "MODEL.SEM_SEG_HEAD.NORM", "BN", "MODEL.SEM_SEG_HEAD.DILATION", 6]
    cfg.merge_from_list([*model, *opts])
    return cfg


def head(**kwargs: Any) -> FCNHead:
    """A linear head of 5 classes on 4 channels of stride 8."""
    args = {"in_feature": "x", "num_classes": 5, "num_convs": 0, "conv_dim": 8}
    return FCNHead(ShapeSpec(channels=4, stride=8), **(args | kwargs))


# ----------------------------------------------------------------------------------------------------------- head


def test_the_centre_of_cell_i_is_pixel_i_times_the_stride() -> None:
    rows, columns = torch.arange(4.0)[:, None], torch.arange(3.0)[None]
    pixels = enlarge_cells((rows + 10 * columns)[None, None], stride=16)
    assert pixels.shape == (1, 1, 64, 48)
    y, x = (torch.arange(64.0) / 16).clamp(max=3)[:, None], (torch.arange(48.0) / 16).clamp(max=2)[None]
    torch.testing.assert_close(pixels[0, 0], y + 10 * x)


def test_linear_head_classifies_enlarged_features() -> None:
    """The probe as it is described: first the features are brought to the size of the image, then classified."""
    torch.manual_seed(0)
    model = head().eval()
    features = torch.randn(2, 4, 3, 5)
    scores, losses = model({"x": features})
    torch.testing.assert_close(scores, model.predictor(enlarge_cells(features, 8)))
    assert losses == {} and sum(p.numel() for p in model.parameters()) == 4 * 5 + 5


def test_the_loss_is_the_mean_over_labelled_pixels() -> None:
    torch.manual_seed(0)
    model = head(ignore_value=11, loss_weight=0.5)
    features = torch.randn(2, 4, 2, 3)
    labels = torch.randint(0, 5, (2, 13, 20))  # smaller than 16 x 24: the cells reach over the image
    labels[0, 5:] = 11
    _, losses = model({"x": features}, labels)
    scores = model.predictor(enlarge_cells(features, 8))
    values = [
        F.cross_entropy(scores[n, :, y, x], labels[n, y, x])
        for n, y, x in torch.cartesian_prod(*(torch.arange(s) for s in labels.shape)).tolist()
        if labels[n, y, x] != 11
    ]
    assert len(values) == 5 * 20 + 13 * 20
    torch.testing.assert_close(losses["loss_sem_seg"], 0.5 * torch.stack(values).mean())


def test_a_batch_without_labelled_pixels_has_no_loss_and_no_gradient() -> None:
    model = head(num_convs=1)
    _, losses = model({"x": torch.randn(2, 4, 2, 2)}, torch.full((2, 16, 16), 255))
    losses["loss_sem_seg"].backward()
    assert losses["loss_sem_seg"] == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_model_of_a_config() -> None:
    torch.manual_seed(0)
    model = build_model(make_cfg())
    convs = model.sem_seg_head.convs
    assert [(c.kernel_size, c.dilation, c.out_channels) for c in convs] == [((3, 3), (6, 6), 8)] * 2
    assert all(isinstance(c.norm, nn.BatchNorm2d) and c.bias is None for c in convs)
    image = torch.randint(0, 256, (3, 33, 50), dtype=torch.uint8)
    inputs = [{"image": image, "sem_seg": torch.randint(0, 5, (33, 50)), "height": 66, "width": 100}] * 2
    losses = model(inputs)
    losses["loss_sem_seg"].backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        assert model.eval()(inputs)[0]["sem_seg"].shape == (5, 66, 100)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.RESNETS.RES5_DILATION", 1], "COMMON_STRIDE is 16, but res5 .* has stride 32"),
        # Detectron2's own ResNet knows no RES4_DILATION.
        (
            ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.RES4_DILATION", 2]
            + ["MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 8],
            "COMMON_STRIDE is 8, but res5 of MODEL.BACKBONE.NAME build_resnet_backbone has stride 16",
        ),
        (["MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res4", "res5"]], "IN_FEATURES is .*takes one feature .*has res5"),
        (["TEST.SEM_SEG.WINDOW", 64], "WINDOW is 64 and STRIDE 0"),
        (["TEST.SEM_SEG.WINDOW", 64, "TEST.SEM_SEG.STRIDE", 65], "WINDOW is 64 and STRIDE 65"),
    ],
)
def test_settings_that_do_not_fit_are_refused(opts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(make_cfg(*opts))


# ------------------------------------------------------------------------------------------------- sliding windows


class PixelBackbone(Backbone):
    """Features are the pixels; or, with `window_means`, the mean of all pixels that the network sees."""

    def __init__(self, window_means: bool = False) -> None:
        super().__init__()
        self.window_means = window_means

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x.mean(dim=(2, 3), keepdim=True).expand_as(x) if self.window_means else x}


def segmentor(window: int, stride: int, *, window_means: bool = False) -> SlidingWindowSegmentor:
    """Its scores are the features, of 3 channels."""
    classifier = FCNHead(ShapeSpec(channels=3, stride=1), in_feature="x", num_classes=3, num_convs=0, conv_dim=1)
    nn.init.eye_(classifier.predictor.weight.data[:, :, 0, 0])
    model = SlidingWindowSegmentor(
        window=window,
        stride=stride,
        backbone=PixelBackbone(window_means),
        sem_seg_head=classifier,
        pixel_mean=[0.0, 0.0, 0.0],
        pixel_std=[1.0, 1.0, 1.0],
    )
    return model.eval()


@pytest.mark.parametrize(("window", "stride"), [(8, 5), (8, 8), (7, 1), (64, 32)])
@torch.no_grad()
def test_windows_do_not_matter_to_a_model_of_single_pixels(window: int, stride: int) -> None:
    x = {"image": torch.rand(3, 21, 30), "height": 42, "width": 45}
    whole, sliding = segmentor(0, 0)([x])[0]["sem_seg"], segmentor(window, stride)([x, x])[1]["sem_seg"]
    assert sliding.shape == (3, 42, 45)
    torch.testing.assert_close(sliding, whole)


@torch.no_grad()
def test_scores_of_overlapping_windows_are_averaged() -> None:
    """Windows of 4 with step 3 on 1 x 9 pixels, which are lower than they: pixels 0-3, 3-6 and 5-8."""
    row = torch.arange(9.0).expand(3, 1, 9)
    scores = segmentor(4, 3, window_means=True)([{"image": row}])[0]["sem_seg"]
    a, b, c = 1.5, 4.5, 6.5
    expected = [a, a, a, (a + b) / 2, b, (b + c) / 2, (b + c) / 2, c, c]
    torch.testing.assert_close(scores, torch.tensor(expected).expand(3, 1, 9))


def test_windows_cover_every_pixel_and_stay_inside() -> None:
    assert window_starts(1024, 769, 513) == [0, 255]
    assert window_starts(2048, 769, 513) == [0, 513, 1026, 1279]
    for size, window, stride in ((9, 4, 3), (10, 4, 3), (11, 4, 4), (12, 4, 4), (5, 5, 2), (3, 5, 2)):
        starts = window_starts(size, window, stride)
        covered = {p for s in starts for p in range(s, min(s + window, size))}
        assert covered == set(range(size)) and max(starts) + min(window, size) == size
        assert starts == sorted(set(starts))


@pytest.mark.parametrize("window", [0, 48])
def test_training_ignores_windows(window: int) -> None:
    model = build_model(make_cfg("TEST.SEM_SEG.WINDOW", window, "TEST.SEM_SEG.STRIDE", window))
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    losses = model([{"image": image, "sem_seg": torch.zeros(64, 64, dtype=torch.int64)}] * 2)
    assert set(losses) == {"loss_sem_seg"}
