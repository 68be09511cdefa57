"""Names of Swin Transformers (version 1), and how they become Detectron2's.

    layout        example of a key                              written by
    detectron2    layers.0.blocks.1.mlp.fc1.weight              Detectron2, Microsoft's Swin for detection
    swin          the same                                      Microsoft's Swin, timm before 0.9, SemCL
    timm          the same, or layers_0.blocks.1.mlp...         timm; with "_", its extractors of features
    torchvision   features.1.1.mlp.0.weight                     torchvision

They differ in where the layer that halves a map stands, at the end of a stage or at the start of the next one, and in
the normalisation of outputs, of which classification networks have one:

    detectron2    layers.0.downsample.reduction.weight          norm3.weight
    swin          layers.0.downsample.reduction.weight          norm.weight
    timm          layers.1.downsample.reduction.weight          norm.weight
    torchvision   features.2.reduction.weight                   norm.weight

`norm` becomes `norm3`, that of res5. For norm0, norm1 and norm2, those of res2, res3 and res4, classification networks
have nothing: in Detectron2 they start with weight 1 and bias 0, and on the way back they are dropped. So are tables
(`relative_position_index`) and masks (`attn_mask`), which every network computes for itself. Values pass untouched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

_SWIN_LAYOUTS = ("detectron2", "swin", "timm", "torchvision")
_TABLE = "attn.relative_position_bias_table"

# Module of a block or between blocks: Detectron2's name -> torchvision's.
_BLOCK_MODULES = {
    "norm1": "norm1",
    "attn": "attn",
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
}
_STEM_MODULES = {"patch_embed.proj": "features.0.0", "patch_embed.norm": "features.0.2"}
_MODULES_REVERSED = {tv: d2 for d2, tv in (_BLOCK_MODULES | _STEM_MODULES).items()}
_LEAF = r"(?P<leaf>weight|bias|relative_position_bias_table)"
_BLOCK_KEY = re.compile(rf"layers[._](?P<stage>[0-3])\.blocks\.(?P<block>\d+)\.(?P<module>[a-z0-9.]+)\.{_LEAF}")
_BETWEEN_KEY = re.compile(rf"layers[._](?P<stage>[0-3])\.downsample\.(?P<module>norm|reduction)\.{_LEAF}")
_TORCHVISION_BLOCK_KEY = re.compile(rf"features\.(?P<index>[1357])\.(?P<block>\d+)\.(?P<module>[a-z0-9.]+)\.{_LEAF}")
_TORCHVISION_BETWEEN_KEY = re.compile(rf"features\.(?P<index>[246])\.(?P<module>norm|reduction)\.{_LEAF}")
_COMPUTED = re.compile(r"(^|\.)(relative_position_index|attn_mask)$")
_PART = re.compile(r"(patch_embed|layers|features|norm[0-3]?|absolute_pos_embed)(?=[._]|$)")


def swin_prefixes(names: Collection[str], layout: str) -> list[str]:
    """Every prefix behind which a Swin Transformer of `layout` stands; none for layouts that have no names for it."""
    if layout not in _SWIN_LAYOUTS:
        return []
    first = "features.0.0.weight" if layout == "torchvision" else "patch_embed.proj.weight"
    ends = tuple(name.removesuffix(first) for name in names if name == first or name.endswith(f".{first}"))
    return [prefix for prefix in ends if _layout_behind(prefix, names) == layout]


def swin_to_detectron2(state_dict: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """Convert a network to Detectron2's bare names.

    Args:
        state_dict: name -> tensor or array, without a prefix. Classifiers and projectors are dropped.
        layout: "detectron2", "swin", "timm" or "torchvision".

    Raises:
        ValueError: if a name of the network has no Detectron2 name.
    """
    inner = {k: v for k, v in state_dict.items() if _PART.match(k) and not _COMPUTED.search(k)}
    if layout == "detectron2":
        return inner
    if layout == "torchvision":
        return {_from_torchvision(name): value for name, value in inner.items()}
    return {_from_official(name, shift=1 if layout == "timm" else 0): value for name, value in inner.items()}


def swin_from_detectron2(state_dict: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """Convert bare Detectron2 names to those of "torchvision" or "timm"; norm0, norm1 and norm2 are dropped.

    Raises:
        ValueError: if a name has no counterpart there.
    """
    rename = _to_torchvision if layout == "torchvision" else _to_timm
    kept = {k: v for k, v in state_dict.items() if not re.match(r"norm[012]\.", k) and not _COMPUTED.search(k)}
    return {rename(name): value for name, value in kept.items()}


def is_swin(state_dict: Collection[str]) -> bool:
    """Whether bare Detectron2 names are those of a Swin Transformer."""
    return "patch_embed.proj.weight" in state_dict and f"layers.0.blocks.0.{_TABLE}" in state_dict


def infer_swin(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Read the architecture off the shapes of the weights (bare Detectron2 names).

    Returns:
        embed_dim (int), depths, num_heads (lists of int), window_size (int), as in MODEL.SWIN.

    Raises:
        ValueError: if stages or weights are missing, or the window is no square.
    """
    try:
        tables = [state_dict[f"layers.{stage}.blocks.0.{_TABLE}"] for stage in range(4)]
        embed_dim = int(state_dict["patch_embed.proj.weight"].shape[0])
    except KeyError as error:
        raise ValueError(f"no Swin Transformer of four stages: there is no {error.args[0]}") from error
    side = math.isqrt(tables[0].shape[0])  # 2 M - 1 offsets along each axis
    if side**2 != tables[0].shape[0] or side % 2 == 0:
        raise ValueError(f"no Swin Transformer with square windows: {tables[0].shape[0]} relative positions")
    blocks = [{k.split(".")[3] for k in state_dict if k.startswith(f"layers.{stage}.blocks.")} for stage in range(4)]
    return {
        "embed_dim": embed_dim,
        "depths": [len(names) for names in blocks],
        "num_heads": [int(table.shape[1]) for table in tables],
        "window_size": (side + 1) // 2,
    }


def _layout_behind(prefix: str, names: Collection[str]) -> str | None:
    """The layout of the Swin Transformer behind `prefix`; None if there is another network."""
    if f"{prefix}features.1.0.{_TABLE}" in names:
        return "torchvision"
    if f"{prefix}layers_0.blocks.0.{_TABLE}" in names:
        return "timm"
    if f"{prefix}layers.0.blocks.0.{_TABLE}" not in names:
        return None
    if f"{prefix}layers.3.downsample.reduction.weight" in names:
        return "timm"
    return "detectron2" if any(f"{prefix}norm{stage}.weight" in names for stage in range(4)) else "swin"


def _from_official(name: str, shift: int) -> str:
    """`shift`: how many stages later than Detectron2 the layout counts the layers between stages."""
    if match := _BLOCK_KEY.fullmatch(name):
        if match["module"] in _BLOCK_MODULES:
            return f"layers.{match['stage']}.blocks.{match['block']}.{match['module']}.{match['leaf']}"
    elif match := _BETWEEN_KEY.fullmatch(name):
        return f"layers.{int(match['stage']) - shift}.downsample.{match['module']}.{match['leaf']}"
    elif name in ("norm.weight", "norm.bias"):
        return name.replace("norm", "norm3")
    elif name.rpartition(".")[0] in _STEM_MODULES:
        return name
    raise _no_name(name, "Detectron2")


def _from_torchvision(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if match := _TORCHVISION_BLOCK_KEY.fullmatch(name):
        if match["module"] in _MODULES_REVERSED:
            stage = int(match["index"]) // 2
            return f"layers.{stage}.blocks.{match['block']}.{_MODULES_REVERSED[match['module']]}.{match['leaf']}"
    elif match := _TORCHVISION_BETWEEN_KEY.fullmatch(name):
        return f"layers.{int(match['index']) // 2 - 1}.downsample.{match['module']}.{match['leaf']}"
    elif module == "norm":
        return f"norm3.{leaf}"
    elif module in _MODULES_REVERSED:
        return f"{_MODULES_REVERSED[module]}.{leaf}"
    raise _no_name(name, "Detectron2")


def _to_torchvision(name: str, package: str = "torchvision") -> str:
    module, _, leaf = name.rpartition(".")
    if match := _BLOCK_KEY.fullmatch(name):
        if match["module"] in _BLOCK_MODULES:
            index = 2 * int(match["stage"]) + 1
            return f"features.{index}.{match['block']}.{_BLOCK_MODULES[match['module']]}.{match['leaf']}"
    elif match := _BETWEEN_KEY.fullmatch(name):
        return f"features.{2 * int(match['stage']) + 2}.{match['module']}.{match['leaf']}"
    elif module == "norm3":
        return f"norm.{leaf}"
    elif module in _STEM_MODULES:
        return f"{_STEM_MODULES[module]}.{leaf}"
    raise _no_name(name, package)


def _to_timm(name: str) -> str:
    if match := _BETWEEN_KEY.fullmatch(name):
        return f"layers.{int(match['stage']) + 1}.downsample.{match['module']}.{match['leaf']}"
    _to_torchvision(name, "timm")  # raises if it is no name of the network
    return re.sub(r"^norm3\.", "norm.", name)


def _no_name(name: str, package: str) -> ValueError:
    return ValueError(f'"{name}" has no name in {package}\'s Swin Transformer: another kind of network')
