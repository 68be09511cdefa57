"""From an image file, of any format that Pillow knows, to a (H, W, 3) uint8 RGB array; H, W = size in pixels."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager
from PIL import Image

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"


def read_rgb_image(file_name: str) -> np.ndarray:
    """Read an image as Detectron2's `read_image(file_name, "RGB")` does, but faster and more strictly.

    Ordinary JPEGs are decoded by OpenCV (up to 2 grey levels from Pillow's decoder), everything else by Pillow: other
    formats, CMYK, rotation by EXIF orientation, huge images. 16-bit greyscale is scaled to 8 bits, where `read_image`
    clips it to white. As there, of several frames or pages the first counts, and transparency does not: a transparent
    pixel has the colour that is stored for it.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        OSError: naming the file, where it is missing, no ordinary file, empty, truncated, no image, has no pixels, holds
            fractions or more than 16 bits, or exceeds Pillow's limit on decompression bombs.
    """
    check_ordinary_file(file_name)
    with PathManager.open(file_name, "rb") as f:
        data = f.read()
    if not data:
        raise OSError(f"{file_name}: the file is empty")
    image = _decode_ordinary_jpeg(data)
    if image is None:
        try:
            image = _read_with_pillow(file_name, data)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise almost anything, and without the file's name
            raise OSError(f"{file_name}: cannot read this image: {error}") from error
    if image.size == 0:
        raise OSError(f"{file_name}: the image has no pixels: its shape is {image.shape}")
    return image


def check_ordinary_file(file_name: str) -> None:
    """Refuse folders, sockets, devices and pipes; these would block whoever opens them for ever.

    Raises:
        OSError: naming the file, also where it is missing.
    """
    if "://" not in file_name and not stat.S_ISREG(os.stat(file_name).st_mode):
        raise OSError(f"{file_name}: is a folder, pipe, socket or device, no file")


def missing_files(file_names: Iterable[str]) -> list[str]:
    """Those of many files that do not exist, or are folders; their folders are listed, which takes less than a call a file."""
    present: dict[str, set[str]] = {}
    missing = []
    for file_name in file_names:
        folder, name = os.path.split(file_name)
        if folder not in present:
            present[folder] = _list_files(folder or ".")
        if name not in present[folder] and not os.path.isfile(file_name):
            missing.append(file_name)
    return missing


def _list_files(folder: str) -> set[str]:
    """Names of the files in a folder; empty where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def check_image_file(file_name: str) -> None:
    """Refuse what Detectron2's `read_image` would wait for, or turn into another image without a word.

    Raises:
        OSError: naming the file, if it is missing, no ordinary file, empty, no image, a JPEG whose end is zeros, or has
            16 bits of grey or fractions, which `read_image` clips to white or black.
    """
    check_ordinary_file(file_name)
    with PathManager.open(file_name, "rb") as file:
        start = file.read(2)
        if not start:
            raise OSError(f"{file_name}: the file is empty")
        if start == _JPEG_START:
            file.seek(-1, os.SEEK_END)
            if file.read() == b"\0":
                file.seek(0)
                if _is_padded_with_zeros(file.read()):
                    raise OSError(f"{file_name}: truncated: zeros where the end of the JPEG should be")
            return
        file.seek(0)
        try:
            with Image.open(file) as image:
                mode = image.mode
        except Exception as error:
            raise OSError(f"{file_name}: cannot read this image: {error}") from error
    if mode.startswith(("I", "F")):
        raise OSError(
            f"{file_name}: its pixels are {mode} (more than 8 bits of grey), which Detectron2 clips at 255: convert the "
            "image to 8 bits"
        )


def _is_padded_with_zeros(jpeg: bytes) -> bool:
    """Whether the end is missing, as after a download into a file of the final size that was interrupted."""
    return jpeg.endswith(b"\0") and not jpeg.rstrip(b"\0").endswith(_JPEG_END)


def _decode_ordinary_jpeg(data: bytes) -> np.ndarray | None:
    """Decode a complete, upright, 8-bit, grey or YCbCr JPEG of acceptable size; return None for anything else."""
    # OpenCV silently fills the missing part of a truncated file with grey.
    if not data.startswith(_JPEG_START) or not data.endswith(_JPEG_END):
        return None
    frame = _read_jpeg_header(data)
    if frame is None:
        return None
    precision, num_pixels, num_channels, has_metadata = frame
    if precision != 8 or num_pixels == 0 or num_channels not in (1, 3):
        return None
    if Image.MAX_IMAGE_PIXELS is not None and num_pixels > Image.MAX_IMAGE_PIXELS:
        return None
    if has_metadata and not _is_upright(data):
        return None
    flags, to_rgb = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION, True
    if hasattr(cv2, "IMREAD_COLOR_RGB"):  # since OpenCV 4.10
        flags, to_rgb = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION, False
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if to_rgb and image is not None else image


def _read_jpeg_header(data: bytes) -> tuple[int, int, int, bool] | None:
    """Walk the segments before the pixels: (bits per sample, pixels, channels, EXIF or XMP present), None if odd."""
    frame, has_metadata, position = None, False, 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:  # start of scan
            return None if frame is None else (*frame, has_metadata)
        if marker == 0xE1:  # APP1
            has_metadata = True
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = (int.from_bytes(data[position + i : position + i + 2], "big") for i in (5, 7))
            frame = data[position + 4], height * width, data[position + 9]
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def _is_upright(data: bytes) -> bool:
    """Whether Pillow, and thus `read_image`, finds no orientation in the metadata that asks for turning the image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(0x0112, 1) not in range(2, 9)
    except Exception:  # broken metadata: `_read_with_pillow` decides
        return False


def _read_with_pillow(file_name: str, data: bytes) -> np.ndarray:
    """`read_image(file_name, "RGB")` as a writable array; refuses zero-padded JPEGs, scales 16 bits to 8."""
    if data.startswith(_JPEG_START) and _is_padded_with_zeros(data):
        raise ValueError("truncated: zeros where the end of the JPEG should be")
    with Image.open(io.BytesIO(data)) as header:
        mode = header.mode
    if mode == "F":
        raise ValueError("it holds fractions, whose white level is not known: convert it to 8 or 16 bits")
    if not mode.startswith("I"):
        return np.array(read_image(file_name, "RGB"))
    deep = read_image(file_name)  # (H, W), 16 or 32 bits
    if deep.min(initial=0) < 0 or deep.max(initial=0) > 0xFFFF:
        raise ValueError(f"its values reach from {deep.min()} to {deep.max()}, but 16-bit grey has 0 to 65535")
    return np.repeat((deep >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
