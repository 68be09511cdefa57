"""Maps of small integers as PNG: small, strictly checked, the same bytes everywhere. h, w = size of a map."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LEVEL = 8  # of zlib; 9 takes three times as long for 2 % less


def encode_png(values: np.ndarray, name: str) -> bytes:
    """Encode a map as greyscale PNG of 8 bits, or 16 where it needs them.

    Without filtering the rows, for which the encoders of Pillow and OpenCV give no option everywhere: maps of constant
    regions become a quarter smaller.

    Args:
        values: (h, w) integers in [0, 65535].
        name: whose map it is, for the message.

    Raises:
        ValueError: if a value is out of range.
    """
    assert values.ndim == 2 and values.size > 0, values.shape
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"{name}: a region map holds {values.min()} to {values.max()}; files store 0 to 65535")
    bits = 8 if values.max() < 256 else 16
    rows = values.astype(f">u{bits // 8}")
    height, width = rows.shape
    no_filter = np.zeros((height, 1), dtype=np.uint8)
    pixels = np.hstack([no_filter, np.ascontiguousarray(rows).view(np.uint8)]).tobytes()
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)  # greyscale, not interlaced
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels, _LEVEL)), (b"IEND", b""))
    return _SIGNATURE + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def read_png(path: str | os.PathLike[str]) -> np.ndarray:
    """Read what `encode_png` made.

    Returns:
        (h, w) int32.

    Raises:
        OSError: naming the file, if it is missing, cut short, damaged, or no greyscale PNG.
    """
    with open(path, "rb") as file:
        data = file.read()
    try:
        _check_chunks(data)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.mode not in ("L", "I;16"):
                raise ValueError(f"its mode is {image.mode}")
            return np.array(image).astype(np.int32)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything, and without the file's name
        raise OSError(f"{os.fspath(path)}: cannot read this region map: {error}") from error


def _check_chunks(data: bytes) -> None:
    """Compare all checksums, which Pillow does not: a flipped bit would become another map."""
    if not data.startswith(_SIGNATURE):
        raise ValueError("it is no PNG")
    kind, start = b"", len(_SIGNATURE)
    while kind != b"IEND":
        if len(data) < start + 12:
            raise ValueError("it is cut short")
        length = int.from_bytes(data[start : start + 4], "big")
        kind, end = data[start + 4 : start + 8], start + 8 + length
        if data[end : end + 4] != struct.pack(">I", zlib.crc32(data[start + 4 : end])):
            raise ValueError(f"the checksum at byte {end} is wrong")
        start = end + 4
