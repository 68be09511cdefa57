"""Atomic writing, the load guard and the checkpointer."""

from __future__ import annotations

import copy
import errno
import logging
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model, build_resnet_backbone
from fvcore.common.checkpoint import PeriodicCheckpointer
from torch import nn

from d2_objssl.checkpoint import (
    CheckpointError,
    ObjSSLCheckpointer,
    backbone_keys,
    check_input_contract,
    checkpoint_metadata,
    file_sha256,
    from_detectron2,
    input_contract,
    load_checkpoint,
    to_detectron2,
    write_checkpoint,
)
from d2_objssl.config import add_objssl_config


def make_cfg(**keys: Any) -> CfgNode:
    """A narrow ResNet-50 (BN, RGB, stride in the 3x3) in a small Mask R-CNN; `keys` with "__" for "."."""
    cfg = get_cfg()
    add_objssl_config(cfg)
    resnet = {"DEPTH": 50, "NORM": "BN", "STRIDE_IN_1X1": False}
    narrow = {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 16, "WIDTH_PER_GROUP": 4}
    cfg.MODEL.RESNETS.update(CfgNode(resnet | narrow))
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.merge_from_list([part for key, value in keys.items() for part in (key.replace("__", "."), value)])
    return cfg


def make_fpn_cfg(**keys: Any) -> CfgNode:
    fpn = {
        "MODEL__BACKBONE__NAME": "build_resnet_fpn_backbone",
        "MODEL__FPN__IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL__FPN__OUT_CHANNELS": 8,
        "MODEL__RPN__IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL__ANCHOR_GENERATOR__SIZES": [[32], [64], [128], [256], [512]],
        "MODEL__ROI_HEADS__NAME": "StandardROIHeads",
        "MODEL__ROI_HEADS__IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL__ROI_BOX_HEAD__NAME": "FastRCNNConvFCHead",
        "MODEL__ROI_BOX_HEAD__NUM_FC": 1,
        "MODEL__ROI_BOX_HEAD__FC_DIM": 8,
        "MODEL__ROI_BOX_HEAD__POOLER_RESOLUTION": 2,
        "MODEL__ROI_MASK_HEAD__CONV_DIM": 8,
    }
    return make_cfg(**fpn | keys)


def make_r18_fpn_cfg() -> CfgNode:
    r18 = {"DEPTH": 18, "STEM_OUT_CHANNELS": 64, "RES2_OUT_CHANNELS": 64, "WIDTH_PER_GROUP": 64}
    return make_fpn_cfg(**{f"MODEL__RESNETS__{key}": value for key, value in r18.items()})


def make_c4_cfg(**keys: Any) -> CfgNode:
    c4 = {"MODEL__RESNETS__OUT_FEATURES": ["res4"], "MODEL__ROI_HEADS__NAME": "Res5ROIHeads"}
    return make_cfg(**c4 | {"MODEL__ROI_MASK_HEAD__CONV_DIM": 8} | keys)


class SSLModel(nn.Module):
    """The names of an ObjectSSL model."""

    teacher: Any
    student: Any

    def __init__(self, cfg: CfgNode, *, has_teacher: bool = True) -> None:
        super().__init__()
        self.student = nn.Module()
        self.student.backbone = randomize(build_resnet_backbone(cfg, ShapeSpec(channels=3)))
        self.student.embedder = nn.Linear(2, 2)
        self.teacher = randomize(copy.deepcopy(self.student)) if has_teacher else None
        self.criterion = nn.Linear(2, 2)


def randomize(model: nn.Module) -> nn.Module:
    """Give every parameter and statistic a value of its own."""
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5)
    return model


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Writing


class Trainer:
    """A checkpointable with a state."""

    def __init__(self, state: Any = 0) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["state"]


def tiny_model(value: float = 1.0) -> nn.Module:
    model = nn.BatchNorm1d(1000)
    nn.init.constant_(model.weight, value)
    return model


def test_checkpoint_is_saved_with_metadata_and_read_back(tmp_path: Path) -> None:
    metadata = checkpoint_metadata(make_cfg(MODEL__META_ARCHITECTURE="ObjectSSL"))
    assert metadata["method"] == "SlotCon" and metadata["export_branch"] == "teacher"
    assert checkpoint_metadata(make_cfg())["method"] is checkpoint_metadata(make_cfg())["export_branch"] is None
    assert metadata["input_contract"] == {
        "format": "RGB",
        "pixel_mean": [123.675, 116.28, 103.53],
        "pixel_std": [58.395, 57.12, 57.375],
        "depth": 50,
        "stride_in_1x1": False,
        "padding": "symmetric",
        "num_groups": 1,
        "width_per_group": 4,
        "res2_out_channels": 16,
        "stem_out_channels": 8,
    }
    checkpointer = ObjSSLCheckpointer(tiny_model(3), str(tmp_path), metadata=metadata, trainer=Trainer(7))
    checkpointer.save("model_0000004", iteration=4)
    assert sorted(files_in(tmp_path)) == ["last_checkpoint", "model_0000004.pth"]
    assert torch.load(tmp_path / "model_0000004.pth", weights_only=True)["d2_objssl"] == metadata

    model, trainer = tiny_model(), Trainer()
    checkpointer = ObjSSLCheckpointer(model, str(tmp_path), metadata=metadata, trainer=trainer)
    rest = checkpointer.resume_or_load("", resume=True)
    assert rest == {"iteration": 4, "d2_objssl": metadata} and trainer.state == 7
    assert torch.equal(model.weight, torch.full((1000,), 3.0))
    assert CfgNode.load_cfg(metadata["config"]).MODEL.RESNETS.DEPTH == 50


def test_other_processes_do_not_save(tmp_path: Path) -> None:
    ObjSSLCheckpointer(tiny_model(), str(tmp_path), save_to_disk=False).save("model_0000000")
    assert files_in(tmp_path) == {}


def fail_with(code: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def write_garbage(_: Any, file: Any) -> None:
    file.write(b"PK" + bytes(1000))


def save_then_run_out_of_space(content: Any, file: Any) -> None:
    """What torch.save does: a RuntimeError that comes out of an OSError."""
    file.write(b"something")
    try:
        fail_with(errno.ENOSPC)()
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos") from None


@pytest.mark.parametrize(
    ("target", "replacement", "error", "message"),
    [
        ("torch.save", fail_with(errno.ENOSPC), OSError, r"No space left.*bytes needed, [\d,]+ bytes free.*--resume"),
        ("torch.save", save_then_run_out_of_space, OSError, "No space left"),
        ("os.replace", fail_with(errno.EACCES), OSError, "Permission denied"),
        ("os.fsync", fail_with(errno.EIO), OSError, "Input/output error"),
        ("torch.save", write_garbage, OSError, "What was written is not what is read again"),
    ],
)
def test_failed_save_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, replacement: Any, error: type, message: str
) -> None:
    checkpointer = ObjSSLCheckpointer(tiny_model(), str(tmp_path))
    periodic = PeriodicCheckpointer(checkpointer, period=1, max_iter=2, max_to_keep=1)
    periodic.step(0)
    before = files_in(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(target, replacement)
        for step in (periodic.step, lambda _: checkpointer.save("model_0000000")):
            with pytest.raises(error, match=f"(?s){message}") as caught:
                step(1)
            assert "model_000000" in str(caught.value)
    assert files_in(tmp_path) == before
    periodic.step(1)
    assert sorted(files_in(tmp_path)) == ["last_checkpoint", "model_0000001.pth", "model_final.pth"]


def test_full_disk_is_reported_as_such(tmp_path: Path) -> None:
    """With torch.save's own error, which is a RuntimeError, from a limit that the operating system enforces."""
    resource = pytest.importorskip("resource")
    model = nn.Linear(1000, 300)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*about 1,201,200 bytes needed") as caught:
            ObjSSLCheckpointer(model, str(tmp_path)).save("model_final")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / "model_final.pth")
    assert files_in(tmp_path) == {}


def test_last_checkpoint_stays_when_it_cannot_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = ObjSSLCheckpointer(tiny_model(), str(tmp_path))
    checkpointer.save("model_0000000")
    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda a, b: fail_with(errno.EIO)() if b.endswith("checkpoint") else replace(a, b))
        with pytest.raises(OSError, match="last_checkpoint"):
            checkpointer.save("model_0000001")
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000000.pth")
    assert sorted(files_in(tmp_path)) == ["last_checkpoint", "model_0000000.pth", "model_0000001.pth"]


def test_interrupted_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ObjSSLCheckpointer(tiny_model(), str(tmp_path)).save("model_0000000")
    assert files_in(tmp_path) == {}


def test_state_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    checkpointer = ObjSSLCheckpointer(tiny_model(), str(tmp_path), trainer=Trainer(Path("a")))
    with pytest.raises(CheckpointError, match=r"model_0000000.pth was not written.*pathlib"):
        checkpointer.save("model_0000000")
    assert files_in(tmp_path) == {}
    with pytest.raises(ValueError, match="must end in"):
        write_checkpoint({}, tmp_path / "a.txt")


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# Resuming


@pytest.fixture
def run(tmp_path: Path) -> ObjSSLCheckpointer:
    """A run with the checkpoints of the iterations 1, 3 and 5 (the last)."""
    model = tiny_model()
    checkpointer = ObjSSLCheckpointer(model, str(tmp_path), trainer=Trainer())
    for iteration in (1, 3, 5):
        nn.init.constant_(model.weight, iteration)
        checkpointer.checkpointables["trainer"].state = iteration
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    nn.init.constant_(model.weight, -1)
    checkpointer.checkpointables["trainer"].state = -1
    return checkpointer


@pytest.fixture
def warnings_of_run(run: ObjSSLCheckpointer) -> Iterator[list[str]]:
    """What `run` warns of, even if Detectron2 has stopped its logger's propagation."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    run.logger.addHandler(handler)
    yield messages
    run.logger.removeHandler(handler)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize(
    ("damage", "unreadable", "expected"),
    [
        ([], 0, 5),
        (["truncate 5"], 1, 3),
        (["truncate 5", "truncate 3"], 2, 1),
        (["delete 5"], 1, 3),
        (["empty last_checkpoint"], 1, 5),
        (["tag 3"], 0, 3),
        (["tag 3", "truncate 3"], 1, 1),  # 5 is not older: it is left over from another run
    ],
)
def test_resuming_passes_over_damaged_checkpoints(
    run: ObjSSLCheckpointer, warnings_of_run: list[str], damage: list[str], unreadable: int, expected: int
) -> None:
    folder = Path(run.save_dir)
    for what, which in map(str.split, damage):
        path = folder / f"model_000000{which}.pth"
        if what == "truncate":
            truncate(path)
        elif what == "delete":
            path.unlink()
        else:
            (folder / "last_checkpoint").write_text("" if what == "empty" else path.name)
    assert run.resume_or_load("unused.pth", resume=True)["iteration"] == expected
    assert run.model.weight[0] == run.checkpointables["trainer"].state == expected
    assert len(warnings_of_run) == (unreadable + 1 if unreadable else 0)
    assert not unreadable or f"model_000000{expected}.pth instead" in warnings_of_run[-1]


def test_resuming_without_a_readable_checkpoint_is_an_error(run: ObjSSLCheckpointer) -> None:
    for path in Path(run.save_dir).glob("*.pth"):
        truncate(path)
    with pytest.raises(CheckpointError, match=r"(?s)can be read:.*0000005.*0000003.*0000001.*--resume"):
        run.resume_or_load("", resume=True)


def test_resuming_fills_the_whole_model(run: ObjSSLCheckpointer) -> None:
    run.model.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"(?s)only 4 of 6 .*0000005.pth.*extra.weight.*fine-tuned"):
        run.resume_or_load("", resume=True)


def test_resumed_state_does_not_stay_in_the_file(tmp_path: Path) -> None:
    trainer = Trainer(torch.ones(1000))
    checkpointer = ObjSSLCheckpointer(tiny_model(), str(tmp_path), trainer=trainer)
    checkpointer.save("model_final")
    for load in (lambda: checkpointer.resume_or_load(""), lambda: checkpointer.load(str(tmp_path / "model_final.pth"))):
        load()
        raw = (tmp_path / "model_final.pth").read_bytes()
        with open(tmp_path / "model_final.pth", "r+b") as file:
            file.write(bytes(len(raw)))
        assert torch.equal(trainer.state, torch.ones(1000))
        (tmp_path / "model_final.pth").write_bytes(raw)


# Loading into models


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[SSLModel, Path]:
    """An ObjectSSL model and its checkpoint."""
    torch.manual_seed(0)
    cfg = make_cfg(MODEL__META_ARCHITECTURE="ObjectSSL")
    model, folder = SSLModel(cfg), tmp_path_factory.mktemp("pretrained")
    ObjSSLCheckpointer(model, str(folder), metadata=checkpoint_metadata(cfg), trainer=Trainer(9)).save("model_final")
    return model, folder / "model_final.pth"


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def load(model: nn.Module, path: Path | str, cfg: CfgNode | None = None, **kwargs: Any) -> None:
    """Load as training does, not resuming."""
    metadata = checkpoint_metadata(cfg or make_cfg())
    ObjSSLCheckpointer(model, metadata=metadata).resume_or_load(str(path), resume=False, **kwargs)


@pytest.mark.parametrize("export_branch", ["teacher", "student"])
def test_pretraining_checkpoint_fills_the_bottom_up_of_fpn(
    pretrained: tuple[SSLModel, Path], tmp_path: Path, export_branch: str
) -> None:
    source, path = pretrained
    content = load_checkpoint(path)
    content["d2_objssl"]["export_branch"] = export_branch
    torch.save(content, tmp_path / "a.pth")
    model = build_model(make_fpn_cfg())
    before = copy.deepcopy(model.state_dict())
    load(model, tmp_path / "a.pth")
    assert_same(model.backbone.bottom_up.state_dict(), getattr(source, export_branch).backbone.state_dict())
    after = model.state_dict()
    others = [name for name in before if not name.startswith("backbone.bottom_up.")]
    assert_same({name: after[name] for name in others}, {name: before[name] for name in others})


def test_pretraining_checkpoint_fills_a_c4_model(pretrained: tuple[SSLModel, Path]) -> None:
    source, path = pretrained
    model = build_model(make_c4_cfg())
    load(model, path)
    assert_same(to_detectron2(model.state_dict()), source.teacher.backbone.state_dict())
    assert any(name.startswith("roi_heads.res5.") for name in backbone_keys(model))


def test_last_stage_of_a_c4_model_is_taken_from_its_head() -> None:
    model = build_model(make_c4_cfg())
    converted = to_detectron2(model.state_dict())
    assert set(converted) == set(build_resnet_backbone(make_cfg(), ShapeSpec(channels=3)).state_dict())


def test_c4_model_without_its_last_stage_is_refused(pretrained: tuple[SSLModel, Path], tmp_path: Path) -> None:
    weights = {k: v for k, v in to_detectron2(load_checkpoint(pretrained[1])).items() if not k.startswith("res5.")}
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"(?s)only \d+ of \d+.*roi_heads.res5 +\d+"):
        load(build_model(make_c4_cfg()), tmp_path / "a.pth")


def test_pretraining_goes_on_from_a_pretraining_checkpoint(pretrained: tuple[SSLModel, Path]) -> None:
    source, path = pretrained
    model = SSLModel(make_cfg())
    load(model, path, require="all")
    assert_same(model.state_dict(), source.state_dict())


def test_teacher_starts_as_the_student_of_a_file_without_teacher(tmp_path: Path) -> None:
    source = SSLModel(make_cfg(), has_teacher=False)
    ObjSSLCheckpointer(source, str(tmp_path)).save("model_final")
    model = SSLModel(make_cfg())
    load(model, tmp_path / "model_final.pth", require="all")
    for branch in (model.student, model.teacher):
        assert_same(branch.state_dict(), source.student.state_dict())


@pytest.mark.parametrize("kind", ["bare.pth", "bare.pkl", "detector.pth", "torchvision.pth"])
def test_backbone_fills_student_and_teacher(tmp_path: Path, kind: str) -> None:
    detector = randomize(build_model(make_fpn_cfg()))
    bare = detector.backbone.bottom_up.state_dict()
    if kind == "detector.pth":
        ObjSSLCheckpointer(detector, str(tmp_path)).save("detector")
    elif kind == "bare.pkl":
        arrays = {name: value.numpy() for name, value in bare.items()}
        content = {"model": arrays, "__author__": "d2_objssl", "matching_heuristics": True}
        (tmp_path / kind).write_bytes(pickle.dumps(content))
    else:
        torch.save(bare if kind == "bare.pth" else {"state_dict": from_detectron2(bare)}, tmp_path / kind)
    model = SSLModel(make_cfg())
    load(model, tmp_path / kind)
    assert_same(model.student.backbone.state_dict(), bare)
    assert_same(model.teacher.backbone.state_dict(), bare)


def test_moco_file_fills_a_detector(tmp_path: Path) -> None:
    bare = randomize(build_resnet_backbone(make_cfg(), ShapeSpec(channels=3))).state_dict()
    query = {f"module.encoder_q.{name}": value for name, value in from_detectron2(bare).items()}
    key = {name.replace("encoder_q", "encoder_k"): value + 1 for name, value in query.items()}
    state = query | key | {"module.queue": torch.ones(2)}
    torch.save({"state_dict": state, "arch": "resnet50"}, tmp_path / "a.pth.tar")
    model = build_model(make_fpn_cfg())
    load(model, f"{tmp_path / 'a.pth.tar'}?matching_heuristics=True")
    assert_same(model.backbone.bottom_up.state_dict(), bare)
    with pytest.raises(CheckpointError, match='query "x=1"'):
        load(model, f"{tmp_path / 'a.pth.tar'}?x=1")


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_fine_tuned_model_loads_with_its_heads(tmp_path: Path, wrapper: str) -> None:
    cfg = make_fpn_cfg()
    source = randomize(build_model(cfg))
    torch.save({"model": {f"{wrapper}{k}": v for k, v in source.state_dict().items()}}, tmp_path / "a.pth")
    model = build_model(cfg)
    load(model, tmp_path / "a.pth", require="all")
    assert_same(model.state_dict(), source.state_dict())


def test_evaluation_needs_the_whole_model(pretrained: tuple[SSLModel, Path], tmp_path: Path) -> None:
    model = build_model(make_fpn_cfg())
    with pytest.raises(ValueError, match=r"(?s)parameters and statistics of the model.*rpn_head.*fine-tuned"):
        load(model, pretrained[1], require="all")
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is empty"):
        load(model, "", require="all")
    load(model, "")  # training from scratch
    with pytest.raises(ValueError, match='require is "some"'):
        load(model, pretrained[1], require="some")


def caffe2_name(name: str) -> str:
    """Detectron2's bare name as the Caffe2 zoo writes it, e.g. res2_0_branch2a_bn_s."""
    leaves = {"norm.weight": "bn_s", "norm.bias": "bn_b", "norm.running_mean": "bn_rm", "norm.running_var": "bn_riv"}
    branches = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
    *block, module, leaf = re.fullmatch(r"(stem|res\d\.\d+)\.(conv\d|shortcut)\.(.*)", name).groups()  # type: ignore
    if block == ["stem"]:
        return "conv1_w" if leaf == "weight" else f"res_conv1_{leaves[leaf]}"
    return f"{block[0].replace('.', '_')}_{branches[module]}_{leaves.get(leaf, 'w')}"


@pytest.mark.parametrize("has_statistics", [True, False])
def test_models_of_the_caffe2_zoo(tmp_path: Path, has_statistics: bool) -> None:
    bare = {
        name: value.numpy()
        for name, value in randomize(build_resnet_backbone(make_cfg(), ShapeSpec(channels=3))).state_dict().items()
        if not name.endswith("num_batches_tracked") and (has_statistics or "running" not in name)
    }
    blobs = {caffe2_name(name): value for name, value in bare.items()} | {"conv1_w_momentum": np.ones(1, np.float32)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"blobs": blobs, "cfg": "x"}, protocol=2))
    frozen = build_model(make_fpn_cfg(MODEL__RESNETS__NORM="FrozenBN"))
    load(frozen, tmp_path / "a.pkl")
    loaded = frozen.backbone.bottom_up.state_dict()
    assert_same({name: loaded[name] for name in bare}, {name: torch.from_numpy(v) for name, v in bare.items()})
    trainable = build_model(make_fpn_cfg())
    if has_statistics:
        load(trainable, tmp_path / "a.pkl")
    else:
        with pytest.raises(ValueError, match="running_mean"):
            load(trainable, tmp_path / "a.pkl")


# The guard


def test_checkpoint_of_which_no_name_matches_is_refused(tmp_path: Path) -> None:
    """Detectron2 would train from random weights."""
    cfg = make_r18_fpn_cfg()
    backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3)).state_dict()
    state = {f"pupil.trunk.{name.replace('res', 'stage')}": value for name, value in backbone.items()}
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"only 0 of 100 ") as caught:
        load(build_model(cfg), tmp_path / "a.pth", cfg)
    message = str(caught.value)
    assert str(tmp_path / "a.pth") in message and "MODEL.WEIGHTS" in message and "convert_checkpoint" in message
    assert re.search(r"^backbone\.bottom_up\.res2 +20 +backbone\.bottom_up\.res2\.0", message, re.MULTILINE)
    assert re.search(r"^pupil\.trunk +100", message, re.MULTILINE)


@pytest.mark.parametrize("layout", ["d2_objssl", "torchvision", "bare", "own"])
def test_wrong_shapes_are_refused(tmp_path: Path, layout: str) -> None:
    """Detectron2's name matching skips them."""
    bare = build_resnet_backbone(make_cfg(), ShapeSpec(channels=3)).state_dict()
    bare["res3.0.conv1.weight"] = torch.zeros(4, 16, 1, 1)
    state = {
        "d2_objssl": {f"student.backbone.{name}": value for name, value in bare.items()},
        "torchvision": from_detectron2(bare),
        "bare": bare,
        "own": OrderedDict((f"backbone.bottom_up.{name}", value) for name, value in bare.items()),
    }[layout]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError) as caught:
        load(build_model(make_fpn_cfg()), tmp_path / "a.pth")
    name = "backbone.bottom_up.res3.0.conv1.weight"
    assert f"{name}: (4, 16, 1, 1) in the file, (8, 16, 1, 1) in the model" in str(caught.value)
    assert "Shapes differ" in str(caught.value) and "only 264 of 265" in str(caught.value)


@pytest.mark.parametrize(
    ("dropped", "is_refused"),
    [("res4.2.conv2.norm.running_var", True), ("res5.0.shortcut.weight", True), ("num_batches_tracked", False)],
)
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_every_parameter_and_statistic_is_needed(tmp_path: Path, dropped: str, is_refused: bool, norm: str) -> None:
    bare = build_resnet_backbone(make_cfg(), ShapeSpec(channels=3)).state_dict()
    torch.save({name: value for name, value in bare.items() if not name.endswith(dropped)}, tmp_path / "a.pth")
    model = build_model(make_fpn_cfg(MODEL__RESNETS__NORM=norm))
    if is_refused:
        with pytest.raises(ValueError, match=rf"(?s)only 264 of 265.*backbone.bottom_up.{dropped}"):
            load(model, tmp_path / "a.pth")
        load(model, tmp_path / "a.pth", require="none")
    else:
        load(model, tmp_path / "a.pth")


def test_tensor_with_two_names_is_loaded_by_one_of_them(tmp_path: Path) -> None:
    model = nn.Module()
    model.a = model.b = nn.Linear(2, 2)
    torch.save({"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2)}, tmp_path / "a.pth")
    load(model, tmp_path / "a.pth", require="all")
    torch.save({"a.weight": torch.ones(2, 2)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="only 2 of 4"):
        load(model, tmp_path / "a.pth", require="all")


def test_table_is_logged_when_all_is_well(pretrained: tuple[SSLModel, Path], caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("d2_objssl.load_guard")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger.name):
        load(build_model(make_fpn_cfg()), pretrained[1])
    logger.removeHandler(caplog.handler)
    assert "265 of 265 parameters and statistics of the backbone were loaded" in caplog.text
    assert re.search(r"^backbone\.fpn_lateral2 +2 ", caplog.text, re.MULTILINE)  # missing, as it must be


def test_backbone_keys_leave_out_what_a_pretrained_network_does_not_have() -> None:
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.bottom_up = nn.Module()
    model.backbone.bottom_up.conv2_offset = nn.Conv2d(1, 1, 1)
    model.backbone.bottom_up.attention = nn.BatchNorm1d(1)
    model.backbone.bottom_up.attention.register_buffer("relative_position_index", torch.zeros(1))
    model.backbone.fpn_output2 = nn.Conv2d(1, 1, 1)
    leaves = ("weight", "bias", "running_mean", "running_var")
    assert backbone_keys(model) == [f"backbone.bottom_up.attention.{leaf}" for leaf in leaves]
    assert backbone_keys(model.backbone) == [f"bottom_up.attention.{leaf}" for leaf in leaves]


# The input contract


def test_input_contract_lists_every_mismatch() -> None:
    stored = input_contract(make_cfg())
    check_input_contract(stored, make_fpn_cfg())
    default = get_cfg()
    with pytest.raises(ValueError) as caught:
        check_input_contract(stored, default)
    for line in (
        "INPUT.FORMAT is BGR, the checkpoint was trained on RGB",
        "MODEL.PIXEL_STD is [1.0, 1.0, 1.0], the checkpoint was trained on [58.395, 57.12, 57.375]",
        "MODEL.RESNETS.STRIDE_IN_1X1 is True, the checkpoint was trained on False",
        "MODEL.RESNETS.WIDTH_PER_GROUP is 64, the checkpoint was trained on 4",
    ):
        assert line in str(caught.value)
    assert "DEPTH" not in str(caught.value)


def test_stride_does_not_matter_to_basic_blocks() -> None:
    cfg = make_r18_fpn_cfg()
    stored = input_contract(cfg) | {"stride_in_1x1": True}
    check_input_contract(stored, cfg)
    with pytest.raises(ValueError, match="STRIDE_IN_1X1 is False, the checkpoint was trained on True"):
        check_input_contract(input_contract(make_cfg()) | {"stride_in_1x1": True}, make_cfg())


def test_contract_is_checked_before_the_model_is_touched(pretrained: tuple[SSLModel, Path]) -> None:
    cfg = make_fpn_cfg(INPUT__FORMAT="BGR")
    model = build_model(cfg)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"(?s)model_final.pth.*INPUT.FORMAT is BGR"):
        load(model, pretrained[1], cfg)
    assert_same(model.state_dict(), before)


def test_files_with_torchvision_names_have_a_contract_too(tmp_path: Path) -> None:
    """Detectron2's default STRIDE_IN_1X1 True loads them without an error and is wrong by 21 % from res3 on."""
    cfg = make_fpn_cfg(MODEL__RESNETS__STRIDE_IN_1X1=True)
    bare = build_resnet_backbone(make_cfg(), ShapeSpec(channels=3)).state_dict()
    torch.save(from_detectron2(bare), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="STRIDE_IN_1X1 is True"):
        load(build_model(cfg), tmp_path / "a.pth", cfg)
    torch.save(bare, tmp_path / "a.pth")  # with Detectron2's names, anything may be
    load(build_model(cfg), tmp_path / "a.pth", cfg)
