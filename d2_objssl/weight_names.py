"""The one table of weight names: which layouts of a state dict exist, and how they become Detectron2's.

    layout        example of a key                            written by
    d2_objssl     teacher.backbone.res2.0.conv1.weight        pretraining with this package
    detectron2    backbone.bottom_up.res2.0.conv1.weight      Detectron2, convert_checkpoint (there without a prefix)
    torchvision   module.encoder_q.layer1.0.conv1.weight      torchvision, timm, MoCo, official SlotCon, ...
    timm          layers.1.downsample.reduction.weight        timm, Swin Transformers alone (weight_names_swin.py)
    swin          layers.0.downsample.reduction.weight        Microsoft's Swin Transformers (weight_names_swin.py)
    haiku         params/block_group_0/block_0/conv_0/w       DetCon and BYOL in JAX (weight_names_haiku.py)

"Bare names" are those of `detectron2.modeling.build_resnet_backbone`, without a prefix: `stem.conv1.weight`,
`stem.conv1.norm.weight`, `res2.0.conv1.weight`, `res2.0.shortcut.norm.running_mean`; or of Detectron2's Swin
Transformer: `patch_embed.proj.weight`, `layers.0.blocks.0.attn.qkv.weight`, `norm3.weight`.
Values (tensors or arrays) pass through untouched, but for haiku's: only names change.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from .weight_names_haiku import HAIKU_ROOTS, flatten_haiku, haiku_to_detectron2
from .weight_names_swin import is_swin, swin_from_detectron2, swin_prefixes, swin_to_detectron2

LAYOUTS = ("d2_objssl", "detectron2", "torchvision", "timm", "swin", "haiku")

# torchvision's module within the stem or a block -> Detectron2's.
_MODULES = {
    "conv1": "conv1",
    "bn1": "conv1.norm",
    "conv2": "conv2",
    "bn2": "conv2.norm",
    "conv3": "conv3",
    "bn3": "conv3.norm",
    "downsample.0": "shortcut",
    "downsample.1": "shortcut.norm",
}
_MODULES_REVERSED = {d2: tv for tv, d2 in _MODULES.items()}
_LEAF = r"(?P<leaf>weight|bias|running_mean|running_var|num_batches_tracked)"
_TORCHVISION_KEY = re.compile(
    rf"(?:layer(?P<layer>[1-4])\.(?P<block>\d+)\.)?(?P<module>(?:conv|bn)[1-3]|downsample\.[01])\.{_LEAF}"
)
_DETECTRON2_KEY = re.compile(
    rf"(?:stem(?=\.conv1\.)|res(?P<stage>[2-5])\.(?P<block>\d+))\.(?P<module>(?:conv[1-3]|shortcut)(?:\.norm)?)\.{_LEAF}"
)

# A ResNet in one of these layouts is found wherever both keys stand behind the same prefix.
_ROOTS = {
    "detectron2": ("stem.conv1.weight", "res2.0.conv1.weight"),
    "torchvision": ("conv1.weight", "layer1.0.conv1.weight"),
    "haiku": HAIKU_ROOTS,
}
# Entries of a checkpoint that hold its weights, and wrappers that put themselves in front of every key.
_WEIGHT_ENTRIES = ("model", "state_dict", "model_state", "network", "net")
_WRAPPERS = ("module.", "_orig_mod.", "model.")


class _Branches(NamedTuple):
    """Prefixes of the two networks of a pretraining method, and which of them it is known for."""

    student: str
    teacher: str
    default: str
    marker: str = ""  # a part of a key that tells the method from others with the same prefixes


# Asked from top to bottom where a file holds several networks.
_BRANCHES = (
    _Branches("encoder_q.", "encoder_k.", "teacher", marker="grouping_q."),  # SlotCon
    _Branches("encoder_q.", "encoder_k.", "student"),  # MoCo v1 and v2, DenseCL
    _Branches("base_encoder.", "momentum_encoder.", "student"),  # MoCo v3, SemCL
    _Branches("encoder.", "encoder_k.", "student"),  # PixPro
    _Branches("net.", "target_encoder.net.", "student"),  # BYOL as a wrapper of a network, CYBORGS
    _Branches("online_encoder.net.", "target_encoder.net.", "student"),
    _Branches("online_encoder.", "target_encoder.", "student"),
    _Branches("online_network.", "target_network.", "student"),  # BYOL
    _Branches("online_net.", "target_net.", "student"),
    _Branches("online_backbone.", "target_backbone.", "student"),
    _Branches("backbone.", "backbone_momentum.", "student"),  # lightly
    _Branches("student.backbone.", "teacher.backbone.", "teacher"),  # DINO
    _Branches("online_params/", "target_params/", "student"),  # DetCon and BYOL in JAX
)

# Depth of a ResNet -> blocks in res2, res3, res4 and res5; from 50 on they are bottlenecks.
NUM_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}


def unwrap_state_dict(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Find the weights of a checkpoint: name -> tensor or array.

    Goes down entries like "model" or "state_dict", drops what is no tensor, and removes wrappers such as `module.` that
    all keys share. Nested dicts of haiku become one (`weight_names_haiku.flatten_haiku`). Where none of this is needed,
    `checkpoint` itself is returned.

    Raises:
        ValueError: if there are no weights.
    """
    state = checkpoint
    while True:
        inner = next((state[name] for name in _WEIGHT_ENTRIES if isinstance(state.get(name), Mapping)), None)
        if inner is None:
            break
        state = inner
    if nested := flatten_haiku(state):
        return nested
    if not all(isinstance(name, str) and hasattr(value, "shape") for name, value in state.items()):
        state = {k: v for k, v in state.items() if isinstance(k, str) and hasattr(v, "shape")}
    if not state:
        found = ", ".join(map(str, list(checkpoint)[:10])) or "nothing"
        raise ValueError(f"there are no weights in this checkpoint; its entries: {found}")
    while wrapper := next((w for w in _WRAPPERS if all(name.startswith(w) for name in state)), ""):
        state = {name[len(wrapper) :]: value for name, value in state.items()}
    return state


def detect_layout(state_dict: Mapping[str, Any]) -> str:
    """Tell the layout of a state dict (or of a whole checkpoint) by its keys.

    Returns:
        One of LAYOUTS; for ResNets of timm "torchvision".

    Raises:
        ValueError: if no layout fits.
    """
    state = unwrap_state_dict(state_dict)
    # Before "d2_objssl", because other methods, too, call a network "student.backbone".
    for layout in ("torchvision", "timm", "swin"):
        if _prefixes(state, layout):
            return layout
    if any(name.startswith("student.backbone.") for name in state):
        return "d2_objssl"
    for layout in ("detectron2", "haiku"):
        if _prefixes(state, layout):
            return layout
    raise ValueError(
        f"unknown layout of weights; the first of {len(state)} keys: {', '.join(list(state)[:8])}. "
        f"Known layouts: {', '.join(LAYOUTS)} (of ResNets and Swin Transformers), behind any prefix"
    )


def to_detectron2(state_dict: Mapping[str, Any], layout: str = "auto", *, branch: str | None = None) -> dict[str, Any]:
    """Convert the backbone of a state dict to Detectron2's bare names.

    Keys outside of the backbone (classifier, projector, FPN, heads) are dropped; `num_batches_tracked` stays.

    Args:
        state_dict: name -> tensor or array; or a whole checkpoint as `load_checkpoint` returns it.
        layout: one of LAYOUTS, where "timm" fits all that timm ever wrote, or "auto": `detect_layout`.
        branch: "student" or "teacher", where the file holds both. None: the branch that the method is known for:
            what a checkpoint's own metadata says (MODEL.SSL.EXPORT_BRANCH: the teacher for SlotCon, the student for
            CYBORGS, DetCon-B and SemCL), without metadata the teacher if there is one; in other people's files the
            teacher for SlotCon (`encoder_k`), the student for MoCo (`encoder_q`, `base_encoder`) and the others, and
            for DetCon and BYOL in JAX (`online_params`).

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
    if layout == "torchvision":
        return {_from_torchvision(k): v for k, v in bare.items() if re.match(r"(conv1|bn1|layer\d+)\.", k)}
    bare = {k: v for k, v in bare.items() if re.match(r"(stem|res[2-5])\.", k)}
    # C4 models keep the last stage in their head.
    head = prefix.removesuffix("backbone.") + "roi_heads.res5."
    return bare | {f"res5.{name}": value for name, value in _below(state, head)}


def backbone_prefix(state_dict: Mapping[str, Any], layout: str = "auto", *, branch: str | None = None) -> str:
    """What stands in front of the names of the network that `to_detectron2` takes, such as "encoder_q.".

    Arguments and exceptions: see there.
    """
    state = unwrap_state_dict(state_dict)
    layout = _resolve_layout(state, layout)
    if branch not in (None, "student", "teacher"):
        raise ValueError(f'branch is "{branch}"; it must be "student" or "teacher"')
    if layout == "d2_objssl":
        metadata = state_dict.get("d2_objssl")
        return _pretraining_prefix(state, branch, metadata.get("export_branch") if metadata else None)
    candidates = _prefixes(state, layout)
    if not candidates:
        raise ValueError(f"these are no {layout} names; the first of {len(state)} keys: {', '.join(list(state)[:8])}")
    return _choose_prefix(candidates, state, branch)


def from_detectron2(state_dict: Mapping[str, Any], layout: str = "torchvision") -> dict[str, Any]:
    """Convert a backbone with Detectron2's names to torchvision's or timm's: the exact reverse of `to_detectron2`.

    Args:
        state_dict: name -> tensor or array, with bare names or behind any prefix.
        layout: "torchvision" or "timm": of ResNets the names are the same.

    Raises:
        ValueError: if `layout` is another one, or a key has no name there (deformable convolutions, a changed stem).
    """
    if layout not in ("torchvision", "timm"):
        raise ValueError(f'layout is "{layout}"; from_detectron2 knows "torchvision" and "timm"')
    bare = to_detectron2(state_dict, "detectron2")
    if is_swin(bare):
        return swin_from_detectron2(bare, layout)
    return {_to_torchvision(name): value for name, value in bare.items()}


def network_roots(state_dict: Mapping[str, Any], layout: str) -> list[str]:
    """Names of the first convolution of every network of `layout` in a state dict.

    None for "d2_objssl"; of Swin Transformers only in Detectron2's layout, since Microsoft's stem has the same names.
    """
    roots = [prefix + _ROOTS[layout][0] for prefix in _resnet_prefixes(state_dict, layout)]
    if layout == "detectron2":
        roots += [f"{prefix}patch_embed.proj.weight" for prefix in swin_prefixes(state_dict, layout)]
    return roots


def infer_resnet(state_dict: Mapping[str, Any]) -> dict[str, int]:
    """Read the architecture of a ResNet off the shapes of its weights (bare Detectron2 names).

    Returns:
        depth (18, 34, 50, 101, 152 or 200), num_groups, width_per_group, res2_out_channels, stem_out_channels.

    Raises:
        ValueError: if it is none of these ResNets.
    """
    blocks = tuple(len({k.split(".")[1] for k in state_dict if k.startswith(f"res{s}.")}) for s in (2, 3, 4, 5))
    is_bottleneck = "res2.0.conv3.weight" in state_dict
    depth = next((d for d, b in NUM_BLOCKS.items() if b == blocks and (d >= 50) == is_bottleneck), None)
    if depth is None:
        kind = "bottleneck" if is_bottleneck else "basic"
        known = "/".join(map(str, NUM_BLOCKS))
        raise ValueError(f"no ResNet-{known}: {blocks} {kind} blocks in res2 to res5")
    width = state_dict["res2.0.conv1.weight"].shape[0]
    # The weight of a grouped convolution is (out, in / groups, k, k).
    num_groups = width // state_dict["res2.0.conv2.weight"].shape[1] if is_bottleneck else 1
    last = "conv3" if is_bottleneck else "conv2"
    return {
        "depth": depth,
        "num_groups": num_groups,
        "width_per_group": width // num_groups,
        "res2_out_channels": state_dict[f"res2.0.{last}.weight"].shape[0],
        "stem_out_channels": state_dict["stem.conv1.weight"].shape[0],
    }


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


def _choose_prefix(candidates: list[str], names: Collection[str], branch: str | None) -> str:
    """Choose one of several networks of a file by the table of branches."""
    plain = {_strip_wrappers(prefix): prefix for prefix in candidates}
    rows = [row for row in _BRANCHES if any(row.marker in name for name in names)]
    for row in sorted(rows, key=lambda row: row.student not in plain):  # pairs first
        found = {key: plain.get(prefix) for key, prefix in (("student", row.student), ("teacher", row.teacher))}
        # A lone student needs no table (below); a lone teacher is known by its prefix, e.g. "momentum_encoder.".
        if found["teacher"] is None:
            continue
        if branch is not None and found[branch] is None:
            raise ValueError(f"the {branch} is asked for, but the file only holds {', '.join(map(repr, candidates))}")
        chosen = found[branch or row.default] or found["teacher"]
        assert chosen is not None
        return chosen
    if len(candidates) > 1:
        raise ValueError(f"several networks in one file, none of them known: {', '.join(map(repr, candidates))}")
    if branch == "teacher":
        raise ValueError(f"the teacher is asked for, but the file only holds one network, {candidates[0]!r}")
    return candidates[0]


def _pretraining_prefix(names: Collection[str], branch: str | None, default: str | None) -> str:
    """Choose the branch of a checkpoint of this package."""
    present = [b for b in ("student", "teacher") if any(name.startswith(f"{b}.backbone.") for name in names)]
    if not present:
        raise ValueError(f"these are no d2_objssl names; the first of {len(names)} keys: {', '.join(list(names)[:8])}")
    if branch is None:
        branch = default if default in present else present[-1]
    if branch not in present:
        raise ValueError(f"the {branch} is asked for, but the file only holds the {present[0]}")
    return f"{branch}.backbone."


def _strip_wrappers(prefix: str) -> str:
    while wrapper := next((w for w in _WRAPPERS if prefix.startswith(w)), ""):
        prefix = prefix[len(wrapper) :]
    return prefix


def _below(state: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """The entries behind `prefix`, without it."""
    return ((name[len(prefix) :], value) for name, value in state.items() if name.startswith(prefix))


def _from_torchvision(name: str) -> str:
    match = _TORCHVISION_KEY.fullmatch(name)
    if match is None:
        raise ValueError(f'"{name}" has no name in Detectron2\'s ResNet: another kind of network')
    stage = f"res{int(match['layer']) + 1}.{match['block']}" if match["layer"] else "stem"
    return f"{stage}.{_MODULES[match['module']]}.{match['leaf']}"


def _to_torchvision(name: str) -> str:
    match = _DETECTRON2_KEY.fullmatch(name)
    if match is None:
        raise ValueError(f'"{name}" has no name in torchvision\'s ResNet: another kind of network')
    stage = f"layer{int(match['stage']) - 1}.{match['block']}." if match["stage"] else ""
    return f"{stage}{_MODULES_REVERSED[match['module']]}.{match['leaf']}"
