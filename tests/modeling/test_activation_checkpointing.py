"""MODEL.SSL.CHECKPOINT_ACTIVATIONS changes memory and time, nothing else."""

import pytest
import torch
from detectron2.modeling import build_backbone
from tiny_slotcon import tiny_batch, tiny_cfg, tiny_model
from tiny_swin import swin_cfg

from d2_objssl.modeling.activation_checkpointing import checkpoint_blocks
from d2_objssl.modeling.backbone import features_at

ON = ("MODEL.SSL.CHECKPOINT_ACTIVATIONS", True)


def step(model, batch):
    """Losses, gradients and buffers of a training step."""
    losses = model(batch)
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return {k: v.item() for k, v in losses.items()}, gradients, buffers


def test_steps_are_equal():
    plain, checkpointed = tiny_model(), tiny_model(*ON)
    assert list(checkpointed.state_dict()) == list(plain.state_dict())
    checkpointed.load_state_dict(plain.state_dict())
    for seed in range(2):
        results = [step(model, tiny_batch(seed=seed)) for model in (plain, checkpointed)]
        assert results[0][0] == results[1][0]
        for ours, expected in zip(results[1][1:], results[0][1:], strict=True):
            names = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in ours.items()}
            assert names.keys() == expected.keys()
            assert all(torch.equal(names[k], expected[k]) for k in expected)
        tracked = [
            b for name, b in checkpointed.named_buffers() if "num_batches" in name and "student.backbone" in name
        ]
        assert tracked and all(b.item() == 2 * (seed + 1) for b in tracked)  # one forward pass a view


def test_activations_of_blocks_are_not_kept():
    sizes = {}
    for on in (False, True):
        backbone = build_backbone(tiny_cfg()).train()
        if on:
            checkpoint_blocks(backbone)
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.setdefault(x.data_ptr(), x.untyped_storage()) and x, lambda x: x
        ):
            backbone(torch.rand(4, 3, 64, 64))
        parameters = {p.data_ptr() for p in backbone.parameters()}
        sizes[on] = sum(storage.nbytes() for address, storage in kept.items() if address not in parameters)
    assert sizes[True] < 0.6 * sizes[False]


def test_single_blocks_are_still_found():
    backbone = build_backbone(tiny_cfg()).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = features_at(backbone, image, "res3.1")
        checkpoint_blocks(backbone)
        assert torch.equal(features_at(backbone, image, "res3.1"), expected)


def test_a_backbone_without_residual_blocks_is_refused():
    with pytest.raises(ValueError, match="CHECKPOINT_ACTIVATIONS is True, but SwinBackbone"):
        checkpoint_blocks(build_backbone(swin_cfg()))
