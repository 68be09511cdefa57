"""Score-CAM: a naive loop, a picture whose answer is known, Detectron2's backbones, and tools/visualize.py attention."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone.swin import SwinTransformer
from tiny_slotcon import REPO_ROOT, tiny_cfg
from torch import Tensor, nn

from d2_objssl.attention import attention_map, overlay_attention
from d2_objssl.checkpoint import checkpoint_metadata, write_checkpoint
from d2_objssl.engine import resolve_norms, setup_cfg

PRETRAIN = str(REPO_ROOT / "configs" / "quick" / "slotcon_R_18_scenes.yaml")
FINETUNE = str(REPO_ROOT / "configs" / "quick" / "mask_rcnn_R_18_FPN_scenes.yaml")
NARROW_R50 = ["MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8"]
NARROW_R50 += ["MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"]
MARGIN, CAPTION, GAP = 14, 20, 10  # of a contact sheet
SQUARE = (slice(8, 24), slice(40, 56))  # rows and columns of the bright square

needs_torchcam = pytest.mark.skipif(sys.version_info < (3, 11), reason="torchcam needs Python 3.11")


class SquareDetector(nn.Module):
    """Stride 8. Channel 0 is the brightness of a cell; channel 1 is 2 in the top left cell, whatever the image."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_sizes: list[int] = []

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.batch_sizes.append(len(images))
        bright = F.avg_pool2d(images.mean(dim=1, keepdim=True), 8)
        corner = torch.zeros_like(bright)
        corner[:, :, 0, 0] = 2.0
        return {"last": torch.cat([bright, corner], dim=1)}


class MeanColor(nn.Module):
    """Stride 8: the three colours of a cell."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"last": F.avg_pool2d(images, 8)}


class TinyConvNet(nn.Module):
    """Two convolutions of random weights, 6 channels at stride 4."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(8, 6, 3, stride=2, padding=1)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"first": self.layers[0](images), "last": self.layers(images)}


def image_with_square() -> Tensor:
    image = torch.zeros(3, 48, 64)
    image[:, SQUARE[0], SQUARE[1]] = 1.0
    return image


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def naive_score_cam(backbone: nn.Module, image: Tensor, temp: float) -> np.ndarray:
    """Score-CAM one channel after the other, as the module's docstring writes it."""
    feature_map = backbone(image[None])["last"][0]
    embedding = feature_map.mean(dim=(1, 2))
    scores = []
    for channel in feature_map:
        scaled = (channel - channel.min()) / (channel.max() - channel.min())
        mask = F.interpolate(scaled[None, None], size=image.shape[1:], mode="bilinear")[0, 0]
        masked = backbone((image * mask)[None])["last"][0].mean(dim=(1, 2))
        scores.append(float(masked @ embedding / masked.norm() / embedding.norm() / temp))
    weights = np.exp(scores) / np.exp(scores).sum()
    total = sum(w * channel.numpy() for w, channel in zip(weights, feature_map, strict=True))
    heat = np.maximum(total, 0)
    heat = (heat - heat.min()) / (heat.max() - heat.min())
    return cv2.resize(heat, image.shape[:0:-1], interpolation=cv2.INTER_LINEAR)


@needs_torchcam
def test_map_peaks_on_the_only_thing_that_the_feature_responds_to() -> None:
    """Not on the corner, where the activation is higher: the image cut down to it is not recognised."""
    heat = attention_map(SquareDetector().eval(), image_with_square(), feature="last")
    assert heat.shape == (48, 64) and heat.dtype == torch.float32
    row, column = divmod(int(heat.argmax()), 64)
    assert SQUARE[0].start <= row < SQUARE[0].stop and SQUARE[1].start <= column < SQUARE[1].stop
    outside = torch.ones(48, 64, dtype=torch.bool)
    outside[4:28, 36:60] = False  # the square and half a cell around it
    assert heat[outside].max() < 0.5 * heat[SQUARE].mean()


@needs_torchcam
@pytest.mark.parametrize("temp", [1.0, 0.2, 0.05])
def test_map_equals_a_naive_loop(temp: float) -> None:
    backbone = seeded(TinyConvNet)
    image = torch.randn(3, 20, 28, generator=torch.Generator().manual_seed(1))
    heat = attention_map(backbone, image, feature="last", temp=temp)
    with torch.no_grad():
        expected = naive_score_cam(backbone, image, temp)
    np.testing.assert_allclose(heat.numpy(), expected, atol=1e-5)


@needs_torchcam
def test_batch_size_bounds_the_memory_and_changes_nothing() -> None:
    image = image_with_square()
    heats = []
    for batch_size in (1, 2):
        backbone = SquareDetector().eval()
        heats.append(attention_map(backbone, image, feature="last", batch_size=batch_size))
        assert max(backbone.batch_sizes) == batch_size
        assert sum(backbone.batch_sizes) == 2 + 2  # channels, and the whole image twice
    assert torch.equal(*heats)


def narrow_resnet() -> nn.Module:
    return build_backbone(tiny_cfg(*NARROW_R50))


def tiny_swin() -> nn.Module:
    pytest.importorskip("timm", reason="Detectron2's Swin needs timm")
    return SwinTransformer(embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, out_indices=(0, 1))


@needs_torchcam
@pytest.mark.parametrize("build", [narrow_resnet, tiny_swin])
def test_backbones_of_detectron2_stay_as_they_are(build: Callable[[], nn.Module]) -> None:
    backbone = seeded(build)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    image = torch.randn(3, 50, 70, generator=torch.Generator().manual_seed(1))
    heat = attention_map(backbone, image, feature=list(backbone.output_shape())[-1], progress=True)
    assert heat.shape == (50, 70) and not heat.requires_grad
    assert heat.min() >= 0 and 0.5 < heat.max() <= 1
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())


@needs_torchcam
def test_uniform_image_has_no_attention() -> None:
    heat = attention_map(MeanColor().eval(), torch.ones(3, 16, 16), feature="last")
    assert torch.equal(heat, torch.zeros(16, 16))


def test_overlay_is_red_where_attention_is_and_blue_elsewhere() -> None:
    heat = np.zeros((3, 4))
    heat[0, 3] = 1.0
    image = np.full((30, 40, 3), 100, dtype=np.uint8)
    overlay = overlay_attention(image, heat)
    assert overlay.shape == image.shape and overlay.dtype == np.uint8
    red, blue = overlay[0, 39].astype(int), overlay[29, 0].astype(int)
    assert red[0] > red[2] + 50 and blue[2] > blue[0] + 50
    np.testing.assert_array_equal(overlay_attention(image, heat, alpha=0.0), image)


def test_missing_torchcam_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcam", None)
    with pytest.raises(ImportError, match=r'pip install "d2_objssl\[attention\]"'):
        attention_map(SquareDetector().eval(), image_with_square(), feature="last")


# ---------------------------------------------------------------------------------------------- tools/visualize.py


@pytest.fixture
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("visualize")


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    files = [str(tmp_path / f"photo_{i}.png") for i in range(2)]
    for file in files:
        cv2.imwrite(file, cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (160, 120)))
    return files


def save_untrained(path: Path, seed: int) -> str:
    torch.manual_seed(seed)
    cfg = resolve_norms(setup_cfg(PRETRAIN, NARROW_R50))
    path.parent.mkdir()
    write_checkpoint({"model": build_model(cfg).state_dict(), "d2_objssl": checkpoint_metadata(cfg)}, str(path))
    return str(path)


@needs_torchcam
def test_tool_draws_two_checkpoints_side_by_side(tool: ModuleType, photos: list[str], tmp_path: Path) -> None:
    """Checkpoints of pretraining, with the config of pretraining and with that of fine-tuning, which has an FPN."""
    weights = [save_untrained(tmp_path / name / "model_final.pth", seed) for seed, name in enumerate("ab")]
    sheets = []
    for config in (PRETRAIN, FINETUNE):
        output = str(tmp_path / "attention.png")
        args = ["attention", "--config-file", config, "--min-size", "96", "--weights", *weights]
        tool.main([*args, "--images", *photos, "--output", output, *NARROW_R50])
        sheets.append(cv2.imread(output))
    # A row for each image, 384 x 288: the image, and two maps over it.
    assert sheets[0].shape == (2 * MARGIN + 2 * (CAPTION + 288) + GAP, 2 * MARGIN + 3 * 384 + 2 * GAP, 3)
    np.testing.assert_array_equal(*sheets)
    row = sheets[0][MARGIN + CAPTION : MARGIN + CAPTION + 288].astype(int)
    image, first, second = (row[:, MARGIN + i * (384 + GAP) :][:, :384] for i in range(3))
    assert all(np.abs(x - y).mean() > 3 for x, y in ((image, first), (image, second), (first, second)))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--images", "missing.jpg", "--weights", "x.pkl"], "missing.jpg"),
        (["--images", "{photo}"], "no weights were given: name a checkpoint with --weights"),
        (["--images", "{photo}", "--weights", "x.pkl"], "x.pkl: no such file"),
    ],
)
def test_tool_says_what_is_wrong(tool: ModuleType, photos: list[str], args: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        tool.main(["attention", "--config-file", PRETRAIN, *(a.format(photo=photos[0]) for a in args)])
