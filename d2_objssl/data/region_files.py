"""Region maps of a data set in a folder: its format, the check before training, and how a map is read.

    ROOT/maps/KEY.png    8-bit PNG, 16-bit where the values need it. A label map holds id + 1, so that 0 is NO_REGION; a
                         bit set of overlapping regions is stored as it is.
    ROOT/index.tsv       a line of `MapEntry` for each image, sorted by key
    ROOT/index.json      `MapSettings`, format version and number of images; written last: ROOT is complete

KEY names the image, see `region_keys.py`. `region_writer.py` writes such a folder. H, W = size of an image in pixels,
h, w = size of a map: (H, W), or that of a feature map of the whole image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..structures import NO_REGION
from .region_keys import image_files_by_key
from .region_png import read_png

FORMAT_VERSION = 1
RESOLUTIONS = ("image", "features")
INDEX, PARTIAL_INDEX, ENTRIES = "index.json", "index.partial.json", "index.tsv"

_NUM_EXAMPLES = 5  # that a message names


@dataclass(frozen=True)
class MapSettings:
    """How the maps of a folder were made.

    Attributes:
        source: name of what made them.
        options: its settings, as JSON knows them.
        overlapping: whether the maps are bit sets of overlapping regions instead of label maps.
        resolution: "image": maps are (H, W). "features": smaller, of equal aspect up to a cell.
        dataset_names: the data sets.
        command: what completes the folder, for messages; "" if there is none. Not compared.
    """

    source: str
    options: dict[str, Any]
    overlapping: bool
    resolution: str
    dataset_names: list[str]
    command: str = ""

    def __post_init__(self) -> None:
        assert self.resolution in RESOLUTIONS, self.resolution


class MapEntry(NamedTuple):
    """A line of the index. An image that could not be read has no map: all but `image_bytes` is 0."""

    key: str
    image_bytes: int  # size of the image file; -1 where there is none
    image_height: int
    image_width: int
    map_height: int
    map_width: int
    num_ids: int  # largest region id + 1
    map_bytes: int  # size of the map's file


class RegionIndex:
    """The maps of a complete folder. It holds no entries, so that copies of it in loader workers are small.

    Attributes:
        root: the folder.
        settings: how the maps were made.
        num_images: how many images the folder covers.
    """

    def __init__(self, root: str, settings: MapSettings, num_images: int) -> None:
        self.root = root
        self.settings = settings
        self.num_images = num_images

    @property
    def overlapping(self) -> bool:
        """Whether the maps are bit sets."""
        return self.settings.overlapping

    @classmethod
    def load(cls, root: str | os.PathLike[str]) -> RegionIndex:
        """Open a folder.

        Raises:
            ValueError: if it holds no maps, or is not complete; then with the command that completes it.
        """
        folder = Path(root)
        if (folder / INDEX).exists():
            settings, content = read_settings(folder / INDEX)
            return cls(str(folder), settings, content["num_images"])
        if (folder / PARTIAL_INDEX).exists():
            settings, _ = read_settings(folder / PARTIAL_INDEX)
            raise ValueError(f"{folder} (INPUT.REGIONS.ROOT): the region maps are incomplete.{_advice(settings)}")
        raise ValueError(f"{folder} (INPUT.REGIONS.ROOT) holds no region maps: make them with tools/generate_masks.py")

    def check(self, dataset_dicts: Iterable[dict[str, Any]], max_region_ids: int) -> None:
        """Check, by the sizes of the files, that every image has its map, before training starts.

        Args:
            dataset_dicts: of all data sets, with "region_key".
            max_region_ids: MODEL.SSL.DETCON.MAX_REGION_IDS; ids must be below it.

        Raises:
            ValueError: that counts the maps that are missing, truncated, of another image, or have too large ids.
        """
        remaining = image_files_by_key(dataset_dicts)
        num_images = len(remaining)
        problems: dict[str, list[str]] = {}
        num_ids = 0
        for entry in read_entries(Path(self.root) / ENTRIES):
            image_file = remaining.pop(entry.key, None)
            if image_file is None:
                continue
            num_ids = max(num_ids, entry.num_ids)
            for problem in self._find_problems(entry, image_file, max_region_ids):
                problems.setdefault(problem, []).append(entry.key)
        if remaining:
            problems["missing from the index"] = list(remaining)
        if not problems:
            return
        lines = [f"\n  {len(keys)} {problem}: {_examples(keys)}" for problem, keys in problems.items()]
        if num_ids > max_region_ids:
            lines.append(
                f"\n  The largest region id is {num_ids - 1}: set MODEL.SSL.DETCON.MAX_REGION_IDS to {num_ids}, or keep "
                "fewer regions (tools/generate_masks.py --max-regions)"
            )
        raise ValueError(
            f"{self.root} (INPUT.REGIONS.ROOT): region maps do not fit the {num_images} images of the data set:"
            + "".join(lines)
            + _advice(self.settings)
        )

    def _find_problems(self, entry: MapEntry, image_file: str, max_region_ids: int) -> Iterator[str]:
        # An image that is missing is not the maps' problem: training replaces it.
        if file_bytes(image_file) not in (-1, entry.image_bytes):
            yield "made of another image file (its size in bytes differs)"
        if entry.map_bytes > 0:
            num_bytes = file_bytes(map_path(self.root, entry.key))
            if num_bytes == -1:
                yield "without a file"
            elif num_bytes != entry.map_bytes:
                yield "truncated (the size of the file in bytes differs)"
        if entry.num_ids > max_region_ids:
            yield f"with ids beyond {max_region_ids - 1}"

    def read(self, key: str, height: int, width: int) -> np.ndarray:
        """Read the map of an image.

        Args:
            key: "region_key" of its dataset dict.
            height, width: H, W of the image as it was read.

        Returns:
            (h, w) int32: region ids and NO_REGION, or bit sets where `overlapping`.

        Raises:
            OSError: naming the file, if it is missing or damaged.
            ValueError: naming file and sizes, if it is the map of an image of another size, or aspect.
        """
        path = map_path(self.root, key)
        stored = read_png(path)
        if not _fits(stored.shape, (height, width), self.settings.resolution):
            raise ValueError(
                f"The region map {path} is {stored.shape[0]} x {stored.shape[1]} (height x width), but its image is "
                f"{height} x {width}: make the maps anew"
            )
        return stored if self.overlapping else stored + NO_REGION


def map_path(root: str | os.PathLike[str], key: str) -> Path:
    """File of the map of the image `key`."""
    return Path(root, "maps", f"{key}.png")


def file_bytes(path: str | os.PathLike[str]) -> int:
    """Size of a file in bytes; -1 where there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def read_settings(path: Path) -> tuple[MapSettings, dict[str, Any]]:
    """Settings in an INDEX or PARTIAL_INDEX, and all that the file holds."""
    try:
        content = json.loads(path.read_text())
        version = content["format_version"]
        settings = MapSettings(**{field.name: content[field.name] for field in fields(MapSettings)})
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: cannot read this index of region maps: {error!r}") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: its format has the version {version}; this d2_objssl reads {FORMAT_VERSION}")
    return settings, content


def read_entries(path: Path, *, skip_bad: bool = False) -> Iterator[MapEntry]:
    """Entries of a file; lines that are damaged or cut short are skipped or raise a ValueError."""
    with open(path, "rb") as file:
        for line in file:
            try:
                key, *numbers = line.decode().split("\t")
                if not line.endswith(b"\n"):
                    raise ValueError("the line is cut short")
                yield MapEntry(key, *map(int, numbers))
            except (ValueError, TypeError) as error:
                if not skip_bad:
                    raise ValueError(f"{path}: cannot read the line {line!r}: {error}") from error


def _fits(map_size: tuple[int, ...], image_size: tuple[int, int], resolution: str) -> bool:
    """Whether a map may be that of an image; strides and padding add up to one cell to each side of "features"."""
    if resolution == "image":
        return map_size == image_size
    ratio = image_size[1] / image_size[0]
    return abs(map_size[0] * ratio - map_size[1]) <= 1 + ratio


def _examples(keys: list[str]) -> str:
    return ", ".join(keys[:_NUM_EXAMPLES]) + (", ..." if len(keys) > _NUM_EXAMPLES else "")


def _advice(settings: MapSettings) -> str:
    return f"\nMake what is missing with: {settings.command}" if settings.command else ""
