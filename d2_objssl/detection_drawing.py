"""Pictures of detections and of ground truth, drawn by Detectron2's `Visualizer` in the colours of `region_colors`.

Images are (H, W, 3) uint8 RGB arrays, 0-255. Boxes are XYXY_ABS, pixels of the image as given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.data import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import Visualizer

from .visualization import region_colors

# Detections are drawn on images enlarged to about this side: boxes and text have a width of their own.
_DETECTION_SIDE = 400


def draw_detections(
    image: np.ndarray, instances: Instances, metadata: Metadata, score_threshold: float = 0.5
) -> np.ndarray:
    """Draw boxes, masks, classes and scores that a detector predicted; each class has its own colour.

    Args:
        image: (H, W, 3) uint8 RGB.
        instances: predictions in the frame of `image`: "pred_boxes", "pred_classes", "scores" and optionally
            "pred_masks".
        metadata: its "thing_classes" are the names of the classes.
        score_threshold: detections below it are left out.

    Returns:
        (H', W', 3) uint8 RGB; small images are enlarged by a whole factor, so that lines and text stay readable.
    """
    instances = instances.to("cpu")
    instances = instances[instances.scores >= score_threshold]
    classes = instances.pred_classes.tolist()
    texts = [f"{_class_name(c, metadata)} {s:.0%}" for c, s in zip(classes, instances.scores.tolist(), strict=True)]
    masks = instances.pred_masks if instances.has("pred_masks") else None
    return _draw_objects(image, instances.pred_boxes.tensor.numpy(), masks, classes, texts)


def draw_ground_truth(dataset_dict: dict[str, Any], metadata: Metadata) -> np.ndarray:
    """Draw the annotations of a dataset dict, in the colours and at the size of `draw_detections`.

    Args:
        dataset_dict: in Detectron2's format; the image is read from its "file_name".
        metadata: its "thing_classes" are the names of the classes.

    Returns:
        (H', W', 3) uint8 RGB.
    """
    image = read_image(dataset_dict["file_name"], "RGB")
    objects = dataset_dict.get("annotations", [])
    boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in objects]
    classes = [x["category_id"] for x in objects]
    texts = [_class_name(x["category_id"], metadata) + (", crowd" if x.get("iscrowd") else "") for x in objects]
    masks = [x["segmentation"] for x in objects] if all("segmentation" in x for x in objects) else None
    return _draw_objects(image, np.asarray(boxes, dtype=np.float64).reshape(-1, 4), masks, classes, texts)


def _class_name(category: int, metadata: Metadata) -> str:
    names = metadata.get("thing_classes", None)
    return names[category] if names else f"class {category}"


def _draw_objects(image: np.ndarray, boxes: np.ndarray, masks: Any, classes: list[int], texts: list[str]) -> np.ndarray:
    scale = max(1, round(_DETECTION_SIDE / max(image.shape[:2])))
    colors = region_colors(max(classes, default=-1) + 1)[classes] / 255
    visualizer = Visualizer(image, scale=scale)
    output = visualizer.overlay_instances(
        boxes=boxes, masks=masks, labels=texts, assigned_colors=[tuple(c) for c in colors], alpha=0.4
    )
    return output.get_image()
