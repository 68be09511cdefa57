"""Draw one synthetic detection scene: textured background, clutter, and objects whose class is their shape alone.

Colour, texture, size and rotation are drawn independently of the class, so that colour statistics do not tell the
classes apart; a contrast guard keeps every object visible against what is behind it.

Letters: H, W image size (px), n objects, P side of the square patch around an object (px). Coordinates are continuous,
XYXY_ABS: pixel i covers [i, i + 1). Lengths in the constants are pixels of an image whose shorter side is
`REFERENCE_SIDE`, and scale with the shorter side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
MIN_SIDE = 32
MAX_OBJECTS = 6
MAX_OVERLAP = 0.25  # of the smaller of any two objects, before occlusion
MIN_VISIBLE = 0.5  # of each object's own area
REFERENCE_SIDE = 128

_MIN_OBJECTS = 2
_RADIUS = (8.0, 26.0)
_MIN_RADIUS_PX = 4.0  # absolute: a smaller shape is not recognisable at any image size
_PLACEMENT_TRIES = 40
_CONTRAST = 60.0  # least RGB distance, in grey levels, of both colours of an object to the mean colour behind it
_SUPERSAMPLING = 4
_TEXTURES = ("plain", "stripes", "blotches", "checks", "speckle")

FloatImage = NDArray[np.float32]


@dataclass(frozen=True)
class Scene:
    """One scene and its ground truth.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        category_ids: (n,) int64 in [1, len(SHAPES)]; category c is `SHAPES[c - 1]`. 1 to `MAX_OBJECTS` objects.
        instance_map: (H, W) uint8; 0 is background, k + 1 the visible pixels of object k.
        amodal_masks: (n, H, W) bool; the objects as if nothing occluded them, cut at the image border.
    """

    image: NDArray[np.uint8]
    category_ids: NDArray[np.int64]
    instance_map: NDArray[np.uint8]
    amodal_masks: NDArray[np.bool_]

    @property
    def masks(self) -> NDArray[np.bool_]:
        """(n, H, W) bool; the visible pixels of each object, none of them empty."""
        ids = np.arange(1, len(self.category_ids) + 1, dtype=np.uint8)
        return self.instance_map == ids[:, None, None]

    @property
    def boxes(self) -> NDArray[np.float32]:
        """(n, 4) float32 XYXY_ABS, the tight boxes of `masks`."""
        boxes = np.empty((len(self.category_ids), 4), np.float32)
        for box, mask in zip(boxes, self.masks, strict=True):
            (columns,), (rows,) = mask.any(0).nonzero(), mask.any(1).nonzero()
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return boxes

    @property
    def sem_seg(self) -> NDArray[np.uint8]:
        """(H, W) uint8; 0 is background, otherwise the category id of the visible object."""
        return np.concatenate([[0], self.category_ids]).astype(np.uint8)[self.instance_map]


@dataclass(frozen=True)
class _Placed:
    """An object in the image: its category, and its (P, P) opacity patch with the top left pixel at (x, y)."""

    category_id: int
    alpha: FloatImage
    x: int
    y: int


def render_scene(seed: int, index: int, size: tuple[int, int]) -> Scene:
    """Draw scene `index` of the split `seed`.

    A pure function: the scene depends on nothing but the arguments, so scenes can be drawn in any order and process.
    Different seeds share no random numbers. The pixels are those of the installed NumPy and OpenCV; other versions may
    round differently.

    Args:
        seed: the split, in [0, 2**32).
        index: the scene within the split, in [0, 2**32).
        size: (height, width) in pixels, each at least `MIN_SIDE`.

    Raises:
        ValueError: if an argument is out of range.
    """
    check_size(size)
    for name, value in (("seed", seed), ("index", index)):
        if not 0 <= value < 2**32:
            raise ValueError(f"scene {name} is {value}; it must be in [0, 2**32)")
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))
    placed, amodal_masks, instance_map = _place_objects(rng, size)
    canvas = _draw_background(rng, size)
    for item in placed:
        _paint_object(rng, canvas, item)
    canvas *= rng.uniform(0.65, 1.2)
    canvas += rng.uniform(2, 9) * rng.standard_normal(canvas.shape, np.float32)
    return Scene(
        image=np.clip(np.rint(canvas), 0, 255).astype(np.uint8),
        category_ids=np.array([item.category_id for item in placed], np.int64),
        instance_map=instance_map,
        amodal_masks=amodal_masks,
    )


def check_size(size: tuple[int, int]) -> None:
    """Raise ValueError unless `size` is a (height, width) that can be drawn."""
    if len(size) != 2 or min(size) < MIN_SIDE:
        raise ValueError(f"scene size is {tuple(size)}; it must be (height, width) of at least {MIN_SIDE} px each")


def _place_objects(
    rng: np.random.Generator, size: tuple[int, int]
) -> tuple[list[_Placed], NDArray[np.bool_], NDArray[np.uint8]]:
    """Choose objects back to front, refusing places where they overlap or hide another one too much.

    Returns:
        The objects, their (n, H, W) bool amodal masks and the (H, W) uint8 instance map.
    """
    placed: list[_Placed] = []
    masks = np.zeros((0, *size), bool)
    instance_map = np.zeros(size, np.uint8)
    scale = min(size) / REFERENCE_SIDE
    low, high = (max(r * scale, _MIN_RADIUS_PX) for r in _RADIUS)
    for _ in range(rng.integers(_MIN_OBJECTS, MAX_OBJECTS + 1)):
        category_id = int(rng.integers(len(SHAPES))) + 1
        radius = math.exp(rng.uniform(math.log(low), math.log(high)))
        alpha = _shape_alpha(rng, SHAPES[category_id - 1], radius)
        for _ in range(_PLACEMENT_TRIES):
            margin = 0.75 * radius - len(alpha) / 2  # a few objects are cut a little by the border
            x, y = (round(rng.uniform(margin, side - len(alpha) - margin)) for side in size[::-1])
            item = _Placed(category_id, alpha, x, y)
            mask = _full_mask(item, size)
            if _fits(mask, masks, instance_map):
                placed.append(item)
                masks = np.concatenate([masks, mask[None]])
                instance_map[mask] = len(placed)
                break
    assert placed, "the first object fits anywhere"
    return placed, masks, instance_map


def _fits(mask: NDArray[np.bool_], others: NDArray[np.bool_], instance_map: NDArray[np.uint8]) -> bool:
    """Whether an object on top of `others` keeps to `MAX_OVERLAP`, and leaves `MIN_VISIBLE` of each of them."""
    if not instance_map[mask].any():
        return True
    area = np.count_nonzero(mask)
    for k, other in enumerate(others):
        other_area = np.count_nonzero(other)
        if np.count_nonzero(other & mask) > MAX_OVERLAP * min(area, other_area):
            return False
        if np.count_nonzero((instance_map == k + 1) & ~mask) < MIN_VISIBLE * other_area:
            return False
    return True


def _full_mask(item: _Placed, size: tuple[int, int]) -> NDArray[np.bool_]:
    mask = np.zeros(size, bool)
    image_window, patch_window = _windows(item, size)
    mask[image_window] = item.alpha[patch_window] >= 0.5
    return mask


def _windows(item: _Placed, size: tuple[int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The part of the object's patch inside the image: (row, column) slices of the image, and of the patch."""
    spans = [(max(0, o), min(side, o + len(item.alpha)), o) for o, side in zip((item.y, item.x), size, strict=True)]
    rows, columns = (slice(start, stop) for start, stop, _ in spans)
    patch_rows, patch_columns = (slice(start - o, stop - o) for start, stop, o in spans)
    return (rows, columns), (patch_rows, patch_columns)


def _outlines(shape: str) -> list[NDArray[np.float64]]:
    """(points, 2) float64 xy polygons of a shape of radius about 1 around the origin; a second polygon is a hole."""

    def regular(num_points: int, radii: tuple[float, ...]) -> NDArray[np.float64]:
        angles = np.arange(num_points) * (2 * math.pi / num_points)
        r = np.resize(radii, num_points)
        return np.stack([r * np.cos(angles), r * np.sin(angles)], 1)

    if shape == "circle":
        return [regular(48, (1.0,))]
    if shape == "ring":
        return [regular(48, (1.0,)), regular(48, (0.55,))]
    if shape == "square":
        return [regular(4, (1.2,))]
    if shape == "triangle":
        return [regular(3, (1.3,))]
    if shape == "star":
        return [regular(10, (1.2, 0.5))]
    assert shape == "cross", shape
    a, b = 0.36, 1.05  # half width and half length of an arm
    arm = np.array([(a, a), (a, b), (-a, b)])
    quarter_turn = np.array([(0, 1), (-1, 0)])
    return [np.concatenate([arm @ np.linalg.matrix_power(quarter_turn, k) for k in range(4)])]


def _shape_alpha(rng: np.random.Generator, shape: str, radius: float) -> FloatImage:
    """A (P, P) float32 opacity patch in [0, 1] of a randomly rotated shape, with soft edges."""
    side = 2 * math.ceil(1.3 * radius + 1)
    angle = rng.uniform(0, 2 * math.pi)
    centre = side / 2 + rng.uniform(-0.5, 0.5, 2)
    rotation = radius * np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    fraction_bits = 4
    # OpenCV counts from pixel centres, we count from pixel corners.
    points = [(_SUPERSAMPLING * (o @ rotation + centre) - 0.5) * 2**fraction_bits for o in _outlines(shape)]
    fine = np.zeros((side * _SUPERSAMPLING,) * 2, np.uint8)
    cv2.fillPoly(fine, [np.rint(p).astype(np.int32) for p in points], (255,), shift=fraction_bits)
    return cv2.resize(fine, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / np.float32(255)


def _texture(rng: np.random.Generator, size: tuple[int, int], period: float) -> FloatImage:
    """A (H, W) float32 pattern in [0, 1] of a random kind, whose details repeat after about `period` pixels."""
    kind = _TEXTURES[rng.integers(len(_TEXTURES))]
    height, width = size
    if kind == "plain":
        return np.full(size, rng.random(), np.float32)
    if kind == "speckle":
        dots = (rng.random(size, np.float32) < rng.uniform(0.1, 0.4)).astype(np.float32)
        return np.clip(2 * cv2.GaussianBlur(dots, (0, 0), max(0.6, period / 12)), 0, 1)
    if kind == "blotches":
        return np.clip(0.5 + 0.6 * _smooth_noise(rng, size, period), 0, 1)
    angle = rng.uniform(0, math.pi)
    phases = rng.uniform(0, 2 * math.pi, 2)
    y, x = np.ogrid[:height, :width]
    frequency = 2 * math.pi / period
    u = (math.cos(angle) * x + math.sin(angle) * y).astype(np.float32)
    wave = np.sin(frequency * u + np.float32(phases[0]))
    if kind == "checks":
        v = (math.cos(angle) * y - math.sin(angle) * x).astype(np.float32)
        wave *= np.sin(frequency * v + np.float32(phases[1]))
    return np.clip(0.5 + rng.uniform(0.5, 3) * wave, 0, 1)  # from a soft wave to hard edges


def _smooth_noise(rng: np.random.Generator, size: tuple[int, int], cell: float, channels: int = 1) -> FloatImage:
    """(H, W) or (H, W, channels) float32 noise of mean 0 and deviation about 1, smooth over `cell` pixels."""
    height, width = (max(2, math.ceil(side / cell) + 1) for side in size)
    coarse = rng.standard_normal((height, width, channels), np.float32)
    noise: FloatImage = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC).astype(np.float32, copy=False)
    return noise


def _draw_background(rng: np.random.Generator, size: tuple[int, int]) -> FloatImage:
    """A (H, W, 3) float32 canvas in about [0, 255]: texture, colour noise, a gradient and clutter strokes."""
    height, width = size
    scale = min(size) / REFERENCE_SIDE
    colour = rng.uniform(40, 215, 3)
    other = np.clip(colour + rng.uniform(-70, 70, 3), 0, 255)
    pattern = _texture(rng, size, scale * rng.uniform(6, 40))
    canvas = (colour + pattern[..., None] * (other - colour)).astype(np.float32)
    canvas += rng.uniform(6, 24) * _smooth_noise(rng, size, scale * rng.uniform(24, 64), channels=3)
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.ogrid[:height, :width]
    ramp = (math.cos(angle) * (x / width - 0.5) + math.sin(angle) * (y / height - 0.5)).astype(np.float32)
    canvas += ramp[..., None] * rng.uniform(-50, 50, 3).astype(np.float32)
    for _ in range(rng.integers(2, 7)):
        _draw_stroke(rng, canvas, scale)
    return canvas


def _draw_stroke(rng: np.random.Generator, canvas: FloatImage, scale: float) -> None:
    """Draw a random open curve, thinner than any part of an object, onto `canvas` in place."""
    height, width = canvas.shape[:2]
    start = rng.uniform(0, (width, height))
    bend, end = start + scale * rng.uniform(-60, 60, (2, 2))
    t = np.linspace(0, 1, 12)[:, None]
    curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
    thickness = max(1, round(scale * rng.uniform(1, 3)))
    colour = rng.uniform(10, 245, 3)
    mask = np.zeros((height, width), np.uint8)
    cv2.polylines(mask, [np.rint(16 * curve).astype(np.int32)], False, (255,), thickness, cv2.LINE_AA, shift=4)
    touched = mask > 0
    alpha = mask[touched].astype(np.float32)[:, None] / 255
    canvas[touched] += alpha * (colour.astype(np.float32) - canvas[touched])


def _paint_object(rng: np.random.Generator, canvas: FloatImage, item: _Placed) -> None:
    """Paint an object of random colour and texture onto `canvas` in place."""
    image_window, patch_window = _windows(item, (canvas.shape[0], canvas.shape[1]))
    alpha = item.alpha[patch_window][..., None]
    behind = canvas[image_window]
    colour, other = _contrasting_colours(rng, behind.mean((0, 1)))
    pattern = _texture(rng, item.alpha.shape, len(item.alpha) * rng.uniform(0.12, 0.5))[patch_window]
    behind += alpha * ((colour + pattern[..., None] * (other - colour)).astype(np.float32) - behind)


def _contrasting_colours(
    rng: np.random.Generator, background: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two (3,) RGB colours, both, and with them their mixtures, at least `_CONTRAST` from `background`."""
    while True:  # each draw succeeds more often than not, whatever the background
        colour = rng.uniform(5, 250, 3)
        other = np.clip(colour + rng.uniform(-80, 80, 3), 0, 255)
        step, back = other - colour, background - colour
        nearest = np.clip(step @ back / max(float(step @ step), 1e-6), 0, 1)  # along the line from colour to other
        if np.linalg.norm(back - nearest * step) >= _CONTRAST:
            return colour, other
