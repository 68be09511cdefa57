"""From region maps to cells, from cells to vectors, and the drawing of regions."""

from __future__ import annotations

import oracles
import pytest
import torch
from torch import Tensor

from d2_objssl.modeling.region_pool import (
    RegionSampler,
    fuse_levels,
    masked_average_pool,
    overlapping_region_weights,
    region_weights,
    sample_cells,
    sample_regions,
)
from d2_objssl.structures import NO_REGION, Regions, ViewBatch

# ------------------------------------------------------------------------------------------------ levels


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


# ------------------------------------------------------------------------------------------------ regions of cells


def random_map(side: int, low: int, high: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (2, side, side), generator=generator, dtype=torch.int16)


@pytest.mark.parametrize(
    ("side", "stride", "num_ids", "high"),
    [(12, 4, 5, 7), (12, 3, 300, 302), (11, 4, 3, 3), (8, 8, 4, 4), (6, 1, 3, 5), (12, 4, 1, 2)],
)
def test_region_weights(side: int, stride: int, num_ids: int, high: int) -> None:
    """Also with ids out of range, cells at the border that are cut off, and more ids than pixels."""
    maps = random_map(side, NO_REGION, high)
    maps[0, :stride, :stride] = NO_REGION
    weights = region_weights(maps, stride, num_ids)
    expected = torch.stack([oracles.region_weights(m, stride, num_ids) for m in maps])
    assert not expected[0, :, 0, 0].any() and expected.any()
    assert weights.dtype == torch.float32
    assert torch.equal(weights, expected)


@pytest.mark.parametrize("ids", [[1, 2, 3, 0], [3, 3, 2, 2], [2, NO_REGION, 1, NO_REGION], [9, 9, 9, 3]])
def test_tie_goes_to_the_lowest_id(ids: list[int]) -> None:
    maps = torch.tensor(ids).view(1, 2, 2)
    known = [i for i in ids if 0 <= i < 4]
    assert region_weights(maps, 2, 4).flatten().nonzero().item() == min(known)


@pytest.mark.gpu
def test_region_weights_on_the_gpu() -> None:
    maps = random_map(96, NO_REGION, 40)
    assert torch.equal(region_weights(maps.cuda(), 4, 256).cpu(), region_weights(maps, 4, 256))


@pytest.mark.parametrize(("side", "stride"), [(8, 4), (7, 4), (5, 1)])
def test_overlapping_region_weights(side: int, stride: int) -> None:
    bits = torch.randint(0, 2**16, (2, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    weights = overlapping_region_weights(bits, stride)
    cells = -(-side // stride)
    assert weights.shape == (2, 16, cells, cells)
    for b in range(2):
        for i in range(cells):
            for j in range(cells):
                pixels = bits[b, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride].flatten().tolist()
                expected = [sum(p >> r & 1 for p in pixels) / len(pixels) for r in range(16)]
                assert weights[b, :, i, j].tolist() == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------------------------------------ pooling


def test_masked_average_pool() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 4, 2, 3, generator=generator, dtype=torch.float64)
    weights[0, 1] = 0
    pooled = masked_average_pool(features, weights)
    torch.testing.assert_close(pooled, oracles.masked_average_pool(features, weights))
    assert not pooled[0, 1].any()
    assert torch.autograd.gradcheck(lambda x: masked_average_pool(x, weights), features)
    # Weights of any scale.
    torch.testing.assert_close(masked_average_pool(features, 1e-6 * weights), pooled)


def test_pooling_is_in_float32_under_autocast() -> None:
    features, weights = torch.rand(1, 2, 32, 32), torch.ones(1, 1, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = masked_average_pool(features, weights)
        of_half = masked_average_pool(features.bfloat16(), weights)
    assert pooled.dtype == of_half.dtype == torch.float32
    torch.testing.assert_close(pooled[0, 0], features.mean(dim=(2, 3))[0])
    torch.testing.assert_close(of_half[0, 0], features.bfloat16().float().mean(dim=(2, 3))[0])


def test_features_of_another_grid_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="grids"):
        masked_average_pool(torch.ones(1, 2, 4, 4), torch.ones(1, 1, 2, 2))


# ------------------------------------------------------------------------------------------------ drawing


def weights_of(*present: list[int], num_ids: int = 6) -> Tensor:
    """(N, num_ids, 2, 3) one-hot weights; image n has the ids `present[n]` in its first cells."""
    weights = torch.zeros(len(present), num_ids, 6)
    for b, ids in enumerate(present):
        for cell, i in enumerate(ids):
            weights[b, i, cell] = 1
    return weights.view(len(present), num_ids, 2, 3)


@pytest.mark.parametrize("replacement", [True, False])
def test_only_present_regions_are_drawn(replacement: bool) -> None:
    torch.manual_seed(0)
    present = [[0, 3, 5], [2], [1, 2, 3, 4, 0, 5]]
    weights = weights_of(*present)
    weights[0, 3, 1, 2] = 0.5  # a region of weight 1.5 in all
    regions = sample_regions(weights, 40, replacement)
    assert regions.ids.shape == (3, 40) and regions.weights.shape == (3, 40, 2, 3)
    for b, known in enumerate(present):
        assert set(regions.ids[b].tolist()) == set(known)
        for i, w in zip(regions.ids[b], regions.weights[b], strict=True):
            torch.testing.assert_close(w, weights[b, i] / weights[b, i].sum())


def test_drawing_with_replacement_is_uniform() -> None:
    """In particular not in proportion to the area."""
    torch.manual_seed(0)
    weights = weights_of([0, 2, 5])
    weights[0, 5, 1] = 1
    counts = sample_regions(weights, 30_000).ids[0].bincount(minlength=6) / 30_000
    torch.testing.assert_close(counts, torch.tensor([1, 0, 1, 0, 0, 1]) / 3, atol=0.015, rtol=0)


def test_drawing_without_replacement_repeats_as_late_as_possible() -> None:
    torch.manual_seed(0)
    firsts = set()
    for _ in range(20):
        ids = sample_regions(weights_of([0, 2, 5], [0, 1, 2, 3, 4, 5]), 5, replacement=False).ids.tolist()
        assert sorted(ids[0][:3]) == [0, 2, 5] and len(set(ids[1])) == 5
        assert len(set(ids[0][3:])) == 2
        firsts.add(ids[0][0])
    assert firsts == {0, 2, 5}


@pytest.mark.parametrize("replacement", [True, False])
def test_a_view_without_regions_is_one_region(replacement: bool) -> None:
    regions = sample_regions(weights_of([], [1]), 4, replacement)
    assert regions.ids.tolist() == [[6] * 4, [1] * 4]
    torch.testing.assert_close(regions.weights[0], torch.full((4, 2, 3), 1 / 6))


def test_sample_cells() -> None:
    torch.manual_seed(0)
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.0, 0.75, 0.0]]).view(1, 1, 2, 3).expand(1, 20_000, 2, 3)
    cells = sample_cells(Regions(ids=torch.zeros(1, 20_000, dtype=torch.int64), weights=weights))
    assert torch.equal(cells.weights.flatten(2).sum(dim=2), torch.ones(1, 20_000))
    assert set(cells.weights.unique().tolist()) == {0.0, 1.0}
    shares = cells.weights.mean(dim=1).flatten()
    torch.testing.assert_close(shares, torch.tensor([0, 0.25, 0, 0, 0.75, 0]), atol=0.015, rtol=0)


def view_of(region_maps: Tensor | None, overlapping: bool = False) -> ViewBatch:
    n = 2 if region_maps is None else len(region_maps)
    boxes = torch.zeros(n, 4)
    return ViewBatch(torch.zeros(n, 3, 8, 8), boxes, torch.zeros(n).bool(), region_maps, overlapping)


def test_sampler_draws_each_view_for_itself() -> None:
    torch.manual_seed(0)
    maps = random_map(8, 0, 9)
    sampler = RegionSampler(num_regions=16, max_region_ids=9, stride=2)
    first, second = sampler([view_of(maps), view_of(maps)])
    assert not torch.equal(first.ids, second.ids)
    assert first.weights.shape == (2, 16, 4, 4)
    cells = RegionSampler(num_regions=16, max_region_ids=9, stride=2, single_cells=True)([view_of(maps)])[0]
    assert torch.equal(cells.weights.flatten(2).sum(dim=2), torch.ones(2, 16))
    assert set(cells.weights.unique().tolist()) == {0.0, 1.0}


def test_sampler_of_overlapping_regions() -> None:
    bits = torch.full((1, 8, 8), 1 << 15, dtype=torch.int32)
    bits[:, :, :3] += 1  # region 0 covers the left cells and half of the next ones
    regions = RegionSampler(num_regions=32, max_region_ids=4, stride=2)([view_of(bits, overlapping=True)])[0]
    assert set(regions.ids[0].tolist()) == {0, 15}
    left = regions.weights[0, regions.ids[0] == 0][0]
    torch.testing.assert_close(left, torch.tensor([1, 0.5, 0, 0]).expand(4, 4) / 6)


def test_views_without_region_maps_name_the_key() -> None:
    with pytest.raises(ValueError, match=r"INPUT\.REGIONS\.SOURCE"):
        RegionSampler(num_regions=4, max_region_ids=4, stride=2)([view_of(None)])
