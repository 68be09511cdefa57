"""Depth maps in metres, as data sets store them, and the mapper that moves them with their images.

    H, W  size of an image, pixels

A depth map is a PNG of 16 bits, in which 0 means "no measurement". Its values are depths times "depth_scale" of the dataset
dict (KITTI: 256 a metre, NYUv2: 1000 a metre), or, where the dict names a "camera_file_name", Cityscapes' disparities.

Depths move with the pixels by the nearest one, so that no depth is made up between an object and what is behind it.
Resizing an image leaves its depths as they are: what a model learns holds for one focal length in pixels, so images of
training and tests should be resized by the same factor.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import check_image_size, read_image
from detectron2.utils.file_io import PathManager
from fvcore.transforms.transform import PadTransform, Transform

from .dataset_mapper import ObjSSLDatasetMapper
from .ground_truth import check_same_size, read_label_map
from .image_reading import check_image_file

_DISPARITY_SCALE = 256  # of Cityscapes: levels a pixel


def _move(transform: Transform, depth: np.ndarray) -> np.ndarray:
    return transform.apply_segmentation(depth)


def _resize(transform: T.ResizeTransform, depth: np.ndarray) -> np.ndarray:
    """By the pixel whose centre is nearest; for floats Detectron2 takes one up to half a pixel away."""
    size = (transform.new_w, transform.new_h)
    return cv2.resize(np.ascontiguousarray(depth), size, interpolation=cv2.INTER_NEAREST_EXACT)


def _pad(transform: PadTransform, depth: np.ndarray) -> np.ndarray:
    """With 0, whatever label the padding has: there is no measurement."""
    return np.pad(depth, ((transform.y0, transform.y1), (transform.x0, transform.x1)))


# TransformList.apply_depth: fvcore's way to a data type of one's own.
Transform.register_type("depth", _move)
T.ResizeTransform.register_type("depth", _resize)
PadTransform.register_type("depth", _pad)


def read_depth_map(dataset_dict: dict[str, Any]) -> np.ndarray:
    """Read the depth map of an image.

    Args:
        dataset_dict: "depth_file_name", and "depth_scale" (values a metre) or "camera_file_name".

    Returns:
        (h, w) float32, metres; 0: no measurement.

    Raises:
        OSError: naming the file, if it is missing or damaged.
        ValueError: naming the file, if it holds no depths of 16 bits, or the camera's file not what is needed of it.
    """
    file = dataset_dict.get("depth_file_name")
    if file is None:
        raise ValueError(
            f"{dataset_dict['file_name']} has no depth map (depth_file_name): its data set has other labels"
        )
    values = read_label_map(file)
    if 0 < values.max(initial=0) < 256:
        raise ValueError(f"{file}: the largest value is {values.max()}; depth maps are PNGs of 16 bits, this one has 8")
    if "camera_file_name" in dataset_dict:
        return disparity_to_depth(values, *_read_camera(dataset_dict["camera_file_name"]))
    return (values / dataset_dict["depth_scale"]).astype(np.float32)


def disparity_to_depth(values: np.ndarray, baseline: float, focal_length: float) -> np.ndarray:
    """Depth baseline * focal_length / d of Cityscapes' disparities d = (value - 1) / 256.

    Args:
        values: (h, w) integers as stored; 0: no measurement.
        baseline: between the two cameras, metres.
        focal_length: pixels.

    Returns:
        (h, w) float32, metres; 0: no measurement, or a disparity of 0, which is infinitely far.
    """
    disparity = (values - 1) / _DISPARITY_SCALE
    depth = np.zeros(values.shape, dtype=np.float32)
    np.divide(baseline * focal_length, disparity, out=depth, where=disparity > 0, casting="same_kind")
    return depth


def _read_camera(file: str) -> tuple[float, float]:
    """Baseline in metres and horizontal focal length in pixels, of a camera file of Cityscapes."""
    with PathManager.open(file) as f:
        try:
            camera = json.load(f)
            return float(camera["extrinsic"]["baseline"]), float(camera["intrinsic"]["fx"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no camera file with extrinsic.baseline and intrinsic.fx: {error!r}") from error


class DepthDatasetMapper(ObjSSLDatasetMapper):
    """Maps a dataset dict to {"image" (3, H, W) uint8, and the dict's other keys}.

    In training also "depth" (H, W) float32: metres, 0 where there is no measurement. Evaluators read depth maps themselves.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one dataset dict; see the class."""
        mapped = copy.deepcopy(dataset_dict)
        check_image_file(mapped["file_name"])
        image = read_image(mapped["file_name"], format=self.image_format)
        check_image_size(mapped, image)
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        mapped["image"] = torch.from_numpy(np.ascontiguousarray(aug_input.image.transpose(2, 0, 1)))
        if self.is_train:
            depth = read_depth_map(mapped)
            what = f"{mapped['depth_file_name']}, the depth map of {mapped['file_name']}"
            check_same_size(what, depth.shape, image.shape[:2])
            mapped["depth"] = torch.from_numpy(np.ascontiguousarray(transforms.apply_depth(depth)))
        return mapped
