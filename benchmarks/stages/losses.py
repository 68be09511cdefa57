"""Time and memory of the losses, and how they grow with the batch; DetCon's and SlotCon's against their published form.

The published form of DetCon has one-hot labels and masks over all regions of all images, (N, M, G, M) floats; SlotCon's
gathers all K slots of all images and takes the active ones afterwards. The others are computed as published.

    N  images of a process    G  images of all processes    M  regions of an image    K  prototypes    D  dimension
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d2_objssl.modeling.methods.cyborgs import vmf_loss
from d2_objssl.modeling.methods.detcon import detcon_nce
from d2_objssl.modeling.methods.semcl import paired_info_nce
from d2_objssl.modeling.methods.slotcon import compact_slot_nce, grouping_loss

from .timing import Measurement, Row, peak_memory, repeat_in_turns

SUMMARY = "losses, forward and backward: time and memory"
_DIM, _REGIONS = 256, 16
_CELLS = 49  # of a view of 224 pixels on res5
_FUSED_CHANNELS, _CLUSTERS, _KAPPA = 3584, 256, 10.0  # CYBORGS: res3, res4 and res5; the most clusters; Eq. 4
_ACTIVE = 7  # slots of an image that are active, of K: what SlotCon reports for COCO
_BIG = -1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this stage."""
    parser.add_argument(
        "--batch-sizes", type=int, nargs="*", default=[64, 128, 256], help="N = G (default: %(default)s)"
    )
    text = "G images of all processes, with 64 of them here; our form only (default: %(default)s)"
    parser.add_argument("--global-sizes", type=int, nargs="*", default=[512, 1024, 4096], help=text)
    parser.add_argument(
        "--prototypes", type=int, nargs="*", default=[256, 2048, 16384], help="K (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> Measurement:
    """Measure both forms where both fit into memory, and ours beyond."""
    if args.quick:
        args.batch_sizes, args.global_sizes, args.prototypes = args.batch_sizes[:2], [512], args.prototypes[:2]
    rows, details = [], []
    for n in args.batch_sizes:
        inputs = make_regions(n, n, args.seed)
        pair = {"plain": partial(published_detcon, **inputs), "ours": partial(detcon_nce, *inputs.values())}
        rows += compare(f"DetCon loss, {n} images x {_REGIONS} regions", pair, inputs, args, details)
    for g in args.global_sizes:
        inputs = make_regions(min(64, g), g, args.seed)
        details.append(measure(f"DetCon loss, 64 of {g} images", partial(detcon_nce, *inputs.values()), inputs, args))
        inputs = make_compact_slots(min(64, g), g, args.seed)
        name = f"SlotCon slot loss, 64 of {g} images"
        details.append(measure(name, partial(compact_slot_nce, **inputs, temp=0.2), inputs, args))
    for k in args.prototypes:
        inputs = make_slots(32, k, args.seed)
        pair = {"plain": partial(published_slots, **inputs), "ours": partial(gathered_slots, **inputs)}
        rows += compare(f"SlotCon slot loss, 32 images, K = {k}", pair, inputs, args, details)
    for n in args.batch_sizes:
        for name, (loss, inputs) in make_local_losses(n, args.seed).items():
            details.append(measure(f"{name}, {n} images", loss, inputs, args))
    for entry in details:
        print(f"{entry['name']:52s} {entry['ms']:10.1f} ms {entry['peak_mb']:10.1f} MB")
    return Measurement(rows, {"losses": details})


def compare(
    name: str,
    contestants: dict[str, Callable[[], Tensor]],
    inputs: dict[str, Tensor],
    args: argparse.Namespace,
    details: list[dict[str, Any]],
) -> list[Row]:
    """Rows for time and memory; appends to `details`. The values of both forms must be equal."""
    values = {k: f().item() for k, f in contestants.items()}
    if abs(values["plain"] - values["ours"]) > 1e-3 * abs(values["plain"]):
        raise ValueError(f"{name}: {values} differ")
    runs = repeat_in_turns(
        {k: partial(_time, f, inputs) for k, f in contestants.items()}, min(args.repeats, 3), args.seed
    )
    ms = {k: statistics.median(v) for k, v in runs.items()}
    mb = {k: _peak(f, inputs) for k, f in contestants.items()}
    details += [{"name": f"{name}, {k}", "ms": ms[k], "peak_mb": mb[k]} for k in contestants]
    return [
        Row(name, ms["plain"], ms["ours"], unit="ms CPU"),
        Row(name, mb["plain"], mb["ours"], unit="MB at the peak"),
    ]


def measure(
    name: str, loss: Callable[[], Tensor], inputs: dict[str, Tensor], args: argparse.Namespace
) -> dict[str, Any]:
    """Median time and peak memory of one form."""
    times = [_time(loss, inputs) for _ in range(min(args.repeats, 3))]
    return {"name": f"{name}, ours", "ms": statistics.median(times), "peak_mb": _peak(loss, inputs)}


def _time(loss: Callable[[], Tensor], inputs: dict[str, Tensor]) -> float:
    """CPU time of forward and backward, ms."""
    _free_gradients(inputs)
    start = time.process_time()
    loss().backward()
    return 1e3 * (time.process_time() - start)


def _peak(loss: Callable[[], Tensor], inputs: dict[str, Tensor]) -> float:
    """Peak memory of forward and backward, MB, the gradient of the inputs included."""
    _free_gradients(inputs)
    return peak_memory(partial(_time, loss, inputs))


def _free_gradients(inputs: dict[str, Tensor]) -> None:
    for x in inputs.values():
        x.grad = None


def make_regions(n: int, g: int, seed: int) -> dict[str, Tensor]:
    """Random arguments of `detcon_nce`; predictions take a gradient."""
    generator = torch.Generator().manual_seed(seed)
    latents = {f"pred{i}": torch.randn(n, _REGIONS, _DIM, generator=generator, requires_grad=True) for i in (1, 2)}
    latents |= {f"target{i}": torch.randn(g, _REGIONS, _DIM, generator=generator) for i in (1, 2)}
    names = ("pred_ids1", "pred_ids2", "target_ids1", "target_ids2")
    return latents | {name: torch.randint(0, 20, (n, _REGIONS), generator=generator) for name in names}


def published_detcon(pred1: Tensor, pred2: Tensor, target1: Tensor, target2: Tensor, **ids: Tensor) -> Tensor:
    """DetCon's loss as in the pseudocode of its paper: one-hot labels, and masks as large as the logits."""
    n, temp = len(pred1), 0.1
    pred1, pred2, target1, target2 = (F.normalize(x, dim=2) for x in (pred1, pred2, target1, target2))
    images = F.one_hot(torch.arange(n), n).float()

    def same(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, :, None] == b[:, None, :]).float()[:, :, None, :]

    def mask(a: str, b: str) -> Tensor:
        return images[:, None, :, None] * same(ids[a], ids[b])

    def logits(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("abk,uvk->abuv", a, b) / temp

    loss = pred1.new_zeros(())
    for pred, other, own, a, b in ((pred1, target2, target1, 1, 2), (pred2, target1, target2, 2, 1)):
        positives = mask(f"pred_ids{a}", f"target_ids{b}")
        own_logits = logits(pred, own) + _BIG * mask(f"pred_ids{a}", f"target_ids{a}")
        labels = torch.cat([positives, torch.zeros_like(positives)], dim=2).flatten(2)
        counts = labels.sum(dim=2)
        labels = labels / counts.clamp(min=1)[..., None]
        all_logits = torch.cat([logits(pred, other), own_logits], dim=2).flatten(2)
        entropy = -(labels * all_logits.log_softmax(dim=2)).sum(dim=2)
        repeats = same(ids[f"pred_ids{a}"], ids[f"pred_ids{a}"]).sum(dim=(2, 3))
        loss = loss + (entropy * (counts > 0).float() / repeats).mean()
    return loss


def make_compact_slots(n: int, g: int, seed: int) -> dict[str, Tensor]:
    """Arguments of `compact_slot_nce`: the active slots of n images here, of g in all processes."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(n * _ACTIVE, _DIM, generator=generator, requires_grad=True)
    keys = torch.randn(g * _ACTIVE, _DIM, generator=generator)
    return {"queries": queries, "keys": keys, "labels": torch.arange(n * _ACTIVE)}


def make_local_losses(n: int, seed: int) -> dict[str, tuple[Callable[[], Tensor], dict[str, Tensor]]]:
    """The losses that need no other process: name -> loss and what it is computed from, on n images."""
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, requires_grad=True)

    dots = {"student": rows(n * _CELLS, 256), "teacher": rows(n * _CELLS, 256).detach()}
    latents = {"anchor": rows(n, 2, _DIM), "not_anchor": rows(n, 2, _DIM)}
    keys = [rows(n, 2, _DIM).detach() for _ in range(2)]
    cells = {name: rows(n * _CELLS, _FUSED_CHANNELS) for name in ("view1", "view2")}
    centroids = [F.normalize(rows(_CLUSTERS, _FUSED_CHANNELS).detach(), dim=1) for _ in range(2)]
    labels = [torch.randint(0, _CLUSTERS, (n * _CELLS,), generator=generator) for _ in range(2)]
    return {
        "SlotCon grouping loss, a direction": (
            partial(grouping_loss, *dots.values(), torch.zeros(1, 256), 0.1, 0.07),
            dots,
        ),
        "SemCL paired loss": (partial(paired_info_nce, *latents.values(), *keys, 0.2), latents),
        "CYBORGS consistency loss, a direction": (
            partial(vmf_loss, *cells.values(), *centroids, *labels, _KAPPA),
            cells,
        ),
    }


def make_slots(n: int, k: int, seed: int) -> dict[str, Tensor]:
    """Slots of one view of n images, of which 7 each are active in both views."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.zeros(n, k, dtype=torch.bool)
    for row in active:
        row[torch.randperm(k, generator=generator)[:_ACTIVE]] = True
    queries = torch.randn(n, k, _DIM, generator=generator, requires_grad=True)
    return {"queries": queries, "keys": torch.randn(n, k, _DIM, generator=generator), "active": active}


def published_slots(queries: Tensor, keys: Tensor, active: Tensor) -> Tensor:
    """All slots are normalised and gathered; the active ones are chosen from the whole logits."""
    q, k = F.normalize(queries, dim=2).flatten(0, 1), F.normalize(keys, dim=2).flatten(0, 1)
    chosen = active.flatten()
    logits = q[chosen] @ k.T / 0.2
    labels = torch.arange(len(k))[chosen]
    return F.cross_entropy(logits.masked_fill(~chosen, _BIG), labels) * (2 * 0.2)


def gathered_slots(queries: Tensor, keys: Tensor, active: Tensor) -> Tensor:
    """Only active slots are gathered."""
    return compact_slot_nce(queries[active], keys[active], torch.arange(int(active.sum())), 0.2)
