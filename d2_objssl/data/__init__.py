"""Datasets, augmentations, the mapper and the training loader."""

from . import (  # noqa: F401  (they fill the catalogs and registries)
    classification,
    coco_stuff_27,
    datasets,
    depth_datasets,
    label_map_datasets,
    large_scale_jitter,
    lvis,
    sem_seg_augmentation,
)
from .build import build_test_loader, build_train_loader
from .collation import SSLBatch, collate_views
from .dataset_mapper import ObjSSLDatasetMapper
from .datasets import register_image_folders

__all__ = [
    "ObjSSLDatasetMapper",
    "SSLBatch",
    "build_test_loader",
    "build_train_loader",
    "collate_views",
    "register_image_folders",
]
