"""Average precision of Pascal VOC on any data set in its layout (see data/voc_datasets.py).

The matching and the curve are Detectron2's `voc_eval`, so on VOC itself the figures are those of its
`PascalVOCDetectionEvaluator`. What differs is what goes in and out:

* Annotations are read by `read_annotation`: what AP does not need (pose, truncated) may be absent, and so may "difficult".
  Fractions of pixels are rounded.
* Ids of images and names of classes may hold spaces and slashes.
* A class without an object to find is left out of the means. There it counts as 0, or makes the mean NaN.
* Every class' AP is returned, too.
"""

from __future__ import annotations

import logging
import os
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.pascal_voc_evaluation import parse_rec, voc_eval
from detectron2.utils import comm

from ..data.voc_datasets import VOCObject, read_annotation, read_split

logger = logging.getLogger(__name__)

IOU_THRESHOLDS = tuple(range(50, 100, 5))  # per cent


class VOCEvaluator(DatasetEvaluator):
    """AP, AP50, AP75 and the AP of every class, in per cent; AP is the mean over IoU thresholds of 0.5 to 0.95.

    The metadata of the data set has `dirname`, `split`, `thing_classes`, and `year`: 2007 for the curve at 11 points of
    recall, 2012 for all points.
    """

    def __init__(self, dataset_name: str) -> None:
        """
        Args:
            dataset_name: name in the catalogs.

        Raises:
            ValueError: for another year.
        """
        self._metadata = MetadataCatalog.get(dataset_name)
        if self._metadata.year not in (2007, 2012):
            raise ValueError(f'The metadata of "{dataset_name}" has the year {self._metadata.year}; known: 2007, 2012')
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._predictions: list[tuple[str, int, str]] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Add the predictions for some images.

        Args:
            inputs: with "image_id".
            outputs: with "instances": pred_boxes (XYXY_ABS, original-image pixels), scores, pred_classes.
        """
        for mapped, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            boxes = instances.pred_boxes.tensor.tolist()
            scored = zip(boxes, instances.scores.tolist(), instances.pred_classes.tolist(), strict=True)
            for (x1, y1, x2, y2), score, label in scored:
                # Rounded as Detectron2 does; pixels count from 1.
                line = f"{score:.3f} {x1 + 1:.1f} {y1 + 1:.1f} {x2:.1f} {y2:.1f}"
                self._predictions.append((mapped["image_id"], label, line))

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Gather the predictions of all processes.

        Returns:
            {"bbox": name -> per cent}, in the main process; None in the others.

        Raises:
            ValueError: if the model predicts a class that the data set does not have.
        """
        gathered = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return None
        metadata = self._metadata
        ids = read_split(metadata.dirname, metadata.split)
        files = (os.path.join(metadata.dirname, "Annotations", f"{image_id}.xml") for image_id in ids)
        objects = [read_annotation(file).objects for file in files]
        predictions = [prediction for part in gathered for prediction in part]
        precisions = self._average_precisions(ids, objects, predictions)
        to_find = {obj.name for in_image in objects for obj in in_image if not obj.difficult}
        present = [name in to_find for name in metadata.thing_classes]
        if not all(present):
            absent = [name for name, found in zip(metadata.thing_classes, present, strict=True) if not found]
            logger.warning("%s has no object of the classes %s: they are left out", metadata.name, ", ".join(absent))
        means = precisions[present].mean(axis=0)
        results = {"AP": means.mean(), "AP50": means[0], "AP75": means[IOU_THRESHOLDS.index(75)]}
        of_classes = np.where(present, precisions.mean(axis=1), np.nan)
        results |= {f"AP-{name}": ap for name, ap in zip(metadata.thing_classes, of_classes, strict=True)}
        return {"bbox": {name: float(value) for name, value in results.items()}}

    def _average_precisions(
        self,
        ids: Sequence[str],
        objects: Sequence[Sequence[VOCObject]],
        predictions: Sequence[tuple[str, int, str]],
    ) -> np.ndarray:
        """(classes, IoU thresholds) float64 in per cent; anything where a class has no object."""
        classes = list(self._metadata.thing_classes)
        unknown = {label for _, label, _ in predictions} - set(range(len(classes)))
        if unknown:
            raise ValueError(
                f'The model predicts classes {sorted(unknown)}, but "{self._metadata.name}" has {len(classes)} '
                "(0 is the first): check MODEL.ROI_HEADS.NUM_CLASSES"
            )
        index = {image_id: i for i, image_id in enumerate(ids)}
        lines: list[list[str]] = [[] for _ in classes]
        for image_id, label, line in predictions:
            lines[label].append(f"{index[image_id]} {line}\n")
        is_2007 = self._metadata.year == 2007
        with tempfile.TemporaryDirectory(prefix="voc_eval_") as name:
            # voc_eval reads files: numbers stand for images and classes in them.
            folder = Path(name)
            (folder / "images.txt").write_text("".join(f"{i}\n" for i in range(len(ids))))
            for i, in_image in enumerate(objects):
                (folder / f"{i}.xml").write_bytes(_to_xml(in_image, classes))
            for label, of_class in enumerate(lines):
                (folder / f"class{label}.txt").write_text("".join(of_class))
            detections, annotations, images = (str(folder / n) for n in ("class{}.txt", "{}.xml", "images.txt"))
            with np.errstate(invalid="ignore"):  # 0 / 0 where a class has no object
                precisions = [
                    [
                        voc_eval(detections, annotations, images, str(label), iou / 100, is_2007)[2]
                        for iou in IOU_THRESHOLDS
                    ]
                    for label in range(len(classes))
                ]
        parse_rec.cache_clear()  # it would keep what it read from files that are gone
        return 100 * np.array(precisions)


def _to_xml(objects: Sequence[VOCObject], classes: Sequence[str]) -> bytes:
    """An annotation with all that `voc_eval` wants to read, and the index of a class for its name."""
    root = ET.Element("annotation")
    for obj in objects:
        node = ET.SubElement(root, "object")
        values = {"name": classes.index(obj.name), "pose": "", "truncated": 0, "difficult": int(obj.difficult)}
        for tag, value in values.items():
            ET.SubElement(node, tag).text = str(value)
        box = ET.SubElement(node, "bndbox")
        for tag, coordinate in zip(("xmin", "ymin", "xmax", "ymax"), obj.box, strict=True):
            ET.SubElement(box, tag).text = str(round(coordinate))
    return ET.tostring(root)
