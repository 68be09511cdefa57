"""Writes a folder of region maps, see `region_files.py`, by many processes; whatever is killed goes on where it stopped.

One process calls `begin_maps`, then each fills a `RegionWriter`, then one calls `finish_maps`. Until then there are
ROOT/index.partial.json with the settings and ROOT/index.part-NAME.tsv, one for each writer, to which lines are appended.
A map is written under a temporary name and renamed, and then its line follows: an image is done if its line is complete
and its file has the size that the line states.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..structures import NO_REGION
from ..weight_files import write_atomically
from .region_files import (
    ENTRIES,
    FORMAT_VERSION,
    INDEX,
    PARTIAL_INDEX,
    MapEntry,
    MapSettings,
    file_bytes,
    map_path,
    read_entries,
    read_settings,
)
from .region_png import encode_png


def begin_maps(root: str | os.PathLike[str], settings: MapSettings) -> None:
    """Make the folder `root`, or go on with one of the same settings, complete or not.

    Raises:
        ValueError: if `root` holds maps of other settings, or anything else.
    """
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / (INDEX if (folder / INDEX).exists() else PARTIAL_INDEX)
    if index.exists():
        old, new = asdict(read_settings(index)[0]), asdict(settings)
        differences = [f"{k} is {old[k]}, not {new[k]}" for k in new if k != "command" and old[k] != new[k]]
        if differences:
            raise ValueError(f"{folder} holds other region maps ({'; '.join(differences)}): name another folder")
    elif any(not name.startswith(".") for name in os.listdir(folder)):
        raise ValueError(f"{folder} is not empty, but holds no region maps: name another folder")
    else:
        _write_json(index, {"format_version": FORMAT_VERSION} | asdict(settings))


class RegionWriter:
    """Writes maps, and their lines into a part of the index; a context manager."""

    def __init__(self, root: str | os.PathLike[str], part: str, *, overlapping: bool) -> None:
        """
        Args:
            root: a folder that `begin_maps` prepared.
            part: name of the part, such as the rank: no other process writes to it.
            overlapping: whether maps are bit sets.
        """
        self.root = Path(root)
        self.overlapping = overlapping
        self._folders: set[Path] = set()
        self._part = open(self.root / f"index.part-{part}.tsv", "a+b")  # noqa: SIM115
        self._part.seek(0)
        self._part.truncate(self._part.read().rfind(b"\n") + 1)  # without the line that a kill cut short

    def write(
        self, key: str, region_map: np.ndarray, *, image_file: str | os.PathLike[str], image_size: tuple[int, int]
    ) -> MapEntry:
        """Write the map of an image.

        Args:
            key: "region_key" of its dataset dict.
            region_map: (h, w) integers: region ids and NO_REGION, or bit sets.
            image_file: the image; the size of the file is noted.
            image_size: (H, W).

        Raises:
            ValueError: if an id is too large for a file: beyond 65534, or beyond 15 in a bit set.
        """
        stored = region_map if self.overlapping else region_map - NO_REGION
        data = encode_png(stored, f"The region map of {os.fspath(image_file)}")
        path = map_path(self.root, key)
        if path.parent not in self._folders:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._folders.add(path.parent)
        # Without fsync, which would take longer than the rest: what a power cut damages is found by size or checksum.
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(data)
        os.replace(temporary, path)
        largest = int(stored.max())
        return self._append(
            MapEntry(
                key=key,
                image_bytes=file_bytes(image_file),
                image_height=image_size[0],
                image_width=image_size[1],
                map_height=region_map.shape[0],
                map_width=region_map.shape[1],
                num_ids=largest.bit_length() if self.overlapping else largest,
                map_bytes=len(data),
            )
        )

    def write_unreadable(self, key: str, *, image_file: str | os.PathLike[str]) -> MapEntry:
        """Note that an image cannot be read. It needs no map: training replaces it by another image."""
        return self._append(MapEntry(key, file_bytes(image_file), 0, 0, 0, 0, 0, 0))

    def _append(self, entry: MapEntry) -> MapEntry:
        self._part.write(_to_line(entry))
        self._part.flush()
        return entry

    def close(self) -> None:
        """Close the part of the index."""
        self._part.close()

    def __enter__(self) -> RegionWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def completed_images(root: str | os.PathLike[str]) -> dict[str, int]:
    """What is done in a folder that `begin_maps` prepared: the size of each image file in bytes, by key."""
    return {key: entry.image_bytes for key, entry in _intact_entries(Path(root)).items()}


def finish_maps(root: str | os.PathLike[str]) -> None:
    """Merge the parts of the index when all writers are closed: the folder is complete."""
    folder = Path(root)
    settings, _ = read_settings(folder / (INDEX if (folder / INDEX).exists() else PARTIAL_INDEX))
    done = _intact_entries(folder)
    lines = [_to_line(done[key]) for key in sorted(done)]
    write_atomically(folder / ENTRIES, lambda file: file.writelines(lines))
    counts = {"num_images": len(done), "num_unreadable": sum(entry.map_bytes == 0 for entry in done.values())}
    _write_json(folder / INDEX, {"format_version": FORMAT_VERSION} | asdict(settings) | counts)
    for file in (*_parts(folder), folder / PARTIAL_INDEX):
        file.unlink(missing_ok=True)


def _intact_entries(folder: Path) -> dict[str, MapEntry]:
    """By key, the entries of the index and its parts whose map is as they say; the last one of each key."""
    entries: dict[str, MapEntry] = {}
    index = folder / ENTRIES
    for file in [index, *_parts(folder)] if index.exists() else _parts(folder):
        for entry in read_entries(file, skip_bad=file != index):
            if entry.map_bytes == 0 or file_bytes(map_path(folder, entry.key)) == entry.map_bytes:
                entries[entry.key] = entry
    return entries


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("index.part-*.tsv"))


def _to_line(entry: MapEntry) -> bytes:
    return ("\t".join(map(str, entry)) + "\n").encode()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))
