"""The dataset dicts of DATASETS.TRAIN and DATASETS.TEST, checked: names, files, sizes and labels."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts, print_instances_class_histogram
from detectron2.data.build import (
    check_metadata_consistency,
    filter_images_with_few_keypoints,
    filter_images_with_only_crowd_annotations,
)

from .bad_images import check_test_files
from .datasets import register_image_folders
from .known_sizes import check_datasets, check_size
from .labelled_images import take_fraction
from .region_keys import assign_region_keys, find_image_roots
from .region_maps import FileRegions, RegionSource, build_region_source
from .semantic_pairs import load_pair_dicts


def load_dataset_dicts(cfg: CfgNode) -> list[dict[str, Any]]:
    """Dataset dicts of DATASETS.TRAIN; for pretraining only the paths, and what INPUT.REGIONS.SOURCE needs.

    With INPUT.PAIRS a dict stands for a pair (image, class), not for an image.

    Raises:
        FileNotFoundError, ValueError: for a folder that is missing or holds no image, and for images without the labels
            or files that the source of regions needs; see also `known_sizes.py`.
    """
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty; name a data set, or a folder as ('images:/path/to/folder',)")
    register_image_folders([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    check_datasets(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
    check_datasets(cfg.DATASETS.TEST, "DATASETS.TEST")
    if cfg.INPUT.SSL.NUM_VIEWS > 0 and cfg.INPUT.PAIRS.SOURCE != "none":
        return load_pair_dicts(cfg)
    if cfg.INPUT.SSL.NUM_VIEWS > 0:
        return _load_for_pretraining(cfg, build_region_source(cfg))
    return _load_for_fine_tuning(cfg)


def load_test_dicts(cfg: CfgNode, name: str) -> list[dict[str, Any]]:
    """Dataset dicts of one set of DATASETS.TEST, those of images without objects included.

    Raises:
        OSError: naming images that are missing or empty; FileNotFoundError also as `check_datasets`.
        ValueError: see `known_sizes.py`.
    """
    register_image_folders([name])
    check_datasets([name], "DATASETS.TEST")
    proposal_files = None
    if cfg.MODEL.LOAD_PROPOSALS:
        proposal_files = [cfg.DATASETS.PROPOSAL_FILES_TEST[list(cfg.DATASETS.TEST).index(name)]]
    dicts = get_detection_dataset_dicts(name, filter_empty=False, proposal_files=proposal_files)
    check_size(name, len(dicts), require_complete=cfg.DATASETS.REQUIRE_COMPLETE)
    check_test_files(dicts, name)
    return dicts


def _load_whole(cfg: CfgNode, name: str, proposal_file: str | None = None) -> list[dict[str, Any]]:
    """Dataset dicts of one data set, those without objects included."""
    proposal_files = None if proposal_file is None else [proposal_file]
    dicts = get_detection_dataset_dicts(
        name, filter_empty=False, check_consistency=False, proposal_files=proposal_files
    )
    check_size(name, len(dicts), require_complete=cfg.DATASETS.REQUIRE_COMPLETE)
    return dicts


def _load_for_fine_tuning(cfg: CfgNode) -> list[dict[str, Any]]:
    """As `get_detection_dataset_dicts`, which would leave out images before they are counted."""
    names = list(cfg.DATASETS.TRAIN)
    proposal_files = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else [None] * len(names)
    dicts: list[dict[str, Any]] = []
    for name, proposal_file in zip(names, proposal_files, strict=True):
        dicts += _load_whole(cfg, name, proposal_file)
    dicts = take_fraction(cfg, dicts)
    if "annotations" not in dicts[0]:
        return dicts
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        dicts = filter_images_with_only_crowd_annotations(dicts)
    if cfg.MODEL.KEYPOINT_ON:
        dicts = filter_images_with_few_keypoints(dicts, cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE)
    if not dicts:
        raise ValueError(f"No image of DATASETS.TRAIN {names} has an object (DATALOADER.FILTER_EMPTY_ANNOTATIONS)")
    if class_names := MetadataCatalog.get(names[0]).get("thing_classes"):
        check_metadata_consistency("thing_classes", names)
        print_instances_class_histogram(dicts, class_names)
    return dicts


def _load_for_pretraining(cfg: CfgNode, region_source: RegionSource | None) -> list[dict[str, Any]]:
    names = cfg.DATASETS.TRAIN
    kept: list[dict[str, Any]] = []
    for name in names:
        dicts = _load_whole(cfg, name)
        if region_source is None:
            kept += [{k: d[k] for k in ("file_name", "image_id") if k in d} for d in dicts]
        else:
            kept += region_source.prepare(dicts, MetadataCatalog.get(name))
    if isinstance(region_source, FileRegions):
        assign_region_keys(kept, find_image_roots(names))
    if region_source is not None:
        region_source.check(kept)
    return kept
