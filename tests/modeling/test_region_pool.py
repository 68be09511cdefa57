"""Feature maps of several levels on one grid."""

import pytest
import torch

from d2_objssl.modeling.region_pool import fuse_levels


def test_one_level_stays_as_it_is() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert fuse_levels([x]) is x


def test_finer_levels_are_averaged() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, c, s, s, generator=generator, dtype=torch.float64) for c, s in ((2, 12), (3, 6), (4, 3))]
    fused = fuse_levels(levels)
    assert fused.shape == (2, 2 + 3 + 4, 3, 3)
    for b in range(2):
        for i in range(3):
            for j in range(3):
                expected = []
                for x in levels:
                    step = x.shape[-1] // 3
                    for c in range(x.shape[1]):
                        block = [float(x[b, c, i * step + a, j * step + d]) for a in range(step) for d in range(step)]
                        expected.append(sum(block) / len(block))
                assert fused[b, :, i, j].tolist() == pytest.approx(expected, abs=1e-12)


def test_coarser_levels_are_repeated() -> None:
    fine, coarse = torch.randn(1, 2, 6, 6), torch.randn(1, 3, 3, 3)
    fused = fuse_levels([fine, coarse], size=(6, 6))
    assert torch.equal(fused[:, :2], fine)
    for i in range(6):
        for j in range(6):
            assert torch.equal(fused[:, 2:, i, j], coarse[:, :, i // 2, j // 2])
    assert fuse_levels([fine, coarse]).shape == (1, 5, 3, 3)


def test_grids_of_images_that_no_stride_divides() -> None:
    """Strides 16 and 32 of a 100 x 70 image round up: 7 x 5 and 4 x 3 cells."""
    fused = fuse_levels([torch.ones(1, 2, 7, 5), torch.ones(1, 2, 4, 3)])
    torch.testing.assert_close(fused, torch.ones(1, 4, 4, 3))


def test_gradients_reach_every_level() -> None:
    levels = [torch.randn(1, 2, s, s, requires_grad=True) for s in (6, 3, 1)]
    gradients = torch.autograd.grad(fuse_levels(levels, size=(3, 3)).sum(), levels)
    assert [g.sum().item() for g in gradients] == pytest.approx([18, 18, 18])
