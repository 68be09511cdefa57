"""What must hold before a model goes on with loaded weights: the same input contract, and a backbone that is full.

Detectron2 itself only warns: a checkpoint of which no name matches trains from random weights.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate
from torch import nn

from .weight_names import LAYOUTS, detect_layout

logger = logging.getLogger(__name__)

# What the pixels must be like, then what a ResNet or a Swin Transformer computes beside its weights.
_INPUT_KEYS = {"format": "INPUT.FORMAT", "pixel_mean": "MODEL.PIXEL_MEAN", "pixel_std": "MODEL.PIXEL_STD"}
_WIDTHS = ("width_per_group", "res2_out_channels", "stem_out_channels")
_RESNET_KEYS = {
    name: f"MODEL.RESNETS.{name.upper()}" for name in ("depth", "stride_in_1x1", "padding", "num_groups", *_WIDTHS)
}
_SWIN_KEYS = {name: f"MODEL.SWIN.{name.upper()}" for name in ("embed_dim", "depths", "num_heads", "window_size")}
_CONTRACT_KEYS = _INPUT_KEYS | _RESNET_KEYS | _SWIN_KEYS
# Whoever trains under these names feeds RGB and strides in the 3x3; the pixel statistics may differ.
LAYOUT_CONTRACTS: dict[str, dict[str, Any]] = {
    "torchvision": {"format": "RGB", "stride_in_1x1": False, "padding": "symmetric"},
    "sequential": {"format": "RGB", "stride_in_1x1": False, "padding": "symmetric"},
    "haiku": {"format": "RGB", "stride_in_1x1": False, "padding": "same"},
    "timm": {"format": "RGB"},
    "swin": {"format": "RGB"},
}
# By how much the features of a network change with its padding: mean of 5 ResNet-50 with haiku's initialisation, on
# noise of 224 x 224. Statistics of batch normalisation that fit the images can raise it to 100 %.
PADDING_ERROR = "43, 37, 31 and 30 % (relative L2 at res2 to res5, random weights; --verify measures it for a file)"

# Entries of a state dict that are right without having been loaded: counters and index tables.
_COMPUTED = re.compile(r"(^|\.)(num_batches_tracked|relative_position_index)$")
# Deformable convolutions start with zero offsets on top of a pretrained ordinary ResNet.
_STARTS_AT_ZERO = re.compile(r"\.conv2_offset\.(weight|bias)$")
# Swin Transformers: classification and pretraining only normalise the last stage, detection normalises every output.
# norm0 to norm2, those of res2 to res4, start with weight 1 and bias 0 where a file does not have them.
_STARTS_AT_ONE = re.compile(r"(^|backbone\.|bottom_up\.)norm[0-2]\.(weight|bias)$")
# The res5 of a C4 model; what stands behind its blocks (Res5ROIHeadsExtraNorm) is not the ResNet's.
_RES5_OF_C4 = re.compile(r"^roi_heads\.res5\.\d+\.")


def input_contract(cfg: CfgNode) -> dict[str, Any]:
    """What must be the same in pretraining and fine-tuning, and no weight tells.

    Returns:
        format ("RGB" or "BGR"), pixel_mean and pixel_std (lists, in 0-255, in the order of format); for ResNets
        also depth, stride_in_1x1, padding ("symmetric" or "same"), num_groups, and, multiplied by WIDTH_MULTIPLIER,
        width_per_group, res2_out_channels, stem_out_channels; for Swin Transformers embed_dim, depths, num_heads and
        window_size, as in MODEL.SWIN.

    Raises:
        ValueError: if MODEL.BACKBONE.NAME has no use for WIDTH_MULTIPLIER or PADDING as they are set.
    """
    name = cfg.MODEL.BACKBONE.NAME
    # Configs without the keys of this package are read, too.
    multiplier = cfg.MODEL.RESNETS.get("WIDTH_MULTIPLIER", 1)
    padding = cfg.MODEL.RESNETS.get("PADDING", "symmetric")
    if (multiplier, padding) != (1, "symmetric") and "build_objssl_resnet" not in name:
        raise ValueError(
            f'MODEL.RESNETS.WIDTH_MULTIPLIER is {multiplier} and PADDING "{padding}", which MODEL.BACKBONE.NAME {name} '
            "leaves aside; build_objssl_resnet_backbone and build_objssl_resnet_fpn_backbone use them"
        )
    keys = _INPUT_KEYS | (_RESNET_KEYS if "resnet" in name else {})
    values = {key: _plain_value(cfg, path) for key, path in keys.items() if key != "padding"}
    if "resnet" in name:
        values |= {"padding": padding, **{key: values[key] * multiplier for key in _WIDTHS}}
    if "swin" in name:
        swin = cfg.MODEL.SWIN
        values |= {"embed_dim": swin.EMBED_DIM, "depths": list(swin.DEPTHS), "num_heads": list(swin.NUM_HEADS)}
        values["window_size"] = swin.WINDOW_SIZE
    return values


def _plain_value(cfg: CfgNode, path: str) -> Any:
    """The value of a key such as "MODEL.PIXEL_MEAN", sequences as lists of floats."""
    value: Any = cfg
    for part in path.split("."):
        value = value[part]
    return [float(v) for v in value] if isinstance(value, (list, tuple)) else value


def stored_contract(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a file of weights says about its input: its own `input_contract`, or what its layout tells; it may be empty.

    Args:
        checkpoint: as `load_checkpoint` returns it.
    """
    metadata = checkpoint.get("d2_objssl")
    stored = metadata.get("input_contract") if isinstance(metadata, Mapping) else None
    if isinstance(stored, Mapping):
        return stored
    try:
        return LAYOUT_CONTRACTS.get(detect_layout(checkpoint), {})
    except ValueError:  # of no known layout
        return {}


def check_input_contract(stored: Mapping[str, Any], cfg: CfgNode) -> None:
    """Compare the `input_contract` of a checkpoint's metadata with a config.

    Raises:
        ValueError: listing every key that differs, e.g. "INPUT.FORMAT is BGR, the checkpoint was trained on RGB".
    """
    compare_contracts(stored, input_contract(cfg), "the checkpoint")


def compare_contracts(stored: Mapping[str, Any], current: Mapping[str, Any], source: str) -> None:
    """As `check_input_contract`, for a contract `stored` in the file `source` and one that is already read."""
    if "depth" in stored:  # older contracts do not mention the padding
        stored = {"padding": "symmetric"} | dict(stored)
    lines = []
    for name, key in _CONTRACT_KEYS.items():
        # Basic blocks have no 1x1 convolution to put a stride or groups in.
        is_idle = current.get("depth", 50) < 50 and name in ("stride_in_1x1", "num_groups", "width_per_group")
        if name in stored and name in current and not is_idle and not _equal(stored[name], current[name]):
            lines.append(f"{key} is {current[name]}, the checkpoint was trained on {stored[name]}")
    if lines:
        listed = "\n  ".join(lines)
        raise ValueError(
            f"the input contract of {source} is not that of this config:\n  {listed}\n"
            f"Set these keys to the checkpoint's values{_padding_hint(stored, current)}"
        )


def _padding_hint(stored: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """What else there is to do about a difference in padding."""
    if "padding" not in stored or "padding" not in current or stored["padding"] == current["padding"]:
        return ""
    return (
        '. MODEL.RESNETS.PADDING "same" also needs MODEL.BACKBONE.NAME build_objssl_resnet_fpn_backbone or '
        "build_objssl_resnet_backbone.\nOr convert the file with tools/convert_checkpoint.py --padding "
        f"{current['padding']}: then it loads, but its features are off by about {PADDING_ERROR}"
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(math.isclose(x, y, abs_tol=1e-3) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@dataclass(frozen=True)
class LoadReport:
    """What became of each name when a file was loaded into a model.

    Attributes:
        path: the file.
        loaded, missing: names of the model.
        unexpected: names of the file that the model has no use for.
        incorrect_shapes: (name of the model, shape in the file, shape in the model).
    """

    path: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    incorrect_shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    def table(self) -> str:
        """Counts for each part of the model (or of the file, where unexpected), as text."""
        kinds = {
            "loaded": self.loaded,
            "missing": self.missing,
            "wrong shape": [name for name, _, _ in self.incorrect_shapes],
            "unexpected": self.unexpected,
        }
        counts = {kind: Counter(_part(name) for name in names) for kind, names in kinds.items()}
        examples: dict[str, str] = {}
        for name, in_file, in_model in self.incorrect_shapes:
            examples.setdefault(_part(name), f"{name}: {in_file} in the file, {in_model} in the model")
        for name in self.missing + self.unexpected:
            examples.setdefault(_part(name), name)
        parts = sorted(set().union(*counts.values()))
        rows = [[part, *(counts[kind][part] or "" for kind in kinds), examples.get(part, "")] for part in parts]
        return tabulate(rows, headers=["part", *kinds, "example"], tablefmt="simple")


def build_report(
    model: nn.Module, state: Mapping[str, Any], path: str, *, absent: Collection[str] | None = None
) -> LoadReport:
    """Compare the names and shapes of what was loaded with the model's.

    Args:
        model: after loading.
        state: name -> tensor that was loaded, under the model's names.
        path: the file.
        absent: the only names that may count as missing; None: all that are not in `state`.
    """
    own = {name: value for name, value in model.state_dict().items() if not _COMPUTED.search(name)}
    loaded, missing, wrong, misplaced = [], [], [], set()
    for name, value in own.items():
        # Where the shape is another one, Detectron2's matching leaves a weight under its short name.
        parts = name.split(".")
        short_names = (".".join(parts[i:]) for i in range(1, len(parts)))
        source = name if name in state else next((s for s in short_names if s in state and s not in own), None)
        if source is not None and state[source].shape != value.shape:
            wrong.append((name, tuple(state[source].shape), tuple(value.shape)))
            misplaced.add(source)
        elif name not in state and (absent is None or name in absent):
            missing.append(name)
        else:
            loaded.append(name)
    # A tensor with two names is loaded if one of them is.
    storages = {own[name].data_ptr() for name in loaded if own[name].numel()}
    shared = {name for name in missing if own[name].data_ptr() in storages}
    unexpected = (name for name in state if name not in own and name not in misplaced and not _COMPUTED.search(name))
    return LoadReport(
        path=path,
        loaded=(*loaded, *shared),
        missing=tuple(name for name in missing if name not in shared),
        unexpected=tuple(unexpected),
        incorrect_shapes=tuple(wrong),
    )


def backbone_keys(model: nn.Module) -> list[str]:
    """Names in `model.state_dict()` that pretrained weights must fill.

    The bottom-up network in `backbone` (without FPN's own convolutions) and, in a C4 model, the blocks of `roi_heads.res5`;
    in an ObjectSSL model the backbones of student and teacher; in a model without `backbone` everything. Not what needs no
    loading: `num_batches_tracked`, offsets of deformable convolutions, norm0 to norm2 of a Swin Transformer.
    """
    names = [name for name in _all_keys(model) if not (_STARTS_AT_ZERO.search(name) or _STARTS_AT_ONE.search(name))]
    chosen: list[str] = []
    for prefix in ("backbone.", "student.backbone.", "teacher.backbone."):
        below = [name for name in names if name.startswith(prefix)]
        chosen += [name for name in below if name.startswith(f"{prefix}bottom_up.")] or below
    if chosen:
        return chosen + [name for name in names if _RES5_OF_C4.match(name)]
    # A bare backbone, maybe an FPN.
    return [name for name in names if name.startswith("bottom_up.")] or names


def check_backbone_loaded(model: nn.Module, report: LoadReport, *, require: str = "backbone") -> None:
    """Refuse to go on with a network that was not fully loaded, and log the table.

    Args:
        model: the model that was loaded into, not wrapped by DDP.
        report: what happened.
        require: "backbone": all of `backbone_keys`. "all": every name of the model (evaluation, resuming).
            "none": nothing, only log.

    Raises:
        ValueError: with the table of loaded, missing, misshapen and unexpected names, and a hint.
    """
    if require not in ("backbone", "all", "none"):
        raise ValueError(f'require is "{require}"; it must be "backbone", "all" or "none"')
    names = _all_keys(model) if require == "all" else backbone_keys(model)
    num_loaded = len(set(names).intersection(report.loaded))
    what = "model" if require == "all" else "backbone"
    summary = f"{num_loaded} of {len(names)} parameters and statistics of the {what} were loaded from {report.path}"
    if require == "none" or num_loaded == len(names):
        logger.info("%s\n%s", summary, report.table())
        return
    raise ValueError(
        f"only {summary} (MODEL.WEIGHTS, or the checkpoint to resume from)\n{report.table()}\n"
        f"{_hint(report, names, num_loaded, require)}"
    )


def _all_keys(model: nn.Module) -> list[str]:
    return [name for name in model.state_dict() if not _COMPUTED.search(name)]


def _part(name: str) -> str:
    """The part of a model that a name belongs to, e.g. `backbone.bottom_up.res2`."""
    parts = name.split(".")
    depth = 3 if len(parts) > 2 and parts[1] in ("backbone", "bottom_up") else 2
    return ".".join(parts[: min(depth, len(parts) - 1)]) or name


def _hint(report: LoadReport, names: list[str], num_loaded: int, require: str) -> str:
    """What the user may do about a network that was not fully loaded."""
    if {name for name, _, _ in report.incorrect_shapes}.intersection(names):
        return "Shapes differ: compare MODEL.RESNETS (DEPTH, ...) or MODEL.SWIN (...), and the number of classes."
    if num_loaded == 0:
        return (
            f"No name matches: the file has none of the known layouts ({', '.join(LAYOUTS)}), or holds another kind of "
            "network. tools/convert_checkpoint.py converts files and compares the networks."
        )
    if require == "all":
        return "The whole model is needed here: give a model that was fine-tuned with this config, not a backbone."
    return "The file holds another kind of network than the config: compare MODEL.BACKBONE and MODEL.RESNETS or MODEL.SWIN."
