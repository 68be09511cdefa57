"""Names of ResNets in PyTorch, and how they become Detectron2's bare names.

    layout        example of a key                     written by
    torchvision   layer1.0.conv1.weight                torchvision, timm, mmdetection, and most pretraining code
    sequential    4.0.conv1.weight                     nn.Sequential(*resnet.children()), as lightly's examples have it
    detectron2    res2.0.conv1.weight                  Detectron2

The children of torchvision's ResNet are numbered 0 conv1, 1 bn1, 2 relu, 3 maxpool, 4 to 7 layer1 to layer4, 8 avgpool.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# A network stands wherever both keys are behind the same prefix.
RESNET_ROOTS = {
    "detectron2": ("stem.conv1.weight", "res2.0.conv1.weight"),
    "torchvision": ("conv1.weight", "layer1.0.conv1.weight"),
    "sequential": ("0.weight", "4.0.conv1.weight"),
}

# Depth of a ResNet -> blocks in res2, res3, res4 and res5; from 50 on they are bottlenecks.
NUM_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}

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
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_LEAF = r"(?P<leaf>weight|bias|running_mean|running_var|num_batches_tracked)"
_TORCHVISION_KEY = re.compile(
    rf"(?:layer(?P<layer>[1-4])\.(?P<block>\d+)\.)?(?P<module>(?:conv|bn)[1-3]|downsample\.[01])\.{_LEAF}"
)
_DETECTRON2_KEY = re.compile(
    rf"(?:stem(?=\.conv1\.)|res(?P<stage>[2-5])\.(?P<block>\d+))\.(?P<module>(?:conv[1-3]|shortcut)(?:\.norm)?)\.{_LEAF}"
)


def resnet_to_detectron2(state_dict: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """Convert a network to Detectron2's bare names.

    Args:
        state_dict: name -> tensor or array, without a prefix. What is no part of the backbone is dropped.
        layout: "torchvision" or "sequential".

    Raises:
        ValueError: if a name of the network has no Detectron2 name.
    """
    if layout == "sequential":
        children = ((name.partition("."), value) for name, value in state_dict.items())
        state_dict = {f"{_CHILDREN[i]}.{rest}": value for (i, _, rest), value in children if i in _CHILDREN}
    inner = {k: v for k, v in state_dict.items() if re.match(r"(conv1|bn1|layer\d+)\.", k)}
    return {_from_torchvision(name): value for name, value in inner.items()}


def resnet_from_detectron2(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Convert bare Detectron2 names to torchvision's, which timm and mmdetection share.

    Raises:
        ValueError: if a name has no counterpart there.
    """
    return {_to_torchvision(name): value for name, value in state_dict.items()}


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
