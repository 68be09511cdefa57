"""Types of command-line options."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'"{text}" is not a positive whole number')
    return int(text)
