"""Log files that cannot be written, on a full disk for example, do not end a run: its next checkpoint may find room again."""

from __future__ import annotations

import logging
from collections.abc import Callable

from detectron2.utils.events import EventWriter

logger = logging.getLogger(__name__)

_WARNING_PERIOD = 100  # failures


class GuardedWriter(EventWriter):
    """Passes everything on to a writer, and warns instead of raising where the file system refuses.

    What could not be written is missing from the log. Detectron2's `JSONWriter` goes on when it is possible again;
    TensorBoard's repeats its error until the process ends.
    """

    def __init__(self, writer: EventWriter, folder: str) -> None:
        """
        Args:
            writer: it writes.
            folder: where to, for the warning.
        """
        self._writer = writer
        self._folder = folder
        self._num_failures = 0

    def write(self) -> None:
        """Write, or warn."""
        self._try(self._writer.write)

    def close(self) -> None:
        """Close, or warn."""
        self._try(self._writer.close)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            if self._num_failures % _WARNING_PERIOD == 0:
                logger.warning(
                    "%s cannot write its log in OUTPUT_DIR %s: %s. The run goes on without; free some space, or it will end "
                    "with the next checkpoint. This is said at the first failure and at every %dth; so far there were %d.",
                    type(self._writer).__name__,
                    self._folder,
                    error,
                    _WARNING_PERIOD,
                    self._num_failures + 1,
                )
            self._num_failures += 1
