"""Files of weights: read without running what is in them, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from .safe_pickle import RefusedError, load_pickle, load_torch

_TORCH_SUFFIXES = (".pth", ".pt", ".pth.tar", ".ckpt", ".pyth")
_ACCEPTED = f"{', '.join(_TORCH_SUFFIXES)} (torch.save), .pkl (pickle of arrays), .npy of a dict, .npz, .safetensors"
_CHUNK = 1 << 20


class CheckpointError(ValueError):
    """A file of weights cannot be used; the message names the file, what was found and what is accepted."""


def load_checkpoint(path: str | os.PathLike[str], *, mmap: bool = True) -> dict[str, Any]:
    """Read a file of weights without running code from it.

    Args:
        path: a file, or an address that Detectron2's PathManager fetches ("detectron2://...", "https://...").
            `.pth`, `.pt`, `.pth.tar`, `.ckpt`, `.pyth`: torch.save. `.pkl`: a pickle of arrays. `.npy`: numpy.save of a
            dict, as DetCon's. `.npz`. `.safetensors`.
        mmap: let tensors stay in the file until they are used, where the format allows it. The file must not be
            overwritten in place meanwhile.

    Returns:
        The content: plain containers, numbers, strings, NumPy arrays and CPU tensors. An argparse.Namespace is
        read as a dict.

    Raises:
        CheckpointError: if the file is missing, empty, damaged, of another format, or holds anything else.
    """
    name = os.fspath(path)
    local = PathManager.get_local_path(name)
    if not os.path.isfile(local):
        raise CheckpointError(f"{name}: {'is a folder' if os.path.isdir(local) else 'no such file'}")
    if os.path.getsize(local) == 0:
        raise CheckpointError(f"{name}: the file is empty")
    try:
        content = _read(local, name, mmap)
    except RefusedError as error:
        raise CheckpointError(f"{name}: {error}. Files accepted: {_ACCEPTED}") from error
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # a damaged pickle raises anything
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"{name}: cannot be read; damaged, cut short or of another format ({type(error).__name__}: {reason}). "
            f"Files accepted: {_ACCEPTED}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{name}: holds one {type(content).__name__}, not a dict of weights")
    return content


def write_checkpoint(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a `.pth` (torch.save) or `.pkl` (pickle) file so that, at any moment, the old or the new one is there.

    The new file takes its place when it is on the disk and was read again as `load_checkpoint` reads it.

    Raises:
        OSError: if it cannot be written; the message has the bytes needed and free. Nothing is left behind.
        CheckpointError: if `content` holds objects that `load_checkpoint` would refuse.
        ValueError: if the name has another ending.
    """
    name = os.fspath(path)
    if not name.endswith((".pth", ".pkl")):
        raise ValueError(f"{name}: the name of a checkpoint to be written must end in .pth or .pkl")

    def write(file: BinaryIO) -> None:
        if name.endswith(".pth"):
            torch.save(content, file)
        else:
            pickle.dump(content, file, protocol=4)

    def verify(temporary: str) -> None:
        try:
            _read(temporary, name, mmap=True)
        except RefusedError as error:
            raise CheckpointError(f"{name} was not written; it could not be loaded again: {error}") from error
        except Exception as error:
            raise OSError(errno.EIO, f"What was written is not what is read again ({error})") from error

    write_atomically(name, write, verify=verify, num_bytes=_num_bytes(content))


def write_atomically(
    path: str | os.PathLike[str],
    write: Callable[[BinaryIO], object],
    *,
    verify: Callable[[str], object] | None = None,
    num_bytes: int | None = None,
) -> None:
    """Write a file so that, at any moment, the old or the new one is there, even after a power cut.

    Args:
        path: of the file. The temporary file is `.NAME.tmp` next to it.
        write: writes the content into an open file.
        verify: gets the path of the temporary file before it takes its place, and raises if that is bad.
        num_bytes: size to be expected, for the message if it fails.

    Raises:
        OSError: if it cannot be written; the file that was there before is untouched, the temporary one is deleted.
    """
    target = os.path.abspath(os.fspath(path))
    folder, basename = os.path.split(target)
    temporary = os.path.join(folder, f".{basename}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if verify is not None:
            verify(temporary)
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        cause = _os_error_behind(error)
        if cause is None:
            raise
        raise OSError(cause.errno, _explain(cause, folder, num_bytes), target) from error
    _sync_folder(folder)


def remove_leftovers(folder: str | os.PathLike[str]) -> list[str]:
    """Delete the temporary files of `write_atomically` whose process was killed; nobody may be writing to the folder.

    Returns:
        Their names.
    """
    names = [name for name in sorted(os.listdir(folder)) if name.startswith(".") and name.endswith(".tmp")]
    for name in names:
        os.unlink(os.path.join(folder, name))
    return names


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _read(local: str, name: str, mmap: bool) -> Any:
    """Read the file `local` as what its `name` says it is."""
    name = name.lower()
    if name.endswith((*_TORCH_SUFFIXES, ".pkl")):
        is_archive = zipfile.is_zipfile(local)  # what torch.save writes, since PyTorch 1.6, whatever it is called
        if is_archive:
            _check_archive(local)
        if is_archive or not name.endswith(".pkl"):
            return load_torch(local, mmap=mmap and is_archive)
        with open(local, "rb") as file:
            return load_pickle(file)
    if name.endswith(".npy"):
        return _read_npy(local)
    if name.endswith(".npz"):
        with np.load(local, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        if not all(isinstance(value, np.ndarray) for value in arrays.values()):
            raise RefusedError("it is another archive than one of numpy.savez")
        return arrays
    if name.endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise RefusedError("reading it needs the package safetensors (pip install safetensors)") from error
        return load_file(local)
    raise RefusedError("unknown kind of file, by its name")


def _check_archive(local: str) -> None:
    """Compare the checksums of a zip archive, which torch.load ignores: flipped bits would become weights."""
    with zipfile.ZipFile(local) as archive:
        # torch.serialization.set_crc32_options(False) leaves all of them 0.
        if any(entry.CRC for entry in archive.infolist()) and (damaged := archive.testzip()):
            raise zipfile.BadZipFile(f"the checksum of its entry {damaged} is wrong")


def _read_npy(local: str) -> Any:
    """Read what numpy.save wrote: an array, or a header and the pickle of an object."""
    with open(local, "rb") as file:
        is_short = np.lib.format.read_magic(file) == (1, 0)
        header = np.lib.format.read_array_header_1_0 if is_short else np.lib.format.read_array_header_2_0
        _, _, dtype = header(file)
        if dtype.hasobject:
            return load_pickle(file)
    return np.load(local, allow_pickle=False)


def _num_bytes(value: Any) -> int:
    """Bytes of all tensors and arrays in nested containers."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return int(value.nbytes)
    if isinstance(value, Mapping):
        return sum(_num_bytes(item) for item in value.values())
    return sum(_num_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0


def _os_error_behind(error: BaseException) -> OSError | None:
    """The OSError that `error` is or was raised from: torch.save reports a full disk as a RuntimeError."""
    if not isinstance(error, (OSError, RuntimeError)):
        return None
    current: BaseException | None = error
    while current is not None and not isinstance(current, OSError):
        current = current.__cause__ or current.__context__
    return current


def _explain(cause: OSError, folder: str, num_bytes: int | None) -> str:
    """What to tell the user about a file that could not be written."""
    needed = "" if num_bytes is None else f"about {num_bytes:,} bytes needed, "
    try:
        free = f"{shutil.disk_usage(folder).free:,} bytes free in {folder}"
    except OSError:
        free = f"{folder} cannot be reached"
    return (
        f"{cause.strerror or cause}; nothing was written, and what was there before is untouched ({needed}{free}). "
        "Free some space, correct the permissions or choose another folder (OUTPUT_DIR), then start again with --resume"
    )


def _sync_folder(folder: str) -> None:
    """Bring the names of a folder to the disk. Some network file systems cannot; then the files' content must do."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
