"""Batches of which a method can learn little or nothing: losses and gradients stay finite, and are 0 where nothing is left."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from tiny_cyborgs import cyborgs_cfg
from tiny_detcon import DETCON_S, tiny_detcon, tiny_region_batch
from tiny_semcl import semcl_batch, semcl_model
from tiny_slotcon import SIDE, tiny_batch, tiny_model

from d2_objssl.modeling import ObjectSSL
from d2_objssl.structures import NO_REGION

NARROW: list[Any] = ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8]
NARROW += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.WIDTH_PER_GROUP", 4]
NOTHING = torch.full((SIDE, SIDE), NO_REGION, dtype=torch.int16)
Batch = list[dict[str, Any]]


def _cyborgs() -> ObjectSSL:
    torch.manual_seed(0)
    cfg = cyborgs_cfg(Path(), Path(), "MODEL.SSL.PROJECTOR.NORM", "BN", "MODEL.SSL.PREDICTOR.NORM", "BN")
    return build_model(cfg).train()


@cache
def model_of(name: str) -> ObjectSSL:
    models: dict[str, Callable[[], ObjectSSL]] = {
        "SlotCon": lambda: tiny_model(*NARROW),
        "SlotCon, projection": lambda: tiny_model(*NARROW, "MODEL.SSL.SLOTCON.ALIGN", "projection"),
        "SlotCon, regression": lambda: tiny_model(*NARROW, "MODEL.SSL.SLOTCON.SLOT_LOSS", "regression"),
        "SlotCon, image loss": lambda: tiny_model(*NARROW, "MODEL.SSL.SLOTCON.IMAGE_LOSS_WEIGHT", 0.5),
        "DetConB": lambda: tiny_detcon(*NARROW),
        "DetConS": lambda: tiny_detcon(*NARROW, *DETCON_S),
        "CYBORGS": _cyborgs,
        "CYBORGS, warm-up": _cyborgs,
        "SemCL": semcl_model,
        "SemCL, unpaired": lambda: semcl_model("MODEL.SSL.SEMCL.LOSS", "unpaired"),
    }
    model = models[name]()
    if name.startswith("CYBORGS"):
        model.criterion.set_phase(warmup="warm-up" in name, consistency=True)
    return model


def batch_for(name: str, n: int) -> Batch:
    if name.startswith("SemCL"):
        return semcl_batch(n)
    return tiny_batch(n) if name.startswith("SlotCon") else tiny_region_batch(n)


def losses_and_gradients(model: ObjectSSL, batch: Batch) -> tuple[dict[str, float], float]:
    """The losses, all finite, and the largest absolute gradient, which is finite, too."""
    model.zero_grad()
    losses = model(batch)
    assert all(loss.isfinite() for loss in losses.values()), losses
    sum(losses.values()).backward()
    gradients = {k: p.grad.abs().max() for k, p in model.named_parameters() if p.grad is not None}
    assert gradients and all(g.isfinite() for g in gradients.values()), gradients
    assert all(b.isfinite().all() for b in model.criterion.buffers())
    return {k: v.item() for k, v in losses.items()}, max(g.item() for g in gradients.values())


METHODS = ["SlotCon", "SlotCon, projection", "SlotCon, regression", "SlotCon, image loss", "DetConB", "DetConS"]
METHODS += ["CYBORGS", "CYBORGS, warm-up", "SemCL", "SemCL, unpaired"]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", ["one image", "images of one colour"])
def test_degenerate_images(name: str, case: str) -> None:
    """Cells that are all alike make one cluster, one slot, equal logits and features without spread."""
    batch = batch_for(name, 1 if case == "one image" else 2)
    if case == "images of one colour":
        for view in (v for image in batch for v in image["views"]):
            view["image"] = torch.full_like(view["image"], 128)
    losses_and_gradients(model_of(name), batch)


@pytest.mark.parametrize("name", [m for m in METHODS if m.startswith("SlotCon")])
@pytest.mark.parametrize("first_overlaps", [False, True])
def test_views_that_do_not_meet(name: str, first_overlaps: bool) -> None:
    """Of all images, or of all but one."""
    batch = tiny_batch(3, overlap=False)
    if first_overlaps:
        batch[0] = tiny_batch(1)[0]
    losses, largest = losses_and_gradients(model_of(name), batch)
    assert (losses["loss_group"] > 0) == first_overlaps
    if name == "SlotCon, projection" and not first_overlaps:  # there are no slots either
        assert set(losses.values()) == {0.0} and largest == 0


@pytest.mark.parametrize("name", ["DetConB", "DetConS", "CYBORGS"])
@pytest.mark.parametrize(
    ("missing", "is_missing"),
    [
        ("all", lambda image, view: True),
        ("one image", lambda image, view: image == 0),
        ("one view of each image", lambda image, view: view == 0),
    ],
)
def test_region_maps_without_any_region(name: str, missing: str, is_missing: Callable[[int, int], bool]) -> None:
    """A view without regions counts as one region, which is no positive of the regions of the other view."""
    batch = tiny_region_batch(3)
    for i, image in enumerate(batch):
        for v, view in enumerate(image["views"]):
            if is_missing(i, v):
                view["region_map"] = NOTHING
    losses, _ = losses_and_gradients(model_of(name), batch)
    assert (losses["loss_detcon"] > 0) == (missing != "one view of each image")


@pytest.mark.parametrize("name", ["DetConB", "DetConS"])
def test_regions_of_which_none_is_in_both_views(name: str) -> None:
    """Nothing is to be learnt, so nothing is changed."""
    batch = tiny_region_batch(2)
    for image in batch:
        image["views"][1]["region_map"] = image["views"][1]["region_map"] + 4
    losses, largest = losses_and_gradients(model_of(name), batch)
    assert losses == {"loss_detcon": 0.0} and largest == 0
