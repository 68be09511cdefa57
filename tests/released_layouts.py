"""Files as pretraining projects write them, made of the state dicts of two networks with torchvision's names.

What each function returns was read off the named project's code: the entries of the file, the prefixes of its networks,
and a key for everything that stands beside them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = Mapping[str, Tensor]


class Layout(NamedTuple):
    """A file: its ending, the project it is recognised as, the branch taken from it, and its content."""

    suffix: str
    project: str
    branch: str | None
    content: Callable[[State, State], dict[str, Any]]


def below(prefix: str, state: State, *others: str) -> dict[str, Tensor]:
    """The state behind a prefix, and a tensor for each other key there."""
    return {f"{prefix}{name}": value for name, value in state.items()} | keys(*(prefix + name for name in others))


def keys(*names: str) -> dict[str, Tensor]:
    return {name: torch.ones(2) for name in names}


def bare(state: State) -> dict[str, Tensor]:
    """Without the classifier."""
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


def numbered(state: State) -> dict[str, Tensor]:
    """As nn.Sequential(*list(resnet.children())[:-1]) names it."""
    children = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    parts = ((name.partition("."), value) for name, value in bare(state).items())
    return {f"{children[module]}.{rest}": value for (module, _, rest), value in parts}


def slotcon(student: State, teacher: State) -> dict[str, Any]:
    model = below("module.encoder_q.", bare(student)) | below("module.encoder_k.", bare(teacher))
    model |= keys("module.projector_q.mlp.0.weight", "module.grouping_q.slot_embed.weight", "module.center")
    return {"args": argparse.Namespace(arch="resnet50", lr=1.0, dataset=["COCO"]), "model": model, "epoch": 800}


def cyborgs(student: State, teacher: State) -> dict[str, Any]:
    model = below("net.", student) | below("online_encoder.net.", student)
    model |= below("target_encoder.net.", teacher, "projector.net.0.weight")
    return {"state_dict": model | keys("online_predictor.net.0.weight"), "optimizer": {"state": {}}, "epoch": 1}


def moco(student: State, teacher: State) -> dict[str, Any]:
    state = below("module.encoder_q.", bare(student), "fc.0.weight", "fc.2.weight")
    state |= below("module.encoder_k.", bare(teacher), "fc.0.weight", "fc.2.weight")
    return {"epoch": 200, "arch": "resnet50", "state_dict": state | keys("module.queue", "module.queue_ptr")}


def moco_v3(student: State, teacher: State) -> dict[str, Any]:
    state = below("module.base_encoder.", bare(student), "fc.0.weight", "fc.1.running_mean")
    state |= below("module.momentum_encoder.", bare(teacher), "fc.0.weight")
    return {"epoch": 100, "arch": "resnet50", "state_dict": state | keys("module.predictor.0.weight"), "scaler": {}}


def semcl(student: State, teacher: State) -> dict[str, Any]:
    """MoCo v3's names, as one process writes them."""
    content = moco_v3(student, teacher)
    return content | {"state_dict": {name.removeprefix("module."): v for name, v in content["state_dict"].items()}}


def densecl(student: State, teacher: State) -> dict[str, Any]:
    state = (
        below("encoder_q.0.", bare(student)) | below("encoder_k.0.", bare(teacher)) | below("backbone.", bare(student))
    )
    state |= keys("encoder_q.1.mlp.0.weight", "encoder_k.1.mlp.0.weight", "queue", "queue_ptr", "queue2", "queue2_ptr")
    return {"meta": {"epoch": 1, "time": "now"}, "state_dict": state}


def mmselfsup_1(name: str, *others: str) -> Callable[[State, State], dict[str, Any]]:
    def content(student: State, teacher: State) -> dict[str, Any]:
        state = below("backbone.", bare(student)) | below(f"{name}.module.0.", bare(teacher))
        return {"meta": {"cfg": ""}, "state_dict": state | keys(f"{name}.steps", "neck.fc0.weight", *others)}

    return content


def pixpro(student: State, teacher: State) -> dict[str, Any]:
    model = below("module.encoder.", bare(student)) | below("module.encoder_k.", bare(teacher))
    model |= keys(
        "module.projector.linear1.weight", "module.projector_k.linear1.weight", "module.value_transform.weight"
    )
    return {"opt": argparse.Namespace(arch="resnet50", crop=0.08), "model": model, "epoch": 400}


def mmselfsup_byol(student: State, teacher: State) -> dict[str, Any]:
    state = (
        below("online_net.0.", bare(student))
        | below("target_net.0.", bare(teacher))
        | below("backbone.", bare(student))
    )
    return {"state_dict": state | keys("online_net.1.fc0.weight", "head.predictor.fc0.weight")}


def sthalles(student: State, teacher: State) -> dict[str, Any]:
    return {
        "online_network_state_dict": below("encoder.", numbered(student)) | keys("projetion.net.0.weight"),
        "target_network_state_dict": below("encoder.", numbered(teacher)) | keys("projetion.net.0.weight"),
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.03}]},
    }


def swav(student: State, teacher: State) -> dict[str, Any]:
    state = below("module.", bare(student), "projection_head.0.weight", "prototypes.weight")
    return {"epoch": 800, "state_dict": state}


def dino(student: State, teacher: State) -> dict[str, Any]:
    branches = {
        name: below("module.backbone.", bare(state))
        | keys("module.head.mlp.0.weight", "module.head.last_layer.weight_v")
        for name, state in (("student", student), ("teacher", teacher))
    }
    rest = {"epoch": 800, "args": argparse.Namespace(arch="resnet50", local_crops_scale=(0.05, 0.14))}
    return branches | rest | {"optimizer": {"state": {}}, "dino_loss": {"center": torch.ones(1, 2)}}


def two(student_prefix: str, teacher_prefix: str, *others: str) -> Callable[[State, State], dict[str, Any]]:
    """Two networks in a "state_dict", as Lightning writes it."""

    def content(student: State, teacher: State) -> dict[str, Any]:
        state = below(student_prefix, bare(student)) | below(teacher_prefix, bare(teacher))
        return {"state_dict": state | keys(*others), "epoch": 99, "hyper_parameters": {"num_classes": 1000}}

    return content


def lightly_example(student: State, teacher: State) -> dict[str, Any]:
    state = below("backbone.", numbered(student)) | below("backbone_momentum.", numbered(teacher))
    return state | keys("projection_head.layers.0.weight", "projection_head_momentum.layers.0.weight")


def mmdetection(student: State, teacher: State) -> dict[str, Any]:
    state = below("backbone.", bare(student)) | keys("neck.lateral_convs.0.conv.weight", "rpn_head.rpn_cls.bias")
    return {"meta": {}, "state_dict": state | keys("roi_head.bbox_head.fc_cls.weight")}


LAYOUTS: dict[str, Layout] = {
    "SlotCon": Layout(".pth", "SlotCon", "teacher", slotcon),
    "CYBORGS": Layout(".pth", "CYBORGS or byol-pytorch", "student", cyborgs),
    "SemCL": Layout(".pth.tar", "MoCo v3 or SemCL", "student", semcl),
    "MoCo v1 or v2": Layout(".pth.tar", "MoCo v1 or v2", "student", moco),
    "MoCo v3": Layout(".pth.tar", "MoCo v3 or SemCL", "student", moco_v3),
    "DenseCL, of training": Layout(".pth", "DenseCL", "student", densecl),
    "DenseCL, released": Layout(".pth", "", None, lambda s, _: {"state_dict": bare(s), "author": "DenseCL"}),
    "DenseCL, mmselfsup 1.x": Layout(
        ".pth", "DenseCL of mmselfsup 1.x", "student", mmselfsup_1("encoder_k", "queue", "queue2")
    ),
    "MoCo, mmselfsup 1.x": Layout(".pth", "MoCo of mmselfsup 1.x", "student", mmselfsup_1("encoder_k", "queue")),
    "PixPro": Layout(".pth", "PixPro", "student", pixpro),
    "BYOL, mmselfsup 0.x": Layout(".pth", "BYOL of mmselfsup", "student", mmselfsup_byol),
    "BYOL, mmselfsup 1.x": Layout(".pth", "BYOL of mmselfsup 1.x", "student", mmselfsup_1("target_net")),
    "BYOL, lightly's benchmark": Layout(
        ".ckpt", "BYOL of lightly", "student", two("backbone.", "teacher_backbone.", "online_classifier.bias")
    ),
    "BYOL, lightly's example": Layout(".pt", "BYOL or MoCo of lightly", "student", lightly_example),
    "BYOL, sthalles": Layout(".pth", "BYOL of sthalles", "student", sthalles),
    "MoCo, lightly's benchmark": Layout(".ckpt", "MoCo of lightly", "student", two("backbone.", "key_backbone.")),
    "SwAV": Layout(".pth.tar", "SwAV", None, swav),
    "DINO": Layout(".pth", "DINO", "teacher", dino),
    "DINO, backbone": Layout(".pth", "", None, lambda s, _: bare(s)),
    "DINO, lightly's benchmark": Layout(".ckpt", "DINO of lightly", "teacher", two("student_backbone.", "backbone.")),
    "torchvision": Layout(".pth", "", None, lambda s, _: dict(s)),
    "timm": Layout(".safetensors", "", None, lambda s, _: dict(s)),
    "mmdetection": Layout(".pth", "", None, mmdetection),
}
