"""LVIS v1, read without the package `lvis`.

Detectron2's registration of lvis_v1_train and lvis_v1_val needs that package only to open a JSON file, and the package brings
an opencv-python that takes the place of the OpenCV that this package needs. Here both names get a loader that returns the
same dicts (tests/data/test_lvis.py compares them).
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from typing import Any

from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

logger = logging.getLogger(__name__)


def load_lvis(json_file: str, image_root: str) -> list[dict[str, Any]]:
    """Dataset dicts of a JSON file in LVIS' format, sorted by image id.

    Args:
        json_file: its annotations may be missing, as those of the test sets.
        image_root: the folder with train2017 and val2017; LVIS draws from both of COCO's sets.

    Returns:
        Detectron2's dicts, plus "neg_category_ids" and "not_exhaustive_category_ids", which count from 1.

    Raises:
        ValueError: if the file is of another format.
    """
    with PathManager.open(json_file) as f:
        content = json.load(f)
    by_image = defaultdict(list)
    for annotation in content.get("annotations", ()):
        by_image[annotation["image_id"]].append(annotation)
    num_classes = len(content["categories"])
    dicts = []
    for image in sorted(content["images"], key=lambda image: image["id"]):
        if "coco_url" not in image:
            raise ValueError(f"{json_file}: image {image['id']} has no coco_url: this is not LVIS' format")
        record = {key: image[key] for key in ("height", "width")}
        record["file_name"] = os.path.join(image_root, *image["coco_url"].split("/")[-2:])
        record["image_id"] = image["id"]
        for key in ("not_exhaustive_category_ids", "neg_category_ids"):
            record[key] = image.get(key, [])
        record["annotations"] = [_convert(a, num_classes, json_file) for a in by_image[image["id"]]]
        dicts.append(record)
    logger.info("Loaded %d images in LVIS' format from %s", len(dicts), json_file)
    return dicts


def _convert(annotation: dict[str, Any], num_classes: int, json_file: str) -> dict[str, Any]:
    polygons, category = annotation["segmentation"], annotation["category_id"]
    if not polygons or any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
        raise ValueError(f"{json_file}: annotation {annotation['id']} has no polygon, or one of less than 3 points")
    if not 1 <= category <= num_classes:
        raise ValueError(
            f"{json_file}: annotation {annotation['id']} is of class {category}; they are 1 to {num_classes}"
        )
    box = {"bbox": annotation["bbox"], "bbox_mode": BoxMode.XYWH_ABS}
    return {**box, "category_id": category - 1, "segmentation": polygons}


def register_lvis(root: str) -> None:
    """Let lvis_v1_train and lvis_v1_val be read by `load_lvis` from lvis/ and coco/ below the dataset root."""
    images = os.path.join(root, "coco")
    for name in ("lvis_v1_train", "lvis_v1_val"):
        json_file = os.path.join(root, "lvis", f"{name}.json")
        DatasetCatalog.remove(name)
        DatasetCatalog.register(name, lambda json_file=json_file: load_lvis(json_file, images))


register_lvis(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
