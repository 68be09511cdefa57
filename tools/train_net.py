#!/usr/bin/env python
"""Pretrain, fine-tune or evaluate what a config file describes.

Examples:
    # pretrain on COCO, on your own photos, on one CPU
    python tools/train_net.py --config-file configs/pretrain/slotcon_R_50_800ep_coco.yaml --num-gpus 8
    python tools/train_net.py --config-file configs/pretrain/slotcon_R_50_200ep.yaml --num-gpus 8 \\
        DATASETS.TRAIN "('images:/data/my_photos',)" OUTPUT_DIR output/mine
    # fine-tune and evaluate
    python tools/train_net.py --config-file configs/finetune/COCO/mask_rcnn_R_50_FPN_4conv1fc_1x.yaml --num-gpus 8 \\
        MODEL.WEIGHTS slotcon_R_50.pkl
    # go on after an interruption: the same command with --resume
    # several machines: torchrun --nnodes 2 --nproc-per-node 8 ... tools/train_net.py --config-file ...
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from d2_objssl.checkpoint import ObjSSLCheckpointer, checkpoint_metadata
from d2_objssl.engine import Trainer, default_setup, launch, resolve_norms, setup_cfg
from d2_objssl.evaluation.build import check_evaluators, check_test_sets
from d2_objssl.evaluation.evaluation_records import write_evaluation_records


def main(args: argparse.Namespace) -> Any:
    """Train, or with --eval-only evaluate; both leave records of the result in OUTPUT_DIR/records."""
    cfg = setup_cfg(args.config_file, args.opts, for_training=not args.eval_only, resume=args.resume)
    default_setup(cfg, args)
    if args.eval_only:
        return evaluate(cfg, args)
    trainer = Trainer(cfg, config_file=args.config_file)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def evaluate(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate MODEL.WEIGHTS, or with --resume the last checkpoint of OUTPUT_DIR; returns the results."""
    start = time.monotonic()
    resolved = resolve_norms(cfg)
    model = Trainer.build_model(resolved)
    checkpointer = ObjSSLCheckpointer(model, cfg.OUTPUT_DIR, metadata=checkpoint_metadata(resolved))
    path = checkpointer.get_checkpoint_file() if args.resume and checkpointer.has_checkpoint() else cfg.MODEL.WEIGHTS
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume, require="all")
    check_test_sets(resolved)
    check_evaluators(resolved)
    results = Trainer.test(resolved, model)
    if comm.is_main_process():
        seconds = round(time.monotonic() - start, 1)
        write_evaluation_records(
            cfg,
            results,
            checkpoint=path,
            config_file=args.config_file,
            precision="float32",
            wall_time_s=seconds,
            of_training=False,
        )
        verify_results(resolved, results)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = default_argument_parser(epilog=__doc__)
    parser.description = "Pretrain, fine-tune or evaluate what a config file describes."
    return parser


if __name__ == "__main__":
    launch(main, _parser().parse_args())
    sys.exit(0)
