"""One OUTPUT_DIR belongs to one run at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from typing import BinaryIO

from detectron2.engine import HookBase

from ..weight_files import remove_leftovers
from .processes import on_main_process

logger = logging.getLogger(__name__)

_NAME = ".train.lock"


class OutputLock(HookBase):
    """Refuses to train into a folder that another process trains into; deletes what killed writes left behind there.

    The lock is one of the operating system (POSIX record lock), which ends with the process, however that ends: there are
    no stale ones, and workers of data loaders that outlive a killed process do not hold it. Comes before all other hooks.
    """

    def __init__(self, folder: str) -> None:
        """
        Args:
            folder: OUTPUT_DIR; must exist.
        """
        self._folder = folder
        self._file: BinaryIO | None = None

    def before_train(self) -> None:
        """Lock and clean the folder.

        Raises:
            RuntimeError: if another process, which is named, trains into it.
        """
        on_main_process(self._acquire)

    def release(self) -> None:
        """Unlock it; not by a hook's `after_train`, as the evaluations and records of other hooks follow it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _acquire(self) -> None:
        path = os.path.join(self._folder, _NAME)
        file: BinaryIO = open(path, "ab+", buffering=0)  # noqa: SIM115  # it stays open as long as the run lasts
        if not _lock(file, self._folder):
            return
        file.truncate(0)
        with contextlib.suppress(OSError):  # of a full disk: the lock counts, not its text
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._file = file
        for name in remove_leftovers(self._folder):
            logger.info("Deleted %s, which a killed process had not finished writing", name)


def check_unlocked(folder: str) -> None:
    """Look whether another process trains into a folder, before anything is written there; in all processes.

    Raises:
        RuntimeError: as `OutputLock`.
    """
    on_main_process(lambda: _check_unlocked(folder))


def _check_unlocked(folder: str) -> None:
    path = os.path.join(folder, _NAME)
    if os.path.isfile(path):
        with open(path, "ab+", buffering=0) as file:
            _lock(file, folder)


def _lock(file: BinaryIO, folder: str) -> bool:
    """Lock an open file; returns whether it is locked. Closes it if not, with a warning or an error."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        with file:
            file.seek(0)
            owner = file.read().decode().strip() or "another process"
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise RuntimeError(
                f"OUTPUT_DIR {folder} is in use: {owner} trains into it. Choose another OUTPUT_DIR, or end that run"
            ) from error
        logger.warning("OUTPUT_DIR %s cannot be locked (%s): see to it that one run at a time uses it", folder, error)
        return False
    return True
