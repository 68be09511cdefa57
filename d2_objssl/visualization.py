"""Pictures of what the package works on: views and their overlaps, regions, curves.

N images of a batch, V views of an image, S side of a view; T = `TILE_SIZE`, the side at which a view is shown. Images
are (H, W, 3) uint8 RGB arrays, 0-255; what goes to `EventStorage.put_image` is a (3, H, W) uint8 RGB tensor. Nothing
here draws random numbers, so a picture in the middle of a training run leaves the run as it is.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from .geometry import align_features, overlap_rois
from .structures import ViewBatch
from .weight_files import write_atomically

TILE_SIZE = 224

_MARGIN = 14  # around a contact sheet, pixels
_GAP = 10  # between its images
_CAPTION_HEIGHT = 20
_BACKGROUND = 255
_BLANK = 225  # grey of a tile that has nothing to show
_TEXT_COLOR = (50, 50, 50)
_PALETTE_SIZE = 512


# ---------------------------------------------------------------------------------------------- views and regions


def draw_views(views: list[ViewBatch], num_images: int = 4) -> Tensor:
    """Show what the mapper made of some images, one row each: the views, then the parts that they share.

    The area shared with another view is boxed in each view, and shown again as the losses see it: resampled to the full
    grid and unflipped by `align_features`. So the two overlaps of a pair must show the same thing. Every later view is
    paired with the first one, in a colour of its own.

    Args:
        views: V views of N images, not normalised: (N, 3, S, S) uint8 RGB, on any device.
        num_images: how many of the N images are shown.

    Returns:
        (3, H, W) uint8 RGB.
    """
    assert views and num_images > 0
    views = [_first_images(view, num_images) for view in views]
    columns = [_to_tiles(view.images) for view in views]
    captions = [_view_captions(view, v) for v, view in enumerate(views)]
    overlaps: list[list[np.ndarray]] = []
    for v in range(1, len(views)):
        for a, b in ((0, v), (v, 0)):
            rois, valid = overlap_rois(views[a], views[b])
            for tile, roi in zip(columns[a], rois.numpy(), strict=True):
                _draw_box(tile, roi, region_colors(v)[v - 1])
            # For an inverted box ROIAlign allocates memory by the square of its size; an empty one gives zeros as well.
            shared = torch.where(valid[:, None], rois, 0.0)
            aligned = align_features(views[a].images.float(), shared, views[a].hflip)
            tiles = _to_tiles(aligned.round().to(torch.uint8))
            overlaps.append([t if ok else np.full_like(t, _BLANK) for t, ok in zip(tiles, valid.tolist(), strict=True)])
            captions.append([f"overlap in view {a + 1}" if ok else "no overlap" for ok in valid.tolist()])
    return _sheet_of_columns(columns + overlaps, captions)


def draw_regions(views: list[ViewBatch], region_maps: list[Tensor], num_images: int = 4) -> Tensor:
    """Show each view beside the view overlaid with its regions, one row per image.

    Args:
        views: V views of N images, not normalised: (N, 3, S, S) uint8 RGB, on any device.
        region_maps: V maps (N, h, w) of integer region ids, in the frame of the view (after its flip). An id has one
            colour in all views.
        num_images: how many of the N images are shown.

    Returns:
        (3, H, W) uint8 RGB.
    """
    assert views and num_images > 0
    columns, captions = [], []
    for v, (batch, maps) in enumerate(zip(views, region_maps, strict=True)):
        view = _first_images(batch, num_images)
        ids = maps[:num_images].cpu().numpy()
        tiles = _to_tiles(view.images)
        columns += [tiles, [overlay_region_map(t, m) for t, m in zip(tiles, ids, strict=True)]]
        captions += [_view_captions(view, v), [region_caption(m) for m in ids]]
    return _sheet_of_columns(columns, captions)


def draw_pairs(views: list[ViewBatch], num_images: int = 4) -> Tensor:
    """Show the views of pairs, one row each: every view of the anchor beside the same view of the not-anchor.

    Args:
        views: V views of N pairs, not normalised: (N, 3, S, S) uint8 RGB, on any device; the first half shows anchors, the
            second half not-anchors.
        num_images: how many of the N pairs are shown.

    Returns:
        (3, H, W) uint8 RGB.
    """
    assert views and len(views) % 2 == 0 and num_images > 0
    half = len(views) // 2
    columns, captions = [], []
    for v in range(half):
        for name, view in (("anchor", views[v]), ("not-anchor", views[half + v])):
            shown = _first_images(view, num_images)
            columns.append(_to_tiles(shown.images))
            captions.append([f"{name}, {caption}" for caption in _view_captions(shown, v)])
    return _sheet_of_columns(columns, captions)


def overlay_region_map(image: np.ndarray, region_map: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Colour an image by its regions, with thin white borders between them.

    Args:
        image: (H, W, 3) uint8 RGB.
        region_map: (H, W) integer region ids, or a coarser (h, w) map of the same area, which is resized to the nearest
            cell. Negative ids belong to no region and stay uncoloured.
        alpha: opacity of the colours, in [0, 1].

    Returns:
        (H, W, 3) uint8 RGB.
    """
    height, width = image.shape[:2]
    rows, cols = (
        ((np.arange(size) + 0.5) * cells / size).astype(np.int64)
        for size, cells in zip((height, width), region_map.shape, strict=True)
    )
    ids = region_map[rows[:, None], cols]
    overlay = image * (1 - alpha) + _palette()[ids % _PALETTE_SIZE] * alpha
    overlay[ids < 0] = image[ids < 0]
    border = np.zeros((height, width), dtype=bool)
    border[1:] |= ids[1:] != ids[:-1]
    border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    overlay[border] = 255
    return np.rint(overlay).astype(np.uint8)


def region_caption(region_map: np.ndarray) -> str:
    """Say how many regions a map of integer ids has; negative ids belong to none."""
    num = len(np.unique(region_map[region_map >= 0]))
    return "1 region" if num == 1 else f"{num} regions"


def region_colors(num: int) -> np.ndarray:
    """Colours of the region ids 0 to `num` - 1: (num, 3) uint8 RGB, as different as possible.

    The colour of an id depends neither on `num` nor on the run. Colours repeat after 512 ids.
    """
    return _palette()[np.arange(num) % _PALETTE_SIZE]


@lru_cache(maxsize=1)
def _palette() -> np.ndarray:
    """(512, 3) uint8 RGB: each colour is the one farthest, in CIELAB, from all before it; near-greys are left out."""
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = cv2.cvtColor(rgb[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
    # Whole numbers, so that the last bits of a library's arithmetic do not decide between two colours.
    lab = np.rint(lab).astype(np.int64)
    keep = (lab[:, 0] > 35) & (lab[:, 0] < 92) & (np.hypot(lab[:, 1], lab[:, 2]) > 35)
    rgb, lab = rgb[keep], lab[keep]
    chosen = [int(np.abs(rgb.astype(np.int64) - (255, 225, 30)).sum(axis=1).argmin())]
    nearest = ((lab - lab[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < _PALETTE_SIZE:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, ((lab - lab[chosen[-1]]) ** 2).sum(axis=1))
    return rgb[chosen]


def _first_images(view: ViewBatch, num_images: int) -> ViewBatch:
    assert view.images.dtype == torch.uint8, f"pictures are drawn from uint8 images, not {view.images.dtype}"
    n = slice(num_images)
    return ViewBatch(view.images[n].cpu(), view.crop_boxes[n].cpu(), view.hflip[n].cpu())


def _view_captions(view: ViewBatch, number: int) -> list[str]:
    return [f"view {number + 1}" + (", flipped" if flipped else "") for flipped in view.hflip.tolist()]


def _to_tiles(images: Tensor) -> list[np.ndarray]:
    """(N, 3, S, S) uint8 -> N arrays (T, T, 3) that may be drawn on."""
    method = cv2.INTER_AREA if images.shape[-1] > TILE_SIZE else cv2.INTER_LINEAR
    arrays = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
    return [cv2.resize(x, (TILE_SIZE, TILE_SIZE), interpolation=method) for x in arrays]


def _draw_box(tile: np.ndarray, roi: np.ndarray, color: np.ndarray) -> None:
    """Draw the box `roi`, XYXY in [0, 1] of the tile, inside its edges: two pixels of colour between black ones.

    An inverted box, i.e. no overlap, draws nothing.
    """
    x0, y0, x1, y1 = (round(float(c) * TILE_SIZE) for c in roi)
    for inset, c in enumerate(((0, 0, 0), color.tolist(), color.tolist(), (0, 0, 0))):
        left, top, right, bottom = x0 + inset, y0 + inset, x1 - 1 - inset, y1 - 1 - inset
        if left <= right and top <= bottom:
            cv2.rectangle(tile, (left, top), (right, bottom), c, 1)


def _sheet_of_columns(columns: list[list[np.ndarray]], captions: list[list[str]]) -> Tensor:
    """Columns of N images and of N captions -> (3, H, W) uint8 contact sheet with N rows."""
    images = [image for row in zip(*columns, strict=True) for image in row]
    texts = [text for row in zip(*captions, strict=True) for text in row]
    sheet = contact_sheet(images, len(columns), texts)
    return torch.from_numpy(np.ascontiguousarray(sheet.transpose(2, 0, 1)))


# ---------------------------------------------------------------------------------------------- sheets and files


def resize_longer_side(image: np.ndarray, side: int) -> np.ndarray:
    """Resize an (H, W, 3) uint8 image so that its longer side has `side` pixels."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def contact_sheet(images: Sequence[np.ndarray], num_columns: int, captions: Sequence[str] | None = None) -> np.ndarray:
    """Lay images out in rows on white.

    Args:
        images: (H_i, W_i, 3) uint8 RGB, row by row. Columns are as wide as the widest image, a row as
            high as its highest one.
        num_columns: images per row.
        captions: one line of text over each image, made smaller where it is wider than the cell.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: if there is no image, no column, or not one caption an image.
    """
    if not images or num_columns < 1:
        raise ValueError(f"A contact sheet needs images and columns, not {len(images)} in {num_columns} column(s)")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")
    rows = [range(i, min(i + num_columns, len(images))) for i in range(0, len(images), num_columns)]
    top = _CAPTION_HEIGHT if captions is not None else 0
    heights = [top + max(images[i].shape[0] for i in row) for row in rows]
    width = max(image.shape[1] for image in images)
    size = [2 * _MARGIN + sum(x) + _GAP * (len(x) - 1) for x in (heights, [width] * len(rows[0]))]
    sheet = np.full((*size, 3), _BACKGROUND, dtype=np.uint8)
    y = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            x = _MARGIN + column * (width + _GAP)
            if captions is not None:
                _write(sheet, captions[i], x, y, width)
            sheet[y + top : y + top + images[i].shape[0], x : x + images[i].shape[1]] = images[i]
        y += height + _GAP
    return sheet


def _write(image: np.ndarray, text: str, x: int, y: int, max_width: int) -> None:
    """Write one line of at most `max_width` pixels, its top left corner at (x, y)."""
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.45
    width = cv2.getTextSize(text, font, scale, 1)[0][0]
    scale = min(scale, scale * max_width / max(width, 1))
    cv2.putText(image, text, (x, y + _CAPTION_HEIGHT - 7), font, scale, _TEXT_COLOR, 1, cv2.LINE_AA)


def save_png(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write an (H, W, 3) uint8 RGB image; folders are created, and the file appears complete or not at all.

    Raises:
        ValueError: if `path` does not end in ".png".
    """
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]
    _write_png(path, encoded.tobytes())


def _write_png(path: str | os.PathLike[str], content: bytes) -> None:
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f'Pictures are written as PNG, but "{target}" does not end in ".png"')
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, lambda file: file.write(content))


def plot_curves(
    path: str | os.PathLike[str],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    bands: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Write a line plot as PNG, like `save_png`.

    Args:
        path: the file, "*.png".
        curves: (x, y) points of each curve, by its name in the legend.
        xlabel, ylabel, title: texts.
        bands: by the name of a curve, the half-width of a band around it for each of its points (y ± half-width).

    Raises:
        ValueError: if a band has no curve, or not one value a point.
    """
    bands = bands or {}
    for name, widths in bands.items():
        if name not in curves or len(widths) != len(curves[name]):
            raise ValueError(f'The band "{name}" of {len(widths)} values has no curve of as many points')
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in curves.items():
        xy = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        (line,) = axes.plot(xy[:, 0], xy[:, 1], marker="o", markersize=4, label=name)
        if name in bands:
            half = np.asarray(bands[name], dtype=np.float64)
            low, high = xy[:, 1] - half, xy[:, 1] + half
            axes.fill_between(xy[:, 0], low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if curves:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    _write_png(path, buffer.getvalue())
