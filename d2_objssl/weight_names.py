"""The one table of weight names: which layouts of a state dict exist, and how they become Detectron2's.

    layout        example of a key                            written by
    d2_objssl     teacher.backbone.res2.0.conv1.weight        pretraining with this package
    detectron2    backbone.bottom_up.res2.0.conv1.weight      Detectron2, convert_checkpoint (there without a prefix)
    torchvision   module.encoder_q.layer1.0.conv1.weight      torchvision, timm, mmdetection, MoCo, official SlotCon, ...
    sequential    backbone.4.0.conv1.weight                   nn.Sequential of torchvision's layers: lightly, some BYOLs
    timm          layers.1.downsample.reduction.weight        timm, Swin Transformers alone (weight_names_swin.py)
    swin          layers.0.downsample.reduction.weight        Microsoft's Swin Transformers (weight_names_swin.py)
    haiku         params/block_group_0/block_0/conv_0/w       DetCon and BYOL in JAX (weight_names_haiku.py)

A layout names the weights of a network; weight_projects.py knows the prefixes in front of it, by project.
"Bare names" are those of `detectron2.modeling.build_resnet_backbone`, without a prefix: `stem.conv1.weight`,
`stem.conv1.norm.weight`, `res2.0.conv1.weight`, `res2.0.shortcut.norm.running_mean`; or of Detectron2's Swin
Transformer: `patch_embed.proj.weight`, `layers.0.blocks.0.attn.qkv.weight`, `norm3.weight`.
Values (tensors or arrays) pass through untouched, but for haiku's: only names change.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from .weight_names_haiku import HAIKU_ROOTS, flatten_haiku, haiku_to_detectron2
from .weight_names_resnet import (
    NUM_BLOCKS,
    RESNET_ROOTS,
    infer_resnet,
    resnet_from_detectron2,
    resnet_to_detectron2,
)
from .weight_names_swin import is_swin, swin_from_detectron2, swin_prefixes, swin_to_detectron2
from .weight_projects import PROJECTS, Network, choose_network, left_out, shared_wrapper

__all__ = [
    "EXPORT_LAYOUTS",
    "LAYOUTS",
    "NUM_BLOCKS",
    "backbone_prefix",
    "detect_layout",
    "find_network",
    "from_detectron2",
    "infer_resnet",
    "left_out_names",
    "network_roots",
    "to_detectron2",
    "unwrap_state_dict",
]

LAYOUTS = ("d2_objssl", "detectron2", "torchvision", "sequential", "timm", "swin", "haiku")
EXPORT_LAYOUTS = ("torchvision", "timm", "mmdetection")

_ROOTS = RESNET_ROOTS | {"haiku": HAIKU_ROOTS}
# Entries of a checkpoint that hold its weights; and those that hold one branch each, which becomes a prefix.
_WEIGHT_ENTRIES = ("model", "state_dict", "model_state", "network", "net", "experiment_state")
_BRANCH_ENTRIES = {
    "student": "student.",  # DINO
    "teacher": "teacher.",
    "online_network_state_dict": "online_network.",  # BYOL of sthalles
    "target_network_state_dict": "target_network.",
}


def unwrap_state_dict(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Find the weights of a checkpoint: name -> tensor or array.

    Goes down entries like "model" or "state_dict", joins "student" and "teacher" (their names become prefixes), drops
    what is no tensor, and removes wrappers such as `module.` that all keys share. Nested dicts of haiku become one
    (`weight_names_haiku.flatten_haiku`). Where none of this is needed, `checkpoint` itself is returned.

    Raises:
        ValueError: if there are no weights.
    """
    state = checkpoint
    while True:
        inner = next((state[name] for name in _WEIGHT_ENTRIES if isinstance(state.get(name), Mapping)), None)
        if inner is None:
            break
        state = inner
    if entries := [name for name in _BRANCH_ENTRIES if isinstance(state.get(name), Mapping)]:
        state = {f"{_BRANCH_ENTRIES[e]}{k}": v for e in entries for k, v in unwrap_state_dict(state[e]).items()}
    if nested := flatten_haiku(state):
        return nested
    if not all(isinstance(name, str) and hasattr(value, "shape") for name, value in state.items()):
        state = {k: v for k, v in state.items() if isinstance(k, str) and hasattr(v, "shape")}
    if not state:
        found = ", ".join(map(str, list(checkpoint)[:10])) or "nothing"
        raise ValueError(f"there are no weights in this checkpoint; its entries: {found}")
    wrapper = shared_wrapper(state)
    return {name[len(wrapper) :]: value for name, value in state.items()} if wrapper else state


def detect_layout(state_dict: Mapping[str, Any]) -> str:
    """Tell the layout of a state dict (or of a whole checkpoint) by its keys.

    Returns:
        One of LAYOUTS; for ResNets of timm "torchvision".

    Raises:
        ValueError: if no layout fits.
    """
    state = unwrap_state_dict(state_dict)
    # Before "d2_objssl", because other methods, too, call a network "student.backbone".
    for layout in ("torchvision", "sequential", "timm", "swin"):
        if _prefixes(state, layout):
            return layout
    if any(name.startswith("student.backbone.") for name in state):
        return "d2_objssl"
    for layout in ("detectron2", "haiku"):
        if _prefixes(state, layout):
            return layout
    raise ValueError(
        f"unknown layout of weights; the first of {len(state)} keys: {', '.join(list(state)[:8])}. "
        f"Known layouts: {', '.join(LAYOUTS)} (of ResNets and Swin Transformers), behind any prefix; two networks in one "
        f"file: {', '.join(dict.fromkeys(row.name for row in PROJECTS))}"
    )


def to_detectron2(state_dict: Mapping[str, Any], layout: str = "auto", *, branch: str | None = None) -> dict[str, Any]:
    """Convert the backbone of a state dict to Detectron2's bare names.

    Keys outside of the backbone (classifier, projector, FPN, heads) are dropped; `num_batches_tracked` stays.

    Args:
        state_dict: name -> tensor or array; or a whole checkpoint as `load_checkpoint` returns it.
        layout: one of LAYOUTS, where "timm" fits all that timm ever wrote, or "auto": `detect_layout`.
        branch: "student" or "teacher", where the file holds both. None: the branch that the method is known for:
            what a checkpoint's own metadata says (MODEL.SSL.EXPORT_BRANCH: the teacher for SlotCon, the student for
            CYBORGS, DetCon-B and SemCL), without metadata the teacher if there is one; in other people's files what
            `weight_projects.PROJECTS` says: the teacher for SlotCon and DINO, the student for the others.

    Returns:
        Bare Detectron2 name -> the same value (haiku's convolutions: with the axes in PyTorch's order).

    Raises:
        ValueError: if layout or branch does not fit the keys, or a key of the backbone has no Detectron2 name.
    """
    state = unwrap_state_dict(state_dict)
    layout = _resolve_layout(state, layout)
    prefix = backbone_prefix(state_dict, layout, branch=branch)
    if layout == "haiku":
        return haiku_to_detectron2(state, prefix)
    bare = dict(_below(state, prefix))
    if layout == "d2_objssl":
        return dict(_below(bare, "bottom_up.")) or bare
    if prefix in swin_prefixes(state, layout):
        return swin_to_detectron2(bare, layout)
    if layout in ("torchvision", "sequential"):
        return resnet_to_detectron2(bare, layout)
    bare = {k: v for k, v in bare.items() if re.match(r"(stem|res[2-5])\.", k)}
    # C4 models keep the blocks of the last stage in their head.
    head = prefix.removesuffix("backbone.") + "roi_heads.res5."
    return bare | {f"res5.{name}": value for name, value in _below(state, head) if re.match(r"\d+\.", name)}


def backbone_prefix(state_dict: Mapping[str, Any], layout: str = "auto", *, branch: str | None = None) -> str:
    """What stands in front of the names of the network that `to_detectron2` takes, such as "encoder_q.".

    Arguments and exceptions: see there.
    """
    return find_network(state_dict, layout, branch=branch).prefix


def find_network(state_dict: Mapping[str, Any], layout: str = "auto", *, branch: str | None = None) -> Network:
    """The network that `to_detectron2` takes: its prefix, branch, and the project that writes such files.

    Arguments and exceptions: see there.
    """
    state = unwrap_state_dict(state_dict)
    layout = _resolve_layout(state, layout)
    if branch not in (None, "student", "teacher"):
        raise ValueError(f'branch is "{branch}"; it must be "student" or "teacher"')
    if layout == "d2_objssl":
        metadata = state_dict.get("d2_objssl") or {}
        return _own_network(state, branch, metadata.get("export_branch"), metadata.get("method"))
    candidates = _prefixes(state, layout)
    if not candidates:
        raise ValueError(f"these are no {layout} names; the first of {len(state)} keys: {', '.join(list(state)[:8])}")
    return choose_network(candidates, state, branch)


def left_out_names(
    state_dict: Mapping[str, Any], layout: str, *, branch: str | None = None
) -> tuple[dict[str, int], dict[str, int]]:
    """Count what `to_detectron2`, which has the same arguments, leaves out: known parts and others (`left_out`)."""
    state = unwrap_state_dict(state_dict)
    prefix = backbone_prefix(state_dict, layout, branch=branch)
    if layout == "haiku":  # its values are copied
        names = [name for name in state if not re.search(r"(^|/)(initial|block_group)_", name)]
    else:
        taken = {id(value) for value in to_detectron2(state_dict, layout, branch=branch).values()}
        names = [name for name, value in state.items() if id(value) not in taken]
    return left_out(names, prefix, [p for p in _prefixes(state, layout) if p != prefix])


def from_detectron2(state_dict: Mapping[str, Any], layout: str = "torchvision") -> dict[str, Any]:
    """Convert a backbone with Detectron2's names to another package's: the exact reverse of `to_detectron2`.

    Args:
        state_dict: name -> tensor or array, with bare names or behind any prefix.
        layout: one of EXPORT_LAYOUTS; of ResNets their names are the same.

    Raises:
        ValueError: if `layout` is another one, or a key has no name there (deformable convolutions, a changed stem).
    """
    if layout not in EXPORT_LAYOUTS:
        raise ValueError(f'layout is "{layout}"; from_detectron2 knows {", ".join(EXPORT_LAYOUTS)}')
    bare = to_detectron2(state_dict, "detectron2")
    if is_swin(bare) and layout != "mmdetection":
        return swin_from_detectron2(bare, layout)
    return resnet_from_detectron2(bare)


def network_roots(state_dict: Mapping[str, Any], layout: str) -> list[str]:
    """Names of the first convolution of every network of `layout` in a state dict.

    None for "d2_objssl"; of Swin Transformers only in Detectron2's layout, since Microsoft's stem has the same names.
    """
    roots = [prefix + _ROOTS[layout][0] for prefix in _resnet_prefixes(state_dict, layout)]
    if layout == "detectron2":
        roots += [f"{prefix}patch_embed.proj.weight" for prefix in swin_prefixes(state_dict, layout)]
    return roots


def _resolve_layout(state: Mapping[str, Any], layout: str) -> str:
    if layout == "auto":
        return detect_layout(state)
    if layout not in LAYOUTS:
        raise ValueError(f'layout is "{layout}"; it must be "auto" or one of {", ".join(LAYOUTS)}')
    if layout == "timm" and not swin_prefixes(state, "timm"):
        return "swin" if swin_prefixes(state, "swin") else "torchvision"  # before version 0.9; a ResNet
    return layout


def _prefixes(names: Collection[str], layout: str) -> list[str]:
    """Every prefix behind which a network of `layout` stands."""
    return _resnet_prefixes(names, layout) + swin_prefixes(names, layout)


def _resnet_prefixes(names: Collection[str], layout: str) -> list[str]:
    if layout not in _ROOTS:
        return []
    first, second = _ROOTS[layout]
    ends = (f".{first}", f"/{first}")
    candidates = (name.removesuffix(first) for name in names if name == first or name.endswith(ends))
    return [prefix for prefix in candidates if prefix + second in names]


def _own_network(names: Collection[str], branch: str | None, default: str | None, method: str | None) -> Network:
    """Choose the branch of a checkpoint of this package."""
    present = [b for b in ("student", "teacher") if any(name.startswith(f"{b}.backbone.") for name in names)]
    if not present:
        raise ValueError(f"these are no d2_objssl names; the first of {len(names)} keys: {', '.join(list(names)[:8])}")
    if branch is None:
        branch = default if default in present else present[-1]
    if branch not in present:
        raise ValueError(f"the {branch} is asked for, but the file only holds the {present[0]}")
    return Network(f"{branch}.backbone.", branch, f"{method} of this package" if method else "")


def _below(state: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """The entries behind `prefix`, without it."""
    return ((name[len(prefix) :], value) for name, value in state.items() if name.startswith(prefix))
