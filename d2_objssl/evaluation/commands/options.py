"""What the subcommands share: types of options, and a check of the files that they are to write."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

PICTURES = ("picture", "statistics_picture")


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'"{text}" is not a positive whole number')
    return int(text)


def check_outputs(args: argparse.Namespace) -> None:
    """Check, before anything is computed, that the record and the pictures can be written; creates nothing.

    Raises:
        OSError: if one cannot.
        ValueError: if the name of a picture does not end in ".png".
    """
    for name in ("output", *PICTURES):
        path = getattr(args, name, None)
        if not path:
            continue
        option = f"--{name.replace('_', '-')} {path}"
        if name in PICTURES and Path(path).suffix.lower() != ".png":
            raise ValueError(f'{option}: pictures are written as PNG, but that does not end in ".png"')
        if Path(path).is_dir():
            raise IsADirectoryError(f"{option} is a folder; give the name of a file")
        # Its own folder may be created; the nearest one that is there decides.
        folder = next(p for p in Path(path).absolute().parents if p.exists())
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OSError(f"{option} cannot be written: {error.strerror}: {folder}") from error
