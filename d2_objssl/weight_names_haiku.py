"""Names and axes of the ResNets that DetCon and BYOL released in JAX (haiku), and how they become Detectron2's.

A file nests dicts, e.g. {"params": {"res_net50/~/initial_conv": {"w": array}}, "state": {...}}. `flatten_haiku` joins
them to the names on the left:

    params/initial_conv/w                                  stem.conv1.weight   (k, k, in, out) -> (out, in, k, k)
    params/block_group_0/block_1/conv_2/w                  res2.1.conv3.weight
    params/block_group_0/block_0/shortcut_batchnorm/scale  res2.0.shortcut.norm.weight  (1, 1, 1, C) -> (C,)
    params/block_group_0/block_1/batchnorm_2/offset        res2.1.conv3.norm.bias
    state/initial_batchnorm/mean_ema/average               stem.conv1.norm.running_mean

Beside `average`, haiku keeps `hidden`, the moving average without the correction of its start at zero, and `counter`:
neither is used. The networks pad as TensorFlow does: they need MODEL.RESNETS.PADDING "same".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# A network stands wherever both names are behind the same prefix.
HAIKU_ROOTS = ("initial_conv/w", "block_group_0/block_0/conv_0/w")

# "~" marks modules made in a constructor; the name of the network is the one of its class.
_DROPPED = re.compile(r"~|res_net\d+")
_NAME = re.compile(
    r"(?:initial_(?:conv|batchnorm)|block_group_(?P<stage>[0-3])/block_(?P<block>\d+)/"
    r"(?:shortcut_(?:conv|batchnorm)|(?:conv|batchnorm)_(?P<index>[0-2])))"
    r"/(?P<leaf>w|scale|offset|(?:mean|var)_ema/average)"
)
_LEAVES = {
    "w": "weight",
    "scale": "norm.weight",
    "offset": "norm.bias",
    "mean_ema/average": "norm.running_mean",
    "var_ema/average": "norm.running_var",
}


def flatten_haiku(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Join the names of nested dicts: "params/block_group_0/block_0/conv_0/w" -> array.

    Returns:
        An empty dict if there is no ResNet of haiku in `tree`.
    """
    state = {"/".join(p for p in name.split("/") if not _DROPPED.fullmatch(p)): v for name, v in _leaves(tree)}
    return state if any(name == HAIKU_ROOTS[0] or name.endswith(f"/{HAIKU_ROOTS[0]}") for name in state) else {}


def haiku_to_detectron2(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Convert a network to Detectron2's bare names and PyTorch's order of axes.

    Args:
        state: what `flatten_haiku` returned.
        prefix: of the parameters, such as "params/"; the statistics are behind "state/".

    Returns:
        Bare name -> tensor or array; without `num_batches_tracked`, which has no counterpart.

    Raises:
        ValueError: if a name of the network has no Detectron2 name, or it has no statistics.
    """
    converted = {}
    for start in dict.fromkeys((prefix, prefix.replace("params", "state"))):
        inner = {name[len(start) :]: value for name, value in state.items() if name.startswith(start)}
        for name, value in inner.items():
            if re.match(r"(initial|block_group|final)_", name) and not name.endswith(("/hidden", "/counter")):
                converted[_convert_name(name)] = _convert_axes(value, is_convolution=name.endswith("/w"))
    if "stem.conv1.norm.running_mean" not in converted:
        raise ValueError(f"there are parameters behind {prefix!r}, but no statistics of their batch normalisation")
    return converted


def _leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        elif hasattr(value, "shape"):
            yield f"{prefix}{name}", value


def _convert_name(name: str) -> str:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f'"{name}" has no name in Detectron2\'s ResNet: another kind of network')
    leaf = _LEAVES[match["leaf"]]
    if match["stage"] is None:
        return f"stem.conv1.{leaf}"
    module = "shortcut" if match["index"] is None else f"conv{int(match['index']) + 1}"
    return f"res{int(match['stage']) + 2}.{match['block']}.{module}.{leaf}"


def _convert_axes(value: Any, *, is_convolution: bool) -> Any:
    """Of a tensor or array: (k, k, in, out) -> (out, in, k, k), and of the others (1, 1, 1, C) -> (C,)."""
    if not is_convolution:
        return value.reshape(-1)
    order = (3, 2, 0, 1)
    return value.permute(order) if hasattr(value, "permute") else value.transpose(order)
