"""Folders of region maps as tools/generate_masks.py leaves them, for tests that read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2_objssl.data.image_reading import read_rgb_image
from d2_objssl.data.region_files import MapSettings
from d2_objssl.data.region_writer import RegionWriter, begin_maps, finish_maps


def store_maps(
    root: Path,
    dataset_dicts: Sequence[dict[str, Any]],
    maps: Sequence[np.ndarray],
    *,
    overlapping: bool = False,
    resolution: str = "image",
) -> str:
    """Fill the folder `root` with one map (h, w) for each dataset dict that has a "region_key"; return its path."""
    begin_maps(root, MapSettings("test", {}, overlapping, resolution, ["test"]))
    with RegionWriter(root, "0", overlapping=overlapping) as writer:
        for d, region_map in zip(dataset_dicts, maps, strict=True):
            size = read_rgb_image(d["file_name"]).shape[:2]
            writer.write(d["region_key"], region_map, image_file=d["file_name"], image_size=size)
    finish_maps(root)
    return str(root)
