"""Pictures of prototypes: what they segment, the segments most like them, and how much they are used.

Images are (H, W, 3) uint8 RGB arrays. K prototypes, S side of an image in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .visualization import contact_sheet, overlay_region_map, region_colors, resize_longer_side

_RED = (255, 0, 0)
_LEGEND_TILE = (16, 132)  # height, width


def draw_segmentations(
    images: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    class_names: Sequence[str],
    side: int = 224,
) -> np.ndarray:
    """Contact sheet with a row for each image: the image, its ground truth, its prediction; a legend below.

    Args:
        images: (S, S, 3) uint8 RGB.
        truth, predictions: (S, S) integer classes; -1, which stays uncoloured, is none.
        class_names: by class; only those that appear are in the legend.
        side: of an image in the sheet, pixels.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    tiles = []
    for image, *maps in zip(images, truth, predictions, strict=True):
        tile = resize_longer_side(image, side)
        tiles += [tile, *(overlay_region_map(tile, classes, alpha=0.65) for classes in maps)]
    sheet = contact_sheet(tiles, 3, ["image", "ground truth", "prediction"] * len(images))
    shown = sorted(set(np.unique(np.stack([*truth, *predictions])).tolist()) - {-1})
    if not shown:
        return sheet
    return _stack(sheet, _draw_legend([class_names[c] for c in shown], region_colors(len(class_names))[shown], sheet))


def _draw_legend(names: list[str], colors: np.ndarray, sheet: np.ndarray) -> np.ndarray:
    """Swatches with names, in as many columns as fit below `sheet`."""
    swatches = [np.full((*_LEGEND_TILE, 3), color, dtype=np.uint8) for color in colors]
    return contact_sheet(swatches, max(sheet.shape[1] // (_LEGEND_TILE[1] + 12), 1), names)


def _stack(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """One picture below the other, both padded with white to the width of the wider one."""
    width = max(top.shape[1], bottom.shape[1])
    padded = [np.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0)), constant_values=255) for x in (top, bottom)]
    return np.concatenate(padded)


def draw_concepts(rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray | None, str]]], side: int = 112) -> np.ndarray:
    """Contact sheet with a row for each prototype: its segments, marked in red.

    Args:
        rows: for each prototype its segments, the best first: (S, S, 3) uint8 RGB image, (S, S) bool mask or None for the
            whole image, caption.
        side: of an image in the sheet, pixels.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    num_columns = max(len(segments) for segments in rows)
    tiles, captions = [], []
    for segments in rows:
        blank = num_columns - len(segments)
        for image, mask, caption in segments:
            tiles.append(resize_longer_side(image if mask is None else mark_red(image, mask), side))
            captions.append(caption)
        tiles += [np.full((side, side, 3), 255, dtype=np.uint8)] * blank
        captions += [""] * blank
    return contact_sheet(tiles, num_columns, captions)


def mark_red(image: np.ndarray, mask: np.ndarray, alpha: float = 0.45) -> np.ndarray:
    """Tint the pixels of a mask, and draw its outline: (S, S, 3) uint8, (S, S) bool -> (S, S, 3) uint8."""
    marked = image.copy()
    marked[mask] = np.rint(image[mask] * (1 - alpha) + np.array(_RED) * alpha).astype(np.uint8)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(marked, outlines, -1, _RED, 2)
    return marked


def plot_prototype_use(active_histogram: np.ndarray, images_per_prototype: np.ndarray) -> np.ndarray:
    """Draw the statistics of SlotCon's supplement D.

    Args:
        active_histogram: (K + 1,) images with 0, 1, ..., K active prototypes.
        images_per_prototype: (K,) images in which each prototype is active.

    Returns:
        (H, W, 3) uint8 RGB: left the histogram, right the prototypes by descending use.
    """
    num_images = active_histogram.sum()
    mean = active_histogram @ np.arange(len(active_histogram)) / num_images
    used = np.sort(images_per_prototype)[::-1]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    shown = active_histogram[: int(np.flatnonzero(active_histogram).max()) + 2]
    left.bar(np.arange(len(shown)), shown, width=0.9)
    left.axvline(mean, color="black", linewidth=1, linestyle="--")
    left.set(title=f"{mean:.1f} active prototypes an image", xlabel="active prototypes", ylabel="images")
    right.bar(np.arange(len(used)), used, width=1.0)
    title = f"{np.count_nonzero(used == 0)} of {len(used)} prototypes are dead; {num_images} images"
    right.set(title=title, xlabel="prototypes, by use", ylabel="images in which active")
    for axes in (left, right):
        axes.locator_params(axis="y", integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
