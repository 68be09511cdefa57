"""Images that cannot be read: how they are told from other errors, counted, and listed for the user."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cv2
from PIL import Image
from scipy.special import bdtrc

from .image_reading import check_ordinary_file, read_rgb_image

logger = logging.getLogger(__name__)

# What reading a broken image raises: OSError covers PIL's UnidentifiedImageError and missing or truncated files.
_UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError, cv2.error)
_MIN_BAD = 10  # so many say nothing about the share yet
_CHANCE = 1e-6  # of stopping a run whose share is at the limit; small, as it is asked again with every bad image
_NOT_PRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_NUM_EXAMPLES = 3  # files that a message names


def printable(text: str) -> str:
    """Text as one line of UTF-8, for logs and lists: control characters and bytes that are no UTF-8 as Python escapes."""
    return _NOT_PRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def why_unreadable(error: Exception, file_name: str) -> str | None:
    """Why an image or its label map could not be read; None if the error is another one, of a program or of labels.

    Args:
        error: what a mapper raised.
        file_name: of the image.
    """
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, _UNREADABLE):
        return reason
    if os.path.isfile(file_name):
        try:  # Pillow's decoders raise almost anything, which Detectron2's mapper lets through
            read_rgb_image(file_name)
        except OSError:
            return reason
    return None


def are_too_many(num_bad: int, num_seen: int, max_share: float) -> bool:
    """Whether the share of bad images is surely above the limit, and not only in the images seen so far.

    Args:
        num_bad, num_seen: images; at most 10 bad ones are never too many.
        max_share: the limit, from 0 to 1. At a true share of this, so many bad ones have a probability below 1e-6
            (binomial distribution).
    """
    if num_bad <= _MIN_BAD or num_bad <= max_share * num_seen:
        return False
    return bool(bdtrc(num_bad - 1, num_seen, max_share) < _CHANCE)


def check_test_files(dataset_dicts: Iterable[dict[str, Any]], name: str) -> None:
    """Find images of a test set that are missing, empty or no files before the test, by their sizes alone.

    Raises:
        OSError: with their number and the first of them.
    """
    bad = []
    for dataset_dict in dataset_dicts:
        file = dataset_dict["file_name"]
        try:
            check_ordinary_file(file)
            if "://" not in file and os.path.getsize(file) == 0:
                bad.append(f"{file}: the file is empty")
        except OSError as error:
            bad.append(str(error))
    if bad:
        examples = "; ".join(map(printable, bad[:_NUM_EXAMPLES]))
        raise OSError(f'{len(bad)} image(s) of DATASETS.TEST "{name}" cannot be read, for example {examples}')


class StrictMapper:
    """A mapper whose error about an unreadable image names the file: a test can do without none of them."""

    def __init__(self, mapper: Callable[[dict[str, Any]], Any], name: str) -> None:
        """
        Args:
            mapper: maps a dataset dict.
            name: the data set.
        """
        self.mapper = mapper
        self.name = name

    def __call__(self, dataset_dict: dict[str, Any]) -> Any:
        """Map one dataset dict.

        Raises:
            OSError: naming the image, if it cannot be read.
        """
        try:
            return self.mapper(dataset_dict)
        except Exception as error:
            file = str(dataset_dict["file_name"])
            reason = why_unreadable(error, file)
            if reason is None:
                raise
            raise OSError(
                f'{printable(file)}, an image of DATASETS.TEST "{self.name}", cannot be read: {printable(reason)}'
            ) from error


class BadImages:
    """Counts the unreadable images of this process, and lists each file once, with the reason.

    Attributes:
        num_seen: images read so far, the unreadable ones included.
        num_bad: how many of them were unreadable; a file counts as often as it is read.
    """

    def __init__(self, max_share: float) -> None:
        """
        Args:
            max_share: DATALOADER.MAX_BAD_IMAGES, see `are_too_many`.
        """
        self.max_share = max_share
        self.num_seen = 0
        self.num_bad = 0
        self._files: set[str] = set()
        self._list_file: str | None = None
        self._listed: set[bytes] = set()
        self._position = 0  # up to which the list was read

    def list_in(self, path: str) -> None:
        """Append the files to this list from now on: a line "path, tab, reason" each.

        All processes of a run share the list, and a run that resumes goes on with it; no file is in it twice.
        """
        self._list_file = path

    def count(self, num_good: int, unreadable: Sequence[tuple[str, str]]) -> None:
        """Count a batch.

        Args:
            num_good: its images.
            unreadable: (path, reason) of those that they stand in for.

        Raises:
            RuntimeError: if the share of unreadable images is surely larger than allowed.
        """
        self.num_seen += num_good + len(unreadable)
        self.num_bad += len(unreadable)
        new = {file: reason for file, reason in unreadable if file not in self._files}
        for file, reason in new.items():
            logger.warning("Cannot read %s (%s); another image takes its place.", printable(file), printable(reason))
        self._files.update(new)
        if new and self._list_file is not None:
            self._append(new)
        if unreadable and are_too_many(self.num_bad, self.num_seen, self.max_share):
            raise RuntimeError(
                f"{self.num_bad} of {self.num_seen} images could not be read, more than DATALOADER.MAX_BAD_IMAGES "
                f"({self.max_share:.0%}) allows; {self._describe_files()}"
            )

    def summary(self) -> str:
        """The counts in words, and where the files are listed."""
        return (
            f"{self.num_bad} of {self.num_seen} images read by this process could not be decoded and were replaced "
            f"({self.num_bad / max(self.num_seen, 1):.2%}): {self._describe_files()}"
        )

    def _describe_files(self) -> str:
        examples = [printable(file) for file in sorted(self._files)[:_NUM_EXAMPLES]]
        where = f"; all of them are listed in {self._list_file}" if self._list_file is not None else ""
        return f"{len(self._files)} file(s), for example {examples}{where}"

    def _append(self, reasons: dict[str, str]) -> None:
        """Add lines to the list, except for files that another process, or an earlier run, added."""
        assert self._list_file is not None
        try:
            with open(self._list_file, "a+b") as file:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.lockf(file, fcntl.LOCK_EX)
                file.seek(self._position)
                self._listed.update(line.partition(b"\t")[0] for line in file)
                for path, reason in reasons.items():
                    name = printable(path).encode()
                    if name not in self._listed:
                        file.write(name + f"\t{printable(reason)}\n".encode())
                        self._listed.add(name)
                file.flush()
                self._position = file.seek(0, os.SEEK_END)
        except OSError as error:  # of a full disk; the log has the same
            logger.warning("Cannot write %s: %s", self._list_file, error)
