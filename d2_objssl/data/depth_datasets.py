"""Data sets with depth maps, under DETECTRON2_DATASETS.

nyu_depth_v2_train  nyu_depth_v2/{nyudepthv2_train_files_with_gt.txt, sync/}
nyu_depth_v2_test   nyu_depth_v2/{nyudepthv2_test_files_with_gt.txt, official_splits/test/}
kitti_eigen_train   kitti/{kitti_eigen_train_files_with_gt.txt, raw/, gts/}
kitti_eigen_test    kitti/{kitti_eigen_test_files_with_gt.txt, raw/, gts/}
cityscapes_depth_{train,val}  cityscapes/{leftImg8bit, disparity, camera}/{train,val}/CITY/

The lists and the folders are those of BTS (Lee et al., 2019) and AdaBins (Bhat et al., CVPR 2021): a line has the image, the
depth map and the focal length, which is not used. Images whose depth map is "None" are left out: of KITTI's 23,488 and 697
images (Eigen et al., NeurIPS 2014) 23,158 and 652 remain.

What is scored, in the metadata: `depth_crop`, see `evaluation.depth.scored_area`, and `max_depth`, metres.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from .image_reading import missing_files

_KITTI_SCALE = 256  # values a metre
_NYU_SCALE = 1000


def load_listed_depths(list_file: str, image_root: str, depth_root: str, depth_scale: float) -> list[dict[str, Any]]:
    """Dataset dicts ("file_name", "image_id", "depth_file_name", "depth_scale") of "IMAGE DEPTH FOCAL" lines.

    Args:
        list_file: paths in it are relative to the two folders, with or without a leading slash.
        image_root, depth_root: the folders.
        depth_scale: values a metre.

    Raises:
        FileNotFoundError: if the list, or a file that it names, does not exist.
        ValueError: if a line has no two paths, or no line names a depth map.
    """
    if not os.path.isfile(list_file):
        raise FileNotFoundError(f"{list_file} does not exist; it is a list of github.com/cleinc/bts, train_test_inputs")
    with open(list_file) as f:
        lines = f.read().splitlines()
    dicts = []
    for number, line in enumerate(lines, start=1):
        image, depth, *_ = [*line.split(), "", ""]
        if image and not depth:
            raise ValueError(
                f'{list_file}, line {number}: "{line}" has no depth map; needed: image, depth map, focal length'
            )
        if image and depth != "None":
            paths = [os.path.join(root, p.lstrip("/")) for root, p in ((image_root, image), (depth_root, depth))]
            dicts.append({"file_name": paths[0], "image_id": image, "depth_file_name": paths[1]})
    if not dicts:
        raise ValueError(f"{list_file} names no image with a depth map")
    _check_files(list_file, dicts)
    return [{**d, "depth_scale": depth_scale} for d in dicts]


def load_cityscapes_depths(image_root: str, disparity_root: str, camera_root: str) -> list[dict[str, Any]]:
    """Dataset dicts ("file_name", "image_id", "depth_file_name", "camera_file_name") of Cityscapes' images.

    Args:
        image_root, disparity_root, camera_root: hold CITY/*_{leftImg8bit.png, disparity.png, camera.json}.

    Raises:
        FileNotFoundError: if there is no image, or a disparity or camera is missing.
    """
    dicts = []
    for path in sorted(Path(image_root).glob("*/*_leftImg8bit.png")):
        frame = os.path.join(path.parent.name, path.name.removesuffix("_leftImg8bit.png"))
        files = {"file_name": str(path), "depth_file_name": os.path.join(disparity_root, f"{frame}_disparity.png")}
        files["camera_file_name"] = os.path.join(camera_root, f"{frame}_camera.json")
        dicts.append({**files, "image_id": frame})
    if not dicts:
        raise FileNotFoundError(f"{image_root} has no images CITY/*_leftImg8bit.png")
    _check_files(image_root, dicts)
    return dicts


def _check_files(source: str, dicts: list[dict[str, Any]]) -> None:
    files = [file for d in dicts for key, file in d.items() if key.endswith("file_name")]
    if missing := missing_files(files):
        raise FileNotFoundError(
            f"{source}: {len(missing)} of the {len(files)} files of its images do not exist, for example {missing[0]}"
        )


def register_depth_datasets(root: str) -> None:
    """Enter them into the catalogs; nothing is read yet.

    Args:
        root: the dataset root.
    """
    nyu, kitti, cityscapes = (os.path.join(root, folder) for folder in ("nyu_depth_v2", "kitti", "cityscapes"))
    for split, folder, num_images in (
        ("train", "sync", 24_231),
        ("test", os.path.join("official_splits", "test"), 654),
    ):
        listed, images = os.path.join(nyu, f"nyudepthv2_{split}_files_with_gt.txt"), os.path.join(nyu, folder)
        load = partial(load_listed_depths, listed, images, images, _NYU_SCALE)
        files = {"list_file": listed, "image_root": images, "depth_root": images}
        _register(f"nyu_depth_v2_{split}", load, num_images, depth_crop="eigen", max_depth=10.0, **files)
    for split, num_images in (("train", 23_158), ("test", 652)):
        listed = os.path.join(kitti, f"kitti_eigen_{split}_files_with_gt.txt")
        images, depths = os.path.join(kitti, "raw"), os.path.join(kitti, "gts")
        load = partial(load_listed_depths, listed, images, depths, _KITTI_SCALE)
        files = {"list_file": listed, "image_root": images, "depth_root": depths}
        _register(f"kitti_eigen_{split}", load, num_images, depth_crop="garg_kitti", max_depth=80.0, **files)
    for split, num_images in (("train", 2_975), ("val", 500)):
        images, disparities, cameras = (
            os.path.join(cityscapes, x, split) for x in ("leftImg8bit", "disparity", "camera")
        )
        load = partial(load_cityscapes_depths, images, disparities, cameras)
        files = {"image_root": images, "depth_root": disparities, "camera_root": cameras}
        _register(f"cityscapes_depth_{split}", load, num_images, depth_crop="garg", max_depth=80.0, **files)


def _register(name: str, load: Callable[[], list[dict[str, Any]]], num_images: int, **metadata: Any) -> None:
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(evaluator_type="depth", num_images=num_images, **metadata)


register_depth_datasets(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
