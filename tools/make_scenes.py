#!/usr/bin/env python3
"""Write synthetic detection scenes with COCO, panoptic, semantic and Pascal VOC labels to a folder."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from d2_objssl.data.scenes import LABELS, SHAPES, Scene, generate_scenes, render_scene

_EXAMPLE = """\
example:
  python tools/make_scenes.py --output datasets/my_scenes --num-images 500 --size 128 --seed 7 \\
      --num-workers 2 --preview my_scenes.png

Scene i of a seed is the same whatever the count; different seeds are disjoint splits. A folder that is complete
already is kept as it is; one that holds anything else is refused. The catalog names scenes_train, scenes_val,
scenes_unlabeled, scenes_tiny_train and scenes_tiny_val need no command: they are generated on first use.
"""
_MAX_PREVIEWED = 24
_COLUMNS = 6
_PREVIEW_SIDE = 256  # least shorter side of a previewed scene, in pixels


def parse_size(text: str) -> tuple[int, int]:
    """Parse "N" or "HxW" into (height, width)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f'"{text}" is neither N nor HxW, like 128 or 96x128')
    return int(sides[0]), int(sides[-1])


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", metavar="DIR", help="the folder to make")
    parser.add_argument("--num-images", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--size", type=parse_size, default=(128, 128), metavar="N|HxW", help="pixels, default: 128")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the split, default: %(default)s")
    parser.add_argument("--labels", nargs="*", choices=LABELS, default=LABELS, help="default: all")
    parser.add_argument("--num-workers", type=int, default=1, metavar="N", help="processes, default: %(default)s")
    parser.add_argument(
        "--preview", metavar="PNG", help=f"draw the first {_MAX_PREVIEWED} scenes with boxes and outlines"
    )
    return parser


def draw_labels(scene: Scene) -> NDArray[np.uint8]:
    """Enlarge a scene and draw its boxes, class names and mask outlines on it.

    Returns:
        (H', W', 3) uint8 BGR.
    """
    factor = math.ceil(_PREVIEW_SIDE / min(scene.image.shape[:2]))
    picture = cv2.resize(scene.image[..., ::-1], None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    for category_id, box, mask in zip(scene.category_ids, scene.boxes, scene.masks, strict=True):
        enlarged = mask.astype(np.uint8).repeat(factor, axis=0).repeat(factor, axis=1)
        outlines, _ = cv2.findContours(enlarged, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, outlines, -1, (255, 255, 255), 1)
        x0, y0, x1, y1 = (round(factor * float(c)) for c in box)
        cv2.rectangle(picture, (x0, y0), (x1 - 1, y1 - 1), (0, 255, 255), 1)
        name, origin = SHAPES[category_id - 1], (x0, max(y0 - 3, 10))
        for colour, thickness in (((0, 0, 0), 3), ((0, 255, 255), 1)):  # readable on any texture
            cv2.putText(picture, name, origin, cv2.FONT_HERSHEY_SIMPLEX, 0.4, colour, thickness, cv2.LINE_AA)
    return np.asarray(picture, np.uint8)


def draw_contact_sheet(num_images: int, size: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    """Tile the first scenes of a split, with their labels, into one (H, W, 3) uint8 BGR picture."""
    pictures = [draw_labels(render_scene(seed, i, size)) for i in range(min(num_images, _MAX_PREVIEWED))]
    columns = min(_COLUMNS, len(pictures))
    pictures += [np.zeros_like(pictures[0])] * (-len(pictures) % columns)
    return np.vstack([np.hstack(pictures[i : i + columns]) for i in range(0, len(pictures), columns)])


def main(arguments: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(arguments)
    if args.output is None and args.preview is None:
        parser.error("give --output, --preview or both")
    try:
        if args.output is not None:
            generate_scenes(
                args.output,
                num_images=args.num_images,
                size=args.size,
                seed=args.seed,
                labels=args.labels,
                num_workers=args.num_workers,
                progress=True,
            )
            print(f"{args.num_images} scenes in {args.output}")
        if args.preview is not None:
            _write_preview(Path(args.preview), draw_contact_sheet(args.num_images, args.size, args.seed))
    except ValueError as error:
        sys.exit(f"make_scenes.py: {error}")


def _write_preview(file: Path, picture: NDArray[np.uint8]) -> None:
    try:
        file.write_bytes(cv2.imencode(".png", picture)[1].tobytes())
    except OSError as error:
        raise ValueError(f"cannot write --preview {file}: {error}") from error
    print(f"preview in {file}")


if __name__ == "__main__":
    main()
