"""Names for the images of a data set that stay the same when it moves: region maps are filed under them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.data import MetadataCatalog

# What a line of text cannot hold, and the sign that marks it; lone surrogates stand for bytes that are no UTF-8.
_SPECIAL = re.compile("[\x00-\x1f\x7f%\ud800-\udfff]")
# Of a file or folder in a key, in UTF-8: file systems take 255, and files have ".", ".png" and ".tmp" besides.
_MAX_NAME_BYTES = 240


def find_image_roots(dataset_names: Iterable[str]) -> list[str]:
    """Folders of images in the metadata of registered data sets; none for a data set whose metadata has none."""
    metadata = [MetadataCatalog.get(name) for name in dataset_names]
    roots = [m.get("image_root") or m.get("image_dir") or m.get("dirname") for m in metadata]
    return [root for root in roots if root]


def assign_region_keys(dataset_dicts: Sequence[dict[str, Any]], image_roots: Sequence[str]) -> None:
    """Add "region_key" to every dataset dict: name of the folder of images / path of the image below it, printable.

    Args:
        dataset_dicts: of one or several data sets, complete: the folder in common must not depend on a selection.
        image_roots: folders of images, from `find_image_roots`. An image belongs to the innermost one that it lies
            below. Images below none, as where a glob names them, belong to the folder that they have in common.

    Raises:
        ValueError: if two images get one key; it names both.
    """
    assert not isinstance(image_roots, str)
    paths = [os.path.abspath(d["file_name"]) for d in dataset_dicts]
    roots = sorted({os.path.abspath(os.path.expanduser(root)) for root in image_roots}, key=len, reverse=True)
    outside = {os.path.dirname(p) for p in paths if _root_of(p, roots) is None}
    if outside:
        roots.append(os.path.commonpath(outside))
    for dataset_dict, path in zip(dataset_dicts, paths, strict=True):
        root = _root_of(path, roots)
        assert root is not None
        key = path[len(os.path.dirname(root)) :].strip(os.sep)
        dataset_dict["region_key"] = os.sep.join(map(_shorten, _SPECIAL.sub(_escape, key).split(os.sep)))
    image_files_by_key(dataset_dicts)


def _root_of(path: str, roots: Iterable[str]) -> str | None:
    """The first folder that `path` lies below."""
    return next((root for root in roots if path.startswith(root.rstrip(os.sep) + os.sep)), None)


def image_files_by_key(dataset_dicts: Iterable[dict[str, Any]]) -> dict[str, str]:
    """File of each image by "region_key"; an image that is listed twice appears once.

    Args:
        dataset_dicts: of one or several data sets.

    Raises:
        ValueError: if two images have one key; it names both.
    """
    files: dict[str, str] = {}
    for dataset_dict in dataset_dicts:
        key, file = dataset_dict["region_key"], dataset_dict["file_name"]
        first = files.setdefault(key, file)
        if first != file and os.path.abspath(first) != os.path.abspath(file):
            raise ValueError(
                f'Region maps are filed under the name of the folder of images and the path below it. "{key}" is that '
                f"of two images, {first} and {file}: rename a folder, or use one data set at a time"
            )
    return files


def _shorten(name: str) -> str:
    """A name that a file system takes; the end of one that is too long becomes "%~" and its hash."""
    if len(name.encode()) <= _MAX_NAME_BYTES:
        return name
    suffix = "%~" + hashlib.sha256(name.encode()).hexdigest()[:32]
    return name.encode()[: _MAX_NAME_BYTES - len(suffix)].decode(errors="ignore") + suffix


def _escape(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in os.fsencode(match[0]))
