"""Generated rooms whose depths follow from the picture, in the layout of NYUv2.

Boxes stand on the floor of a room, smaller and higher in the image the farther away they are, and the light comes from the
camera: what is far is dark. So the depth of a pixel can be seen, up to the colour and texture of its surface.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

MAX_DEPTH = 10.0  # metres
_SCALE = 1000  # values a metre
_REACH = 4.0  # metres, in which the light falls to 1 / e


def draw_room(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) uint8 RGB image and (H, W) float depth in metres of a room: a floor, a wall, three boxes.

    The camera is 1.5 m above the floor and looks at the horizon, 0.3 of the height from the top; f = 0.9 width.
    """
    rng = np.random.default_rng(seed)
    horizon, focal = 0.3 * height, 0.9 * width
    rows = np.arange(height)[:, None] + 0.5
    wall = rng.uniform(4.0, 9.0)
    floor = 1.5 * focal / np.maximum(rows - horizon, 1e-6)
    depth = np.minimum(floor, wall) * np.ones((1, width))
    floor_color, wall_color = rng.uniform(150, 255, (2, 3))
    image = np.where((floor < wall)[..., None], floor_color, wall_color) * np.ones((1, width, 1))
    for distance in np.sort(rng.uniform(2.5, wall, 3))[::-1]:
        size, bottom = focal * rng.uniform(0.6, 1.0) / distance, horizon + 1.5 * focal / distance
        left = rng.uniform(-0.2, 0.9) * width
        box = np.s_[
            max(round(bottom - size), 0) : max(round(bottom), 0), max(round(left), 0) : max(round(left + size), 0)
        ]
        depth[box], image[box] = distance, rng.uniform(150, 255, 3)
    noise = rng.normal(0, 10, (height // 8, width // 8, 3))
    image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_NEAREST)
    return np.clip(image * np.exp(-depth / _REACH)[..., None], 0, 255).astype(np.uint8), depth


def write_rooms(root: Path, *, num_train: int, num_test: int, height: int = 480, width: int = 640) -> None:
    """Write nyu_depth_v2/ under `root`: lists, images and depth maps; 2 % of the pixels have no measurement."""
    first = 0
    for split, folder, count in (("train", "sync", num_train), ("test", "official_splits/test", num_test)):
        images = root / "nyu_depth_v2" / folder / "room"
        images.mkdir(parents=True)
        lines = []
        for i in range(first, first + count):
            image, depth = draw_room(i, height, width)
            depth[np.random.default_rng(i).random(depth.shape) < 0.02] = 0
            cv2.imwrite(str(images / f"rgb_{i}.png"), image[..., ::-1])
            cv2.imwrite(str(images / f"depth_{i}.png"), np.round(depth * _SCALE).astype(np.uint16))
            lines.append(f"/room/rgb_{i}.png /room/depth_{i}.png 518.8579\n")
        (root / "nyu_depth_v2" / f"nyudepthv2_{split}_files_with_gt.txt").write_text("".join(lines))
        first += count
