"""Unpickling without running the pickle: containers, numbers, strings, tensors and arrays are rebuilt, nothing else.

A pickle is a program that calls what it names. NumPy's own reconstruction functions are not harmless either:
`numpy.dtype.__setstate__` lets a file declare plain bytes to be object pointers. The stand-ins below rebuild arrays
from plain bytes and a checked number type, for our own unpickler and for that of `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import codecs
import collections
import io
import pickle
import re
import tarfile
from typing import Any, BinaryIO

import numpy as np
import torch


class RefusedError(Exception):
    """The file holds something that is not rebuilt; the message continues the sentence "FILE: ..."."""


def load_pickle(file: BinaryIO) -> Any:
    """Read a pickle, also one of Python 2.

    Raises:
        RefusedError: if it holds anything but containers, numbers, strings, arrays and tensors.
        Exception: of any kind, if it is damaged.
    """
    return _resolve(_Unpickler(file, encoding="latin1").load(), set())


def load_torch(path: str, *, mmap: bool) -> Any:
    """Read a file of `torch.save` on the CPU; an argparse.Namespace in it becomes a dict.

    Args:
        path: of the file.
        mmap: let the tensors stay in the file; not possible in the format before PyTorch 1.6.

    Raises:
        RefusedError: if it holds anything but containers, numbers, strings, arrays and tensors.
        Exception: of any kind, if it is damaged.
    """
    if tarfile.is_tarfile(path):
        raise RefusedError("PyTorch before 0.1.10 wrote it, as a tar archive; save it again with a newer version")
    return _resolve(_torch_load(path, mmap=mmap), set())


def _torch_load(source: Any, *, mmap: bool = False) -> Any:
    try:
        with torch.serialization.safe_globals(_TORCH_GLOBALS):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise RefusedError(_refusal(refused[1])) from error
        # The rest of the message tells how to run the file all the same.
        reason = re.search(r"WeightsUnpickler error: *(.*)", str(error))
        raise pickle.UnpicklingError(reason[1] if reason else "no file of torch.save") from error


class _Unpickler(pickle.Unpickler):
    """Refuses every global but those of the table before it is called."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_ByolExperimentState":  # of byol.byol_experiment, wherever that was
            return _ByolState
        if re.fullmatch(r"(byol|optax)(\..*)?", module) and name.endswith("State"):
            return _OptimizerState
        try:
            return _PICKLE_GLOBALS[f"{module}.{name}"]
        except KeyError:
            raise RefusedError(_refusal(f"{module}.{name}")) from None


def _refusal(name: str) -> str:
    return (
        f"it refers to {name}, which is not loaded: a checkpoint may hold plain containers, numbers, strings, "
        "arrays and tensors only (save the state_dict() of a model, the dump() of a config)"
    )


class _DType:
    """Stands in for numpy.dtype: numbers, strings, objects (see `_to_array`), no records."""

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch(r"[biufc]\d+|[?OSU]\d*", code):
            raise RefusedError(f'it holds an array of type "{code}"; numbers and strings are read')
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, byte_order, *parts = state[:5]
        if any(part is not None for part in parts):
            raise RefusedError("it holds an array of records; numbers and strings are read")
        self.dtype = self.dtype.newbyteorder(byte_order)


class _Array:
    """Stands in for the empty array that is about to get its state."""

    def __init__(self, *_: object) -> None:
        self.array: Any = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *_, shape, dtype, is_fortran, raw = state
        self.array = _to_array(raw, dtype, shape, "F" if is_fortran else "C")


class _ArrayType:
    """Stands in for the class numpy.ndarray, which is only named."""


class _Namespace:
    """Stands in for argparse.Namespace, which training scripts like to save."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.content = dict(state)


class _ByolState:
    """Stands in for the named tuple in DeepMind's files of BYOL, by the order of its fields; becomes a dict."""

    def __new__(cls, *values: Any) -> dict[str, Any]:  # type: ignore[misc]
        fields = ("online_params", "target_params", "online_state", "target_state", "opt_state")
        return dict(zip(fields, values, strict=True))


class _OptimizerState:
    """Stands in for the named tuples of optax, which nobody needs; becomes an empty tuple."""

    def __new__(cls, *_: Any) -> tuple[()]:  # type: ignore[misc]
        return ()


def _to_array(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> Any:
    """An array from plain bytes; the object itself where it is the only item of a 0-d array (numpy.save of a dict)."""
    if isinstance(dtype, _DType) and dtype.dtype.hasobject and shape == () and isinstance(raw, list) and len(raw) == 1:
        return raw[0]
    if isinstance(raw, str):  # written by Python 2
        raw = raw.encode("latin1")
    if not isinstance(raw, (bytes, bytearray)) or not isinstance(dtype, _DType) or dtype.dtype.hasobject:
        raise RefusedError("it holds an array of objects; numbers and strings are read")
    return np.ndarray(shape, dtype.dtype, buffer=bytes(raw), order=order).copy(order)


def _to_scalar(dtype: Any, raw: Any) -> Any:
    return _to_array(raw, dtype, ())[()]


def _to_storage(raw: bytes) -> Any:
    return _torch_load(io.BytesIO(raw))


def _to_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: object) -> torch.Tensor:
    return torch.empty(0, dtype=storage.dtype).set_(storage, offset, size, stride)


def _to_parameter(tensor: torch.Tensor, *_: object) -> torch.Tensor:
    return tensor


def _to_jax_array(make: Any, args: Any, state: Any, *_: object) -> _Array:
    """What JAX calls with the three parts of a pickled NumPy array."""
    if make is not _Array:
        raise RefusedError("it holds a JAX array that is not made of a NumPy array")
    array = _Array(*args)
    array.__setstate__(state)
    return array


def _to_dict(content: Any = ()) -> dict[Any, Any]:
    """What stands in for haiku's immutable mappings."""
    if not isinstance(content, dict):
        raise RefusedError("it holds a mapping of haiku that is not made of a dict")
    return content


_BUILTINS = (bytes, bytearray, complex, set, frozenset)
# numpy.core became numpy._core in NumPy 2; __builtin__ is Python 2's builtins.
_NUMPY_GLOBALS: dict[str, Any] = {
    "numpy.dtype": _DType,
    "numpy.ndarray": _ArrayType,
    **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _to_scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _to_array for core in ("core", "_core")},
}
_PICKLE_GLOBALS: dict[str, Any] = {
    **_NUMPY_GLOBALS,
    **{f"{m}.{t.__name__}": t for m in ("builtins", "__builtin__") for t in _BUILTINS},
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": codecs.encode,  # bytes, in old protocols
    **{f"haiku._src.data_structures.{name}": _to_dict for name in ("FlatMap", "FlatMapping", "frozendict")},
    "jax._src.array._reconstruct_array": _to_jax_array,
    "jax._src.device_array.reconstruct_device_array": _to_jax_array,  # before JAX 0.4
    "torch.storage._load_from_bytes": _to_storage,
    "torch._utils._rebuild_tensor_v2": _to_tensor,
    "torch._utils._rebuild_parameter": _to_parameter,
}
# torch.load knows containers and tensors itself. It gives an instance its state only if its class is named, too.
_TORCH_GLOBALS: list[Any] = [
    *((stand_in, name) for name, stand_in in _NUMPY_GLOBALS.items()),
    (_Namespace, "argparse.Namespace"),
    (bytes, "builtins.bytes"),  # of an empty array
    *((cls, f"{cls.__module__}.{cls.__qualname__}") for cls in (_Array, _DType, _Namespace)),
]


def _resolve(value: Any, seen: set[int]) -> Any:
    """Replace the stand-ins in nested containers (in dicts and lists: in place) by what they stand for.

    Args:
        value: the content of a file, or a part of it.
        seen: ids of the dicts and lists that are done: a pickle may hold cycles.
    """
    if isinstance(value, _Array):
        return _resolve(value.array, seen)
    if isinstance(value, (_DType, type)):
        raise RefusedError("it holds a type instead of data")
    if isinstance(value, _Namespace):
        return _resolve(value.content, seen)
    if type(value) is tuple:
        return tuple(_resolve(item, seen) for item in value)
    if isinstance(value, (dict, list)) and id(value) not in seen:
        seen.add(id(value))
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            value[key] = _resolve(item, seen)
    return value
