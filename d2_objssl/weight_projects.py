"""Which network of a file to take: the table of projects whose pretraining files are known by their keys.

Methods with a momentum encoder write two networks, here always called student (query, online, base) and teacher (key,
target, momentum). Where nobody asks for one of them, the one is taken that the project itself evaluates. An entry such
as DINO's {"student": ..., "teacher": ...} counts as a prefix; `module.` and other wrappers are left out. Everything
outside of the chosen network is left out of a conversion; `left_out` tells what that was.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

# Put in front of every key by DDP, torch.compile and Lightning.
_WRAPPERS = ("module.", "_orig_mod.", "model.")


class Project(NamedTuple):
    """Prefixes of a project's networks, and which of them it is known for."""

    name: str
    student: str
    teacher: str
    default: str
    marker: str = ""  # a part of a key that tells it from others with the same prefixes


# Asked from top to bottom; both networks must be there.
PROJECTS = (
    Project("SlotCon", "encoder_q.", "encoder_k.", "teacher", marker="grouping_q."),
    Project("MoCo v1 or v2", "encoder_q.", "encoder_k.", "student"),
    Project("MoCo v3 or SemCL", "base_encoder.", "momentum_encoder.", "student"),
    Project("PixPro", "encoder.", "encoder_k.", "student"),
    # OpenSelfSup and mmselfsup 0.x, DenseCL's code among it: Sequential(backbone, neck); `backbone.` is encoder_q.0 again.
    Project("DenseCL", "encoder_q.0.", "encoder_k.0.", "student", marker="queue2"),
    Project("MoCo of mmselfsup", "encoder_q.0.", "encoder_k.0.", "student"),
    Project("BYOL of mmselfsup", "online_net.0.", "target_net.0.", "student"),
    # mmselfsup 1.x and mmpretrain: an averaged copy of Sequential(backbone, neck).
    Project("DenseCL of mmselfsup 1.x", "backbone.", "encoder_k.module.0.", "student", marker="queue2"),
    Project("MoCo of mmselfsup 1.x", "backbone.", "encoder_k.module.0.", "student"),
    Project("BYOL of mmselfsup 1.x", "backbone.", "target_net.module.0.", "student"),
    # lucidrains/byol-pytorch, which CYBORGS builds on; `online_encoder.net.` is `net.` again.
    Project("CYBORGS or byol-pytorch", "net.", "target_encoder.net.", "student"),
    Project("byol-pytorch", "online_encoder.net.", "target_encoder.net.", "student"),
    Project("BYOL of sthalles", "online_network.encoder.", "target_network.encoder.", "student"),
    Project("BYOL", "online_encoder.", "target_encoder.", "student"),
    Project("BYOL", "online_network.", "target_network.", "student"),
    Project("BYOL", "online_net.", "target_net.", "student"),
    Project("BYOL", "online_backbone.", "target_backbone.", "student"),
    # lightly's benchmarks and examples.
    Project("BYOL of lightly", "backbone.", "teacher_backbone.", "student"),
    Project("MoCo of lightly", "backbone.", "key_backbone.", "student"),
    Project("BYOL or MoCo of lightly", "backbone.", "backbone_momentum.", "student"),
    Project("DINO of lightly", "student_backbone.", "teacher_backbone.", "teacher"),
    Project("DINO of lightly", "student_backbone.", "backbone.", "teacher"),
    Project("DINO", "student.backbone.", "teacher.backbone.", "teacher"),
    Project("DetCon or BYOL in JAX", "online_params/", "target_params/", "student"),
)
# Files with one network, by a part of a key outside of it.
_SINGLE = {"SwAV": "prototypes."}

# What stands beside a backbone in these files: classifiers, projectors, predictors, queues, necks, detection heads.
_HEADS = re.compile(
    r"fc|heads?|classifier|online_classifier|logits|neck|steps?|queue\w*|prototypes\d*|grouping\w*|slot\w*|center"
    r"|proj\w*|predict\w*|value_transform\w*|concat\w*|mlp\w*|embedder|criterion|data_preprocessor|pixel_(mean|std)"
    r"|\w*encoder\w*|(online|target|teacher|student|key)_\w+|student|teacher|params|state"
    r"|proposal_generator|(rpn|roi|bbox|mask|decode|auxiliary|sem_seg)_heads?|fpn_\w+"
)


class Network(NamedTuple):
    """One network of a file.

    Attributes:
        prefix: what stands in front of its names, such as "encoder_q.".
        branch: "student" or "teacher"; None where the file has one network only and its name does not tell.
        project: who writes such files, "" if many do.
    """

    prefix: str
    branch: str | None
    project: str


def choose_network(candidates: Collection[str], names: Collection[str], branch: str | None) -> Network:
    """Choose one of the networks of a file.

    Args:
        candidates: the prefix of each.
        names: all keys of the file.
        branch: "student", "teacher", or None for the one that the project evaluates.

    Raises:
        ValueError: if there is no such branch, or there are several networks of no known project.
    """
    plain = {_strip_wrappers(prefix): prefix for prefix in candidates}
    for row in PROJECTS:
        if row.student in plain and row.teacher in plain and any(row.marker in name for name in names):
            chosen = branch or row.default
            return Network(plain[row.student if chosen == "student" else row.teacher], chosen, row.name)
    if len(candidates) > 1:
        raise ValueError(f"several networks in one file, none of them known: {', '.join(map(repr, candidates))}")
    ((short, prefix),) = plain.items()
    roles = {role for row in PROJECTS for role in ("student", "teacher") if getattr(row, role) == short}
    role = roles.pop() if len(roles) == 1 else None
    if branch is not None and branch != (role or "student"):
        raise ValueError(f"the {branch} is asked for, but the file only holds one network, {prefix!r}")
    project = next((name for name, part in _SINGLE.items() if any(part in key for key in names)), "")
    return Network(prefix, role, project)


def left_out(names: Iterable[str], prefix: str, others: Collection[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Count, by first parts, what a conversion leaves out.

    Args:
        names: the keys of the file that were not converted.
        prefix: of the network that was.
        others: the prefixes of the other networks of the file.

    Returns:
        Such as {"fc": 2, "queue": 1, "encoder_k": 161}: other networks and heads that are known; and what is neither.
    """
    known: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for name in names:
        if other := next((p for p in others if p and name.startswith(p)), ""):
            known[other.rstrip("./")] += 1
            continue
        parts = re.split(r"[./]", name.removeprefix(prefix))
        is_known = any(_HEADS.fullmatch(part) for part in parts[:2])
        (known if is_known else unknown)[parts[0]] += 1
    return dict(known), dict(unknown)


def shared_wrapper(names: Collection[str]) -> str:
    """What `module.` and the like all `names` begin with, such as "module.model."."""
    shared = ""
    while wrapper := next((w for w in _WRAPPERS if all(name.startswith(shared + w) for name in names)), ""):
        shared += wrapper
    return shared


def _strip_wrappers(prefix: str) -> str:
    while wrapper := next((w for w in _WRAPPERS if prefix.startswith(w)), ""):
        prefix = prefix[len(wrapper) :]
    return prefix
