"""The files of synthetic scenes: images, and labels as COCO, COCO panoptic, semantic maps and Pascal VOC.

`scenes.py` shows the folder. COCO's category ids 1 to 6 are `SHAPES`, and 7 is the background, which only the panoptic
labels have; a semantic map holds the same ids, but 0 for the background. Boxes are those of the visible pixels; the
scene's are continuous XYXY_ABS, COCO's x, y, width, height, and Pascal VOC's 1-based inclusive pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .scene_rendering import SHAPES, Scene, render_scene

VOC_SPLIT = "all"

_BACKGROUND_ID = len(SHAPES) + 1
_JPEG_QUALITY = 92


def mask_to_polygons(mask: NDArray[np.bool_]) -> list[list[int]]:
    """Outline a mask exactly: the COCO API turns the polygons back into the very same pixels.

    Args:
        mask: (H, W) bool, not empty.

    Returns:
        COCO polygons [x0, y0, x1, y1, ...] along pixel edges, one or more. As COCO polygons cannot have holes, a mask
        with a hole is cut along a column through it.
    """
    # In the doubled image, the contour pixel 2x or 2x - 1 lies beside the pixel edge x.
    doubled = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for contour, (_, _, _, parent) in zip(contours, hierarchy[0], strict=True):
        if parent >= 0:
            x, _, width, _ = cv2.boundingRect(contour)
            left, right = mask.copy(), mask.copy()
            column = (x + width // 2) // 2
            left[:, column:] = right[:, :column] = False
            return mask_to_polygons(left) + mask_to_polygons(right)
    polygons = []
    for contour in contours:
        edges = (contour[:, 0] + 1) // 2
        edges = edges[(edges != np.roll(edges, 1, 0)).any(1)]
        (dx, dy), (next_dx, next_dy) = (edges - np.roll(edges, 1, 0)).T, (np.roll(edges, -1, 0) - edges).T
        polygons.append(edges[dx * next_dy != dy * next_dx].ravel().tolist())  # the corners
    return polygons


def write_scene(index: int, *, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Draw scene `index` and write its own files.

    Args:
        index: of the scene, of the seed's.
        folder: the split's folder, with its subfolders.
        settings: of the split, as in scenes.json: "seed", "size" (height, width) in pixels, and "labels".

    Returns:
        The scene's part of the index files: "image", and "annotations" and "panoptic" if these are among the labels.
    """
    scene = render_scene(settings["seed"], index, tuple(settings["size"]))
    stem, labels = f"{index:06d}", settings["labels"]
    height, width = scene.instance_map.shape
    _write_image(folder / "images" / f"{stem}.jpg", scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    record: dict[str, Any] = {"image": {"id": index, "file_name": f"{stem}.jpg", "height": height, "width": width}}
    if "instances" in labels:
        record["annotations"] = _coco_annotations(index, scene)
    if "panoptic" in labels:
        # The id of a segment is R + 256 G + 65536 B; OpenCV writes BGR. Id 0 would be unlabelled.
        ids = np.pad(scene.instance_map[..., None] + np.uint8(1), ((0, 0), (0, 0), (2, 0)))
        _write_image(folder / "panoptic" / f"{stem}.png", ids)
        record["panoptic"] = {"image_id": index, "file_name": f"{stem}.png", "segments_info": _segments(scene)}
    if "sem_seg" in labels:
        _write_image(folder / "sem_seg" / f"{stem}.png", scene.sem_seg)
    if "voc" in labels:
        (folder / "voc" / "Annotations" / f"{stem}.xml").write_text(_voc_xml(stem, scene))
    return record


def _write_image(file: Path, image: NDArray[np.uint8], parameters: Sequence[int] = ()) -> None:
    success, data = cv2.imencode(file.suffix, image, parameters)
    assert success, file
    file.write_bytes(data.tobytes())


def _xywh(box: NDArray[np.float32]) -> list[int]:
    x0, y0, x1, y1 = (int(c) for c in box)
    return [x0, y0, x1 - x0, y1 - y0]


def _coco_annotations(index: int, scene: Scene) -> list[dict[str, Any]]:
    return [
        {
            "id": index * 10 + k + 1,  # not from a running number: the same in any subset; never 0, COCOeval's "none"
            "image_id": index,
            "category_id": int(category_id),
            "bbox": _xywh(box),
            "area": int(mask.sum()),
            "segmentation": mask_to_polygons(mask),
            "iscrowd": 0,
        }
        for k, (category_id, box, mask) in enumerate(zip(scene.category_ids, scene.boxes, scene.masks, strict=True))
    ]


def _segments(scene: Scene) -> list[dict[str, Any]]:
    """COCO panoptic's segments: 1 is the background, k + 2 is object k."""
    height, width = scene.instance_map.shape
    areas = np.bincount(scene.instance_map.ravel())
    boxes = [[0, 0, width, height], *map(_xywh, scene.boxes)]
    category_ids = [_BACKGROUND_ID, *scene.category_ids]
    return [
        {"id": k + 1, "category_id": int(category_id), "bbox": box, "area": int(area), "iscrowd": 0}
        for k, (category_id, box, area) in enumerate(zip(category_ids, boxes, areas, strict=True))
    ]


def _voc_xml(stem: str, scene: Scene) -> str:
    """Pascal VOC's annotation file, with boxes of 1-based inclusive pixels."""
    height, width = scene.instance_map.shape
    lines = [
        "<annotation>",
        f"  <folder>scenes</folder><filename>{stem}.jpg</filename>",
        f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
        "  <segmented>0</segmented>",
    ]
    for category_id, box, mask, full in zip(
        scene.category_ids, scene.boxes, scene.masks, scene.amodal_masks, strict=True
    ):
        x0, y0, x1, y1 = (int(c) for c in box)
        truncated = int(x0 == 0 or y0 == 0 or x1 == width or y1 == height)
        lines += [
            f"  <object><name>{SHAPES[category_id - 1]}</name><pose>Unspecified</pose>",
            f"    <truncated>{truncated}</truncated><occluded>{int((full & ~mask).any())}</occluded>"
            "<difficult>0</difficult>",
            f"    <bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>",
            "  </object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


def write_indices(folder: Path, settings: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    """Write the files that list all scenes.

    Args:
        folder: the split's folder, with its subfolders.
        settings: of the split, as in scenes.json: "version" and "labels".
        records: what `write_scene` returned for each scene, in their order.
    """
    labels = settings["labels"]
    things = [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(SHAPES, 1)]
    content: dict[str, Any] = {
        "info": {"description": "d2_objssl synthetic scenes", "version": str(settings["version"])},
        "licenses": [],
        "images": [record["image"] for record in records],
    }
    if "instances" in labels:
        annotations = [annotation for record in records for annotation in record["annotations"]]
        text = json.dumps({**content, "annotations": annotations, "categories": things})
        (folder / "annotations" / "instances.json").write_text(text)
    if "panoptic" in labels:
        background = {"id": _BACKGROUND_ID, "name": "background", "supercategory": "background"}
        categories = [{**c, "isthing": 1} for c in things] + [{**background, "isthing": 0}]
        panoptic = [record["panoptic"] for record in records]
        text = json.dumps({**content, "annotations": panoptic, "categories": categories})
        (folder / "annotations" / "panoptic.json").write_text(text)
    if "voc" in labels:
        stems = [Path(record["image"]["file_name"]).stem for record in records]
        (folder / "voc" / "ImageSets" / "Main" / f"{VOC_SPLIT}.txt").write_text("\n".join(stems) + "\n")
        (folder / "voc" / "JPEGImages").symlink_to(Path("..") / "images", target_is_directory=True)
