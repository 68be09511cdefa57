"""Which checkpoints in a folder are left from an earlier run: a run that begins there anew must not be resumed from them.

`earlier_checkpoints.json` in the folder: name -> [bytes, time of the last change in nanoseconds]. A file counts as left over
as long as it is as listed; one that the new run has written under the same name does not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re

from .weight_files import write_atomically

_NAME = "earlier_checkpoints.json"


def set_aside_checkpoints(folder: str) -> list[str]:
    """List the checkpoints in a folder as those of an earlier run. They stay; `last_checkpoint`, which names one, does not.

    Returns:
        Their names, sorted.

    Raises:
        OSError: if the list cannot be written; then nothing has changed.
    """
    names = sorted(name for name in os.listdir(folder) if re.fullmatch(r"model_(\d+|final)\.pth", name))
    if names:
        listed = json.dumps({name: _identity(os.path.join(folder, name)) for name in names}, indent=1)
        # Before the pointer goes: a process that is killed in between leaves one to a file that does not count.
        write_atomically(os.path.join(folder, _NAME), lambda file: file.write(listed.encode()))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(folder, "last_checkpoint"))
    return names


def earlier_checkpoints(folder: str) -> set[str]:
    """Paths of the checkpoints in a folder that are as `set_aside_checkpoints` has listed them; empty without a list."""
    try:
        with open(os.path.join(folder, _NAME), encoding="utf-8") as file:
            listed = json.load(file)
    except FileNotFoundError:
        return set()
    return {path for name, then in listed.items() if _identity(path := os.path.join(folder, name)) == then}


def _identity(path: str) -> list[int] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return [status.st_size, status.st_mtime_ns]
