"""The meta-architecture: its weights' names, what it does to its inputs, and what it gives back."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny_slotcon import SIDE, tiny_batch, tiny_cfg, tiny_model
from torch import Tensor

from d2_objssl.data import collate_views
from d2_objssl.modeling import ObjectSSL

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@pytest.fixture(scope="module")
def initial() -> ObjectSSL:
    """Copy it before changing it."""
    return tiny_model()


def test_state_dict_keys_are_frozen(initial: ObjectSSL) -> None:
    """Checkpoints of earlier versions must go on loading."""
    keys = set(initial.state_dict())
    prefixes = ("student.backbone.", "student.embedder.", "teacher.backbone.", "teacher.embedder.", "criterion.")
    assert all(k.startswith(prefixes) for k in keys)
    assert {k for k in keys if k.startswith("teacher.")} == {
        k.replace("student.", "teacher.", 1) for k in keys if k.startswith("student.")
    }
    head = [f"layers.fc{i}.{p}" for i in (1, 2, 3) for p in ("weight", "bias")]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    head += [f"layers.norm{i}.{p}" for i in (1, 2) for p in norm]
    assert {k for k in keys if k.startswith("criterion.")} == {
        "criterion.center", "criterion.images_since_active", *(f"criterion.predictor.{k}" for k in head),
    }  # fmt: skip
    assert {k for k in keys if k.startswith("student.embedder.")} == {
        "student.embedder.prototypes", *(f"student.embedder.projector.{k}" for k in head),
    }  # fmt: skip
    backbone = {k.removeprefix("student.backbone.") for k in keys if k.startswith("student.backbone.")}
    assert len(backbone) == 120  # 20 convolutions of ResNet-18, and the 5 tensors of their norms each
    assert {
        "stem.conv1.weight", "stem.conv1.norm.running_mean", "res2.0.conv1.weight", "res3.0.shortcut.weight",
        "res3.0.shortcut.norm.bias", "res5.1.conv2.norm.running_var",
    } <= backbone  # fmt: skip


def test_image_loss_adds_heads() -> None:
    model = tiny_model("MODEL.SSL.SLOTCON.IMAGE_LOSS_WEIGHT", 1.0)
    for key in ("student.embedder.image_projector.layers.fc2.weight", "criterion.image_predictor.layers.fc2.bias"):
        assert key in model.state_dict()


def test_teacher_starts_as_the_student(initial: ObjectSSL) -> None:
    assert initial.teacher is not None
    student, teacher = initial.student.state_dict(), initial.teacher.state_dict()
    assert list(student) == list(teacher)
    for name, value in student.items():
        assert torch.equal(value, teacher[name]), name
        assert value.data_ptr() != teacher[name].data_ptr(), f"{name} is shared"
    assert not any(p.requires_grad for p in initial.teacher.parameters())
    assert all(p.requires_grad for p in initial.student.parameters())


def test_teacher_gets_no_gradient(initial: ObjectSSL) -> None:
    model = copy.deepcopy(initial)
    sum(model(tiny_batch(2)).values()).backward()
    assert model.teacher is not None
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(p.grad is not None for p in model.student.parameters())


def test_without_teacher() -> None:
    model = tiny_model("MODEL.SSL.TEACHER.ENABLED", False, "MODEL.SSL.EXPORT_BRANCH", "student")
    assert model.teacher is None
    assert not any(k.startswith("teacher.") for k in model.state_dict())
    losses = model(tiny_batch(2))
    assert all(loss.isfinite() for loss in losses.values())


# ------------------------------------------------------------------------------------------------ inputs


def test_images_are_normalised_exactly(initial: ObjectSSL) -> None:
    batch = tiny_batch(1)
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(3, 1, 1)
    for view in batch[0]["views"]:
        view["image"] = values
    views = collate_views(batch).views
    processed = initial.preprocess_views(views)
    mean, std = (np.array(x, dtype=np.float32)[:, None, None] for x in (MEAN, STD))
    expected = (values.numpy().astype(np.float32) - mean) / std
    for before, after in zip(views, processed, strict=True):
        assert after.images.dtype == torch.float32
        assert after.images.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(after.images[0].numpy(), expected)
        assert torch.equal(after.crop_boxes, before.crop_boxes) and torch.equal(after.hflip, before.hflip)
        assert before.images.dtype == torch.uint8, "the batch was changed"


def test_lists_and_collated_batches_give_the_same_losses(initial: ObjectSSL) -> None:
    dicts = tiny_batch(3)
    losses = [copy.deepcopy(initial)(batch) for batch in (dicts, collate_views(dicts))]
    assert set(losses[0]) == {"loss_group", "loss_slot"}
    for name in losses[0]:
        assert losses[0][name].item() == losses[1][name].item(), name


def test_memory_layout_does_not_change_the_losses(initial: ObjectSSL) -> None:
    contiguous = tiny_model("MODEL.SSL.CHANNELS_LAST", False)
    model = copy.deepcopy(initial)
    assert model.student.backbone.stem.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert contiguous.student.backbone.stem.conv1.weight.is_contiguous()
    losses, expected = (m(tiny_batch(3)) for m in (model, contiguous))
    for name in expected:
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=1e-5), name


def test_batch_norm_sees_one_view_at_a_time(initial: ObjectSSL) -> None:
    model = copy.deepcopy(initial)
    batch = tiny_batch(3)
    mean, var = torch.zeros(64), torch.ones(64)
    for view in model.preprocess_views(collate_views(batch).views):
        with torch.no_grad():
            x = torch.nn.functional.conv2d(view.images, model.student.backbone.stem.conv1.weight, stride=2, padding=3)
        mean = 0.9 * mean + 0.1 * x.mean(dim=(0, 2, 3))
        var = 0.9 * var + 0.1 * x.var(dim=(0, 2, 3))
    model(batch)
    assert model.teacher is not None
    for branch in (model.student, model.teacher):
        norm = branch.backbone.stem.conv1.norm
        assert norm.num_batches_tracked == 2
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-4, atol=1e-5)
        assert branch.embedder.projector.layers.norm1.num_batches_tracked == 2


# ------------------------------------------------------------------------------------------------ inference


def make_images() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    square, wide = (
        torch.randint(0, 256, (3, *s), generator=generator, dtype=torch.uint8) for s in ((64, 64), (70, 100))
    )
    return [{"image": square}, {"image": wide}, {"image": wide, "height": 33, "width": 47}]


def test_inference_returns_region_maps(initial: ObjectSSL) -> None:
    model = copy.deepcopy(initial).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    results = model(make_images())
    assert [tuple(r["region_map"].shape) for r in results] == [(64, 64), (70, 100), (33, 47)]
    for result in results:
        assert set(result) == {"region_map"}
        assert result["region_map"].dtype == torch.int64
        assert result["region_map"].min() >= 0 and result["region_map"].max() < 8
        assert not result["region_map"].requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("align", ["assignment", "projection"])
@pytest.mark.parametrize("branch", ["student", "teacher"])
def test_region_ids_are_the_prototypes_of_the_exported_branch(branch: str, align: str) -> None:
    """Another order of its prototypes, and of them alone, renumbers the regions."""
    opts = ["MODEL.SSL.EXPORT_BRANCH", branch, "MODEL.SSL.SLOTCON.ALIGN", align]
    model = tiny_model(*opts).eval()
    image = make_images()[1:2]
    regions = model(image)[0]["region_map"]
    assert len(regions.unique()) > 1
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    other = "student" if branch == "teacher" else "teacher"
    getattr(model, other).embedder.prototypes.data.neg_()
    prototypes = getattr(model, branch).embedder.prototypes.data
    prototypes.copy_(prototypes[order].clone())
    assert torch.equal(order[model(image)[0]["region_map"]], regions)


# ------------------------------------------------------------------------------------------------ settings, logging


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.SSL.EXPORT_BRANCH", "both"], 'MODEL.SSL.EXPORT_BRANCH is "both"'),
        (["MODEL.SSL.TEACHER.ENABLED", False], "MODEL.SSL.EXPORT_BRANCH.*MODEL.SSL.TEACHER.ENABLED is False"),
        (["INPUT.SSL.NUM_VIEWS", 3], "INPUT.SSL.NUM_VIEWS is 3, but SlotCon works on 2 views"),
    ],
)
def test_settings_that_do_not_fit_are_refused(opts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(tiny_cfg(*opts))


class Recorder(EventStorage):
    """Keeps the pictures it is given."""

    def __init__(self, start_iter: int) -> None:
        super().__init__(start_iter)
        self.pictures: dict[str, Tensor] = {}

    def put_image(self, img_name: str, img_tensor: Tensor) -> None:
        self.pictures[img_name] = torch.as_tensor(img_tensor)


def test_metrics_and_pictures_are_logged() -> None:
    model = tiny_model("VIS_PERIOD", 19)
    names = {"active_slots", "positive_pairs", "dead_prototypes", "feature_std"}
    for iteration, logged, drawn in ((19, True, True), (20, False, False), (38, False, True)):
        with Recorder(iteration) as storage:
            model(tiny_batch(2))
        assert set(storage.latest()) == (names if logged else set())
        assert set(storage.pictures) == ({"views", "regions"} if drawn else set())
        for picture in storage.pictures.values():
            assert picture.shape[0] == 3 and min(picture.shape[1:]) >= SIDE


def test_unknown_method_is_named_with_its_key():
    with pytest.raises(ValueError, match=r'MODEL\.SSL\.METHOD is "Slotcon".*SlotCon'):
        tiny_model("MODEL.SSL.METHOD", "Slotcon")
