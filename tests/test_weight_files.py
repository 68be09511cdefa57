"""Files of weights: every format is read, nothing in them is run, damage is found."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from torch import nn

from d2_objssl.checkpoint import CheckpointError, load_checkpoint


def as_plain(value: Any) -> Any:
    """Arrays and tensors as (type, dtype, list), to be compared by ==."""
    if isinstance(value, dict):
        return {name: as_plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(as_plain, value))
    return (type(value).__name__, str(value.dtype), value.tolist()) if hasattr(value, "dtype") else value


ARRAYS: dict[str, Any] = {
    "float": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big_endian": np.arange(3, dtype=">i4"),
    "zero_dims": np.array(3),
    "empty": np.zeros((0, 3), np.float16),
    "bool": np.array([True, False]),
    "text": np.array(["a", "bc"]),
}


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_arrays_and_tensors_are_read(tmp_path: Path, protocol: int) -> None:
    tensors = {"t": torch.arange(6.0).view(2, 3).t(), "half": torch.ones(2).half(), "p": nn.Parameter(torch.ones(1))}
    content = {
        "model": OrderedDict(ARRAYS | tensors),
        "scalar": np.float64(0.5),
        "nested": [(ARRAYS["float"], None), {"set": {1}, "bytes": b"\xff", "complex": 1j}],
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    loaded = load_checkpoint(tmp_path / "a.pkl")
    content["model"]["p"] = torch.ones(1)
    assert as_plain(loaded) == as_plain(content)
    assert all(type(loaded["model"][name]) is np.ndarray and loaded["model"][name].flags.writeable for name in ARRAYS)


def test_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\nt"
        b"R(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x00\\x00\\x80\\xbf\\x00\\x00\\x00@'\ntb"
    )
    (tmp_path / "a.pkl").write_bytes(b"(dS'conv1_w'\n" + array + b"s.")
    assert as_plain(load_checkpoint(tmp_path / "a.pkl")) == {"conv1_w": ("ndarray", "float32", [-1.0, 2.0])}


@pytest.mark.parametrize(
    ("suffix", "zipped", "mmap"),
    [
        (".pth", True, True),
        (".pth", True, False),
        (".pth", False, True),
        (".pth.tar", False, False),
        (".pt", True, True),
    ]
    + [(suffix, True, True) for suffix in (".ckpt", ".pyth", ".PTH", ".pkl")],
)
def test_files_of_torch_save_are_read(tmp_path: Path, suffix: str, zipped: bool, mmap: bool) -> None:
    content = {
        "model": OrderedDict(w=torch.arange(4.0)),
        "args": argparse.Namespace(lr=0.1, sizes=[np.float32(2.0)], nested=argparse.Namespace(a=ARRAYS["float"])),
        "arrays": dict(ARRAYS),
        "epoch": 3,
    }
    path = tmp_path / f"a{suffix}"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    content["args"] = {"lr": 0.1, "sizes": [np.float32(2.0)], "nested": {"a": ARRAYS["float"]}}
    assert as_plain(load_checkpoint(path, mmap=mmap)) == as_plain(content)


def test_safetensors_are_read(tmp_path: Path) -> None:
    pytest.importorskip("safetensors.torch").save_file({"w": torch.arange(4.0)}, tmp_path / "a.safetensors")
    assert as_plain(load_checkpoint(tmp_path / "a.safetensors")) == {
        "w": ("Tensor", "torch.float32", [0.0, 1.0, 2.0, 3.0])
    }


def test_other_formats_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "a.npz", **ARRAYS)
    assert as_plain(load_checkpoint(tmp_path / "a.npz")) == as_plain(ARRAYS)
    (tmp_path / "a.safetensors").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        load_checkpoint(tmp_path / "a.safetensors")


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


class EvilBytes:
    """Hides a pickle in the bytes of a tensor's storage."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.storage._load_from_bytes, (self.raw,)


class ForgedType:
    """A number type that becomes object pointers: with NumPy's own functions, using its arrays crashes the process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("f8",), (3, "|", None, ("a",), {"a": (np.dtype("i8"), 0)}, 8, 1, 0)


def torch_bytes(content: Any, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def numpy_bytes(content: Any, is_archive: bool) -> bytes:
    buffer = io.BytesIO()
    array = np.array([content], dtype=object)
    np.savez(buffer, w=array) if is_archive else np.save(buffer, array)
    return buffer.getvalue()


def tar_bytes(content: Any) -> bytes:
    """A tar archive with the parts of what torch.save wrote before version 0.1.10."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            raw = pickle.dumps(content, protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return buffer.getvalue()


EVIL_FILES: dict[str, tuple[str, Callable[[Any], bytes]]] = {
    "zip": (".pth", lambda evil: torch_bytes({"model": {"w": evil}})),
    "legacy": (".pth.tar", lambda evil: torch_bytes({"model": {"w": evil}}, zipped=False)),
    "pt": (".pt", lambda evil: pickle.dumps({"w": evil}, protocol=2)),
    "ckpt": (".ckpt", lambda evil: torch_bytes(evil)),
    "pyth": (".pyth", lambda evil: torch_bytes({"model_state": evil})),
    "pickle": (".pkl", lambda evil: pickle.dumps({"model": {"w": evil}})),
    "zip_as_pickle": (".pkl", lambda evil: torch_bytes({"w": evil})),
    "object_array": (".pkl", lambda evil: pickle.dumps({"w": np.array([evil], dtype=object)})),
    "storage": (".pkl", lambda evil: pickle.dumps({"w": EvilBytes(torch_bytes(evil))})),
    "legacy_storage": (".pkl", lambda evil: pickle.dumps({"w": EvilBytes(torch_bytes(evil, zipped=False))})),
    "zip_tar": (".pth.tar", lambda evil: torch_bytes({"state_dict": {"w": evil}})),
    "tar": (".pth.tar", lambda evil: tar_bytes(evil)),
    "zip_as_npz": (".npz", lambda evil: torch_bytes({"w": evil})),
    "namespace": (".pth", lambda evil: torch_bytes({"args": argparse.Namespace(resume=evil)})),
    "safetensors": (".safetensors", lambda evil: torch_bytes(evil)),
    "npy": (".npy", lambda evil: numpy_bytes(evil, is_archive=False)),
    "npz": (".npz", lambda evil: numpy_bytes(evil, is_archive=True)),
}


@pytest.mark.parametrize("kind", EVIL_FILES)
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    suffix, make = EVIL_FILES[kind]
    path = tmp_path / f"evil{suffix}"
    path.write_bytes(make(Evil(tmp_path / "made")))
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as caught:
        load_checkpoint(path)
    assert not (tmp_path / "made").exists()
    assert "weights_only" not in str(caught.value)  # PyTorch's message tells how to run the code all the same
    if kind in ("zip", "legacy", "pt", "ckpt", "pyth", "pickle", "zip_as_pickle", "zip_tar", "namespace"):
        assert f"{os.mkdir.__module__}.mkdir" in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_types_configs_and_forged_arrays_are_refused(tmp_path: Path, suffix: str) -> None:
    def refuse(content: Any, message: str) -> None:
        path = tmp_path / f"a{suffix}"
        path.write_bytes(torch_bytes(content) if suffix == ".pth" else pickle.dumps(content))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)

    refuse({"cfg": CfgNode({"A": 1})}, r"fvcore.common.config.CfgNode|detectron2.config.config.CfgNode")
    refuse({"model": nn.Linear(1, 1)}, "Linear")
    refuse({"w": np.array(["a", None], dtype=object)}, "array of")
    refuse({"w": np.zeros(1, dtype=[("a", "i4")])}, "array of")
    refuse({"w": np.ndarray}, "type instead of data")
    refuse({"w": ForgedType()}, "array of")


BROKEN: dict[str, bytes] = {
    "a.pth": torch_bytes({"w": torch.ones(100)}),
    "a.pth.tar": torch_bytes({"w": torch.ones(100)}, zipped=False),
    "a.pkl": pickle.dumps({"w": np.ones(100)}),
    "a.npz": numpy_bytes(0, is_archive=True),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("damage", ["half", "last_byte", "empty", "html", "zeros"])
def test_damaged_files_are_reported_by_name(tmp_path: Path, name: str, damage: str) -> None:
    raw = BROKEN[name]
    damaged = {"half": raw[: len(raw) // 2], "last_byte": raw[:-1], "empty": b"", "html": b"<!DOCTYPE html><p>404"}
    (tmp_path / name).write_bytes(damaged.get(damage, bytes(len(raw))))
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / name))) as caught:
        load_checkpoint(tmp_path / name)
    assert ("is empty" if damage == "empty" else "Files accepted: .pth") in str(caught.value)


def test_flipped_bits_are_found(tmp_path: Path) -> None:
    """torch.load does not compare checksums: the damaged weights would load."""
    raw = bytearray(torch_bytes({"w": torch.ones(1000)}))
    raw[raw.index(np.float32(1).tobytes() * 10) + 3] ^= 64
    (tmp_path / "a.pth").write_bytes(raw)
    assert not torch.equal(torch.load(tmp_path / "a.pth", weights_only=True)["w"], torch.ones(1000))
    with pytest.raises(CheckpointError, match="checksum"):
        load_checkpoint(tmp_path / "a.pth")


def test_archive_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert zipfile.ZipFile(tmp_path / "a.pth").testzip() is not None
    assert torch.equal(load_checkpoint(tmp_path / "a.pth")["w"], torch.ones(3))


def test_paths_that_are_no_checkpoint_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1")
    torch.save([1], tmp_path / "list.pth")
    np.save(tmp_path / "a.npy", np.ones(2))
    cases = {"no.pth": "no such file", "": "is a folder", "a.yaml": "unknown kind"}
    cases |= {"list.pth": "one list", "a.npy": "one ndarray"}
    for name, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / name)
