#!/usr/bin/env python
"""The main job from end to end on made-up scenes: pretrain, convert, fine-tune, AP, pictures; 10 minutes on 2 cores.

SlotCon pretrains a ResNet-18 on 2,000 unlabelled scenes; Mask R-CNN is fine-tuned on 100 labelled ones from that
backbone and from random initialisation, at an equal, short schedule. Every command that is run is printed: they are the
ones you would type. Results: OUTPUT/table.md, ap_curves.png, views.png, regions.png, detections_*.png. An interrupted
demo goes on where it stopped; a finished one starts anew with --restart.

Example:
    python tools/demo.py --output output/demo
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *args: str | Path) -> None:
    """Run one of the project's scripts and stop if it fails."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    print(f"\n$ {shlex.join(['python', script, *map(str, args)])}", flush=True)
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    status = subprocess.run(command, env=env).returncode
    if status:
        raise SystemExit(status)


def main(argv: list[str] | None = None) -> int:
    """Run the demo; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--restart", action="store_true", help="delete the results of an earlier demo in OUTPUT first")
    args = parser.parse_args(argv)
    if args.restart:
        for folder in args.output.glob("*_seed*"):
            shutil.rmtree(folder)
    start = time.time()
    out, seed = args.output, args.seed
    os.environ.setdefault("DETECTRON2_DATASETS", str(out / "datasets"))
    pretrain, finetune = "configs/quick/slotcon_R_18_scenes.yaml", "configs/quick/mask_rcnn_R_18_FPN_scenes.yaml"

    run("tools/visualize.py", "views", "--config-file", ROOT / pretrain, "--output", out / "views.png")
    run("benchmarks/transfer.py", "--methods", "random", "slotcon", "--seeds", str(seed), "--output", out)
    weights = out / f"pretrain_slotcon_seed{seed}" / "model_final.pth"
    run(
        "tools/visualize.py", "regions", "--config-file", ROOT / pretrain, "--weights", weights,
        "--output", out / "regions.png",
    )  # fmt: skip
    for method in ("random", "slotcon"):
        weights = out / f"finetune_{method}_seed{seed}" / "model_final.pth"
        run(
            "tools/visualize.py", "detections", "--config-file", ROOT / finetune, "--weights", weights,
            "--score-threshold", "0.3", "--output", out / f"detections_{method}.png",
        )  # fmt: skip
    table = (out / "table.md").read_text()
    print(f"\nThe demo took {(time.time() - start) / 60:.1f} minutes. AP on 100 unseen scenes:\n\n{table}")
    print(
        "AP at an equal, short schedule: the gain of pretraining is a faster start, and narrows as the detector learns "
        "more (README). At this size SlotCon's slots are not objects; regions.png shows how coarse they are."
    )
    print("Pictures:", *sorted(str(p) for p in out.glob("*.png")), sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
