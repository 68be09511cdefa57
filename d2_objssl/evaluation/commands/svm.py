"""`evaluate.py svm`: linear support vector machines on frozen features, the "VOC07 linear" of the papers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from ...data import register_image_folders
from ...data.classification_datasets import common_class_names
from ...data.known_sizes import check_datasets, check_size, expected_size
from ...engine import setup_cfg
from ...weight_names import NUM_BLOCKS
from ..features import extract_features, load_pooled_backbone
from ..probes import ClassResult, evaluate_classes, import_sklearn, presence_labels
from ..results import config_identity, weights_identity, write_record
from .options import check_outputs, positive

SUMMARY = "which classes are in an image, by linear SVMs on frozen features (VOC07 classification)"

RANDOM = "random"
_TASK = "linear SVM"


def run(args: argparse.Namespace) -> None:
    """Print, and store, the average precision of every class and its mean."""
    start = time.perf_counter()
    check_outputs(args)
    import_sklearn()  # whether it is there, before the features are computed
    cfg = build_cfg(args)
    names = {"--train": args.train, "--test": args.test}
    for option, name in names.items():
        register_image_folders([name])
        check_datasets([name], option)
    class_names = common_class_names([*names.values()])
    images = {option: DatasetCatalog.get(name) for option, name in names.items()}
    for option, name in names.items():
        check_size(name, len(images[option]), require_complete=cfg.DATASETS.REQUIRE_COMPLETE)
    data: list[np.ndarray] = []
    labels = [presence_labels(images[option], name, class_names) for option, name in names.items()]
    model = load_pooled_backbone(cfg, seed=args.seed)
    for option, name in names.items():
        features = extract_features(
            model,
            images[option],
            short_side=cfg.INPUT.CLASSIFICATION.TEST_SHORT_SIDE,
            crop_size=cfg.INPUT.CLASSIFICATION.CROP_SIZE,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            description=name,
        )
        data.append(features)
    results = evaluate_classes(data[0], labels[0], data[1], labels[1], class_names, num_jobs=max(args.num_workers, 1))
    print(format_results(results))
    if args.output:
        counts = {"num_train_images": len(data[0]), "num_images": len(data[1])}
        record = make_record(args, cfg, results, **counts)
        write_record(args.output, record | {"wall_time_s": round(time.perf_counter() - start, 1)})
        print(args.output)


def build_cfg(args: argparse.Namespace) -> CfgNode:
    """The config of the backbone: of --config-file, or a ResNet of --depth with the backbone contract of the configs.

    Raises:
        FileNotFoundError, ValueError: as `setup_cfg`.
    """
    weights = "" if args.weights == RANDOM else args.weights
    opts = ["MODEL.WEIGHTS", weights, *args.opts]
    if not args.config_file:
        contract: dict[str, Any] = {
            "MODEL.BACKBONE.NAME": "build_objssl_resnet_backbone",
            "MODEL.BACKBONE.FREEZE_AT": 0,
            "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
            "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
            "MODEL.RESNETS.DEPTH": args.depth,
            "MODEL.RESNETS.NORM": "BN",
            "MODEL.RESNETS.OUT_FEATURES": ["res5"],
            "MODEL.RESNETS.RES2_OUT_CHANNELS": 256 if args.depth >= 50 else 64,
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
            "INPUT.FORMAT": "RGB",
        }
        opts = [*(str(x) for item in contract.items() for x in item), *opts]
    return setup_cfg(args.config_file, opts)


def format_results(results: dict[str, ClassResult]) -> str:
    """The table of the classes, in percent, and the line of the mean."""
    rows: list[list[Any]] = [
        [name, r.cost, 100 * r.cross_validation_ap, 100 * r.ap, 100 * r.train_share, 100 * r.test_share]
        for name, r in results.items()
    ]
    means = [f"mean of {len(rows)}", "", *(sum(row[i] for row in rows) / len(rows) for i in range(2, 6))]
    headers = ["class", "cost", "AP, 3-fold", "AP, test", "% of train images", "% of test images = AP by chance"]
    return tabulate([*rows, means], headers, floatfmt=("", "g", ".1f", ".1f", ".1f", ".1f"))


def make_record(
    args: argparse.Namespace,
    cfg: CfgNode,
    results: dict[str, ClassResult],
    *,
    num_train_images: int,
    num_images: int,
) -> dict[str, Any]:
    """The record of a run, but for its time; see `results.py`. Metrics are percentages.

    Args:
        args, cfg, results: options, config of the backbone, result of every class.
        num_train_images, num_images: that were learned from and tested on.
    """
    count = len(results)
    metrics = {"mAP": 100 * sum(r.ap for r in results.values()) / count}
    metrics |= {"mAP_by_chance": 100 * sum(r.test_share for r in results.values()) / count}
    metrics |= {f"AP/{name}": 100 * r.ap for name, r in results.items()}
    return {
        "task": _TASK,
        "dataset": args.test,
        "num_images": num_images,
        "trained_on": args.train,
        "num_train_images": num_train_images,
        "metrics": {name: round(value, 3) for name, value in metrics.items()},
        "costs": {name: r.cost for name, r in results.items()},
        "weights": weights_identity(cfg.MODEL.WEIGHTS),
        "config": config_identity(cfg, args.config_file),
        "seed": args.seed,
        "precision": "float32",
    }


def is_record_of(args: argparse.Namespace, record: Mapping[str, Any]) -> bool:
    """Whether a record is of these options, on complete data; of any weights."""
    data = {"dataset": args.test, "trained_on": args.train}
    if record["task"] != _TASK or any(record.get(field) != name for field, name in data.items()):
        return False
    counts = {args.test: record.get("num_images"), args.train: record.get("num_train_images")}
    # Records of earlier versions do not tell on how many images they are: they may be of a part.
    is_complete = all(
        n is not None and expected_size(MetadataCatalog.get(name)) in (None, n) for name, n in counts.items()
    )
    return is_complete and record["config"]["sha256"] == config_identity(build_cfg(args))["sha256"]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `svm`."""
    text = (
        f'backbone: checkpoint of pretraining, converted file, torchvision\'s, ...; "{RANDOM}": random initialisation'
    )
    command.add_argument("--weights", required=True, metavar="FILE", help=text)
    architecture = command.add_mutually_exclusive_group()
    text = "config whose backbone is used, without an FPN (default: a ResNet)"
    architecture.add_argument("--config-file", default="", metavar="FILE", help=text)
    text = "depth of the ResNet (default: %(default)s)"
    architecture.add_argument("--depth", type=int, choices=sorted(NUM_BLOCKS), default=50, help=text)
    text = "data set to learn from: a catalog name, voc:PATH:SPLIT or folders:PATH (default: %(default)s)"
    command.add_argument("--train", default="voc_2007_trainval", metavar="NAME", help=text)
    text = "data set to test on (default: %(default)s)"
    command.add_argument("--test", default="voc_2007_test", metavar="NAME", help=text)
    text = "images that go through the network together (default: %(default)s)"
    command.add_argument("--batch-size", type=positive, default=32, metavar="N", help=text)
    text = "processes that read images, then those of the cross-validation (default: this one)"
    command.add_argument("--num-workers", type=int, default=0, metavar="N", help=text)
    text = "of a random initialisation (default: %(default)s)"
    command.add_argument("--seed", type=int, default=0, metavar="N", help=text)
    command.add_argument("--output", metavar="JSON", help="store the numbers, with the command and the versions")
    command.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to override")
