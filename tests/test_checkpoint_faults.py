"""Checkpoints under faults: full disks, missing permissions, damaged and foreign files, killed writers, two runs at once."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser
from test_checkpoint import Trainer, tiny_model
from test_weight_files import EVIL_FILES, Evil
from torch import nn

from d2_objssl.checkpoint import CheckpointError, ObjSSLCheckpointer
from d2_objssl.engine import default_setup
from d2_objssl.engine.hooks import Checkpoints
from d2_objssl.engine.output_lock import OutputLock


def new_checkpointer(folder: Path) -> ObjSSLCheckpointer:
    return ObjSSLCheckpointer(tiny_model(), str(folder), trainer=Trainer())


def write_run(folder: Path, iterations: range, *, start: int = 0, keep: int | None = None) -> ObjSSLCheckpointer:
    """Write a checkpoint for each iteration, as the hook of a run that began at `start` does; weights: the iteration."""
    checkpointer = new_checkpointer(folder)
    hook = Checkpoints(checkpointer, 1, max_to_keep=keep)
    hook.trainer = SimpleNamespace(start_iter=start, max_iter=1000)
    hook.before_train()
    for iteration in iterations:
        nn.init.constant_(checkpointer.model.weight, iteration)
        hook.step(iteration)
    return checkpointer


def resumed_at(folder: Path) -> int:
    """Iteration of the checkpoint that is resumed from, which must fill the model."""
    checkpointer = new_checkpointer(folder)
    iteration = checkpointer.resume_or_load("", resume=True)["iteration"]
    assert (checkpointer.model.weight == iteration).all()
    return iteration


def files_in(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


# ------------------------------------------------------------------------------------------------ writing


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Makes a folder one in which this process may not write, root or not."""
    user = os.geteuid()

    def protect(folder: Path) -> None:
        folder.chmod(0o555)
        if user == 0:
            os.seteuid(65534)

    yield protect
    os.seteuid(user)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """The kernel's own ENOSPC: what is written goes to /dev/full."""
    write_run(tmp_path, range(2), keep=1)
    before = files_in(tmp_path)
    (tmp_path / ".model_0000002.pth.tmp").symlink_to("/dev/full")
    with pytest.raises(
        OSError, match=r"No space left.*about 16,\d+ bytes needed, [\d,]+ bytes free.*--resume"
    ) as caught:
        write_run(tmp_path, range(2, 3), start=2, keep=1)
    assert caught.value.errno == errno.ENOSPC and "model_0000002.pth" in str(caught.value)
    assert files_in(tmp_path) == before and resumed_at(tmp_path) == 1


def test_a_folder_without_permission_leaves_the_checkpoint_before(read_only: Callable[[Path], None]) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # below no folder that is closed to other users
    try:
        checkpointer = write_run(folder, range(1))
        before = files_in(folder)
        read_only(folder)
        with pytest.raises(OSError, match=r"Permission denied; nothing was written.*correct the permissions"):
            checkpointer.save("model_0000001", iteration=1)
        with pytest.raises(PermissionError, match=r"\.train\.lock"):
            OutputLock(str(folder)).before_train()
        assert files_in(folder) == before and resumed_at(folder) == 0
    finally:
        os.seteuid(os.getuid())
        shutil.rmtree(folder)


def test_the_older_checkpoint_stays_until_the_new_one_is_read_again(tmp_path: Path) -> None:
    """A storage that flips a bit of what it is given to keep."""
    write_run(tmp_path, range(1), keep=1)

    def flip(descriptor: int) -> None:
        content = bytearray(Path(f"/proc/self/fd/{descriptor}").read_bytes())
        content[len(content) * 2 // 3] ^= 1  # in a tensor
        os.pwrite(descriptor, content, 0)

    with (
        mock.patch("os.fsync", flip),
        pytest.raises(OSError, match="What was written is not what is read again"),
    ):
        write_run(tmp_path, range(1, 2), start=1, keep=1)
    assert sorted(files_in(tmp_path)) == ["last_checkpoint", "model_0000000.pth"] and resumed_at(tmp_path) == 0


@pytest.mark.parametrize(("keep", "left"), [(1, [9, 12]), (3, [4, 5, 9, 12]), (None, [3, 4, 5, 9, 12])])
def test_files_from_before_a_resume_count(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    """9 is of a part of the run that is not gone on from; 3 to 5 are before the place where it goes on, 6, in 12."""
    write_run(tmp_path, range(3, 6))
    write_run(tmp_path, range(9, 10), start=9)
    write_run(tmp_path, range(12, 13), start=6, keep=keep)
    assert sorted(int(f.stem[6:]) for f in tmp_path.glob("model_*.pth")) == left


# ------------------------------------------------------------------------------------------------ reading

BAD: dict[str, Callable[[Path, Path], object]] = {
    "cut": lambda path, _: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path, _: path.write_bytes(b""),
    "zeros": lambda path, _: path.write_bytes(bytes(path.stat().st_size)),
    "garbage": lambda path, _: path.write_bytes(bytes(range(256)) * 100),
    "foreign weights": lambda path, _: torch.save(tiny_model().state_dict(), path),
    "no dict": lambda path, _: torch.save([1], path),
    "missing": lambda path, _: path.unlink(),
    "folder": lambda path, _: (path.unlink(), path.mkdir()),
    "malicious": lambda path, made: torch.save({"model": tiny_model().state_dict(), "trainer": Evil(made)}, path),
    "malicious, old format": lambda path, made: torch.save(Evil(made), path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_last_checkpoint_is_named_and_passed_over(tmp_path: Path, kind: str) -> None:
    write_run(tmp_path, range(2))
    BAD[kind](tmp_path / "model_0000001.pth", tmp_path / "made")
    warned: list[str] = []
    checkpointer = new_checkpointer(tmp_path)
    with mock.patch.object(checkpointer.logger, "warning", lambda text, *args: warned.append(text % args)):
        assert checkpointer.resume_or_load("", resume=True)["iteration"] == 0
    assert "model_0000001.pth" in warned[0] and "model_0000000.pth instead" in warned[1]
    assert not (tmp_path / "made").exists(), "code in the file was run"
    assert resumed_at(tmp_path) == 0


def test_weights_alone_are_no_checkpoint_of_a_run(tmp_path: Path) -> None:
    torch.save({"model": tiny_model().state_dict()}, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(CheckpointError, match=r"(?s)model_final.pth: it has no trainer, so it is not.*--resume"):
        new_checkpointer(tmp_path).resume_or_load("", resume=True)


def test_checkpoints_are_found_without_last_checkpoint(tmp_path: Path) -> None:
    """Lost, or not yet written when the process was killed behind its first checkpoint."""
    write_run(tmp_path, range(3))
    (tmp_path / "last_checkpoint").unlink()
    assert new_checkpointer(tmp_path).has_checkpoint() and resumed_at(tmp_path) == 2


@pytest.mark.parametrize("kind", EVIL_FILES)
def test_malicious_weights_are_refused(tmp_path: Path, kind: str) -> None:
    """As MODEL.WEIGHTS, in every format."""
    suffix, make = EVIL_FILES[kind]
    path = tmp_path / f"evil{suffix}"
    path.write_bytes(make(Evil(tmp_path / "made")))
    checkpointer = new_checkpointer(tmp_path / "run")
    with pytest.raises(CheckpointError, match="evil"):
        checkpointer.resume_or_load(str(path), resume=False)
    assert not (tmp_path / "made").exists() and (checkpointer.model.weight == 1).all()


# ------------------------------------------------------------------------------------------------ one run a folder

# Locks the file, then is waited for by a child that has inherited the file, as workers of data loaders have.
_HOLDER = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("process 1 on elsewhere")
file.flush()
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(60)
"""


def test_a_second_run_in_one_folder_is_refused(tmp_path: Path) -> None:
    """Until the first one ends, by SIGKILL; a worker that outlives it does not count."""
    path = tmp_path / ".train.lock"
    leftover = tmp_path / ".model_0000002.pth.tmp"
    leftover.write_bytes(b"half a checkpoint, or one that the other run is writing")
    with subprocess.Popen([sys.executable, "-c", _HOLDER, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        orphan = int(holder.stdout.readline())
        try:
            lock = OutputLock(str(tmp_path))
            in_use = r"in use: process 1 on elsewhere trains into it.*another OUTPUT_DIR"
            with pytest.raises(RuntimeError, match=in_use):
                lock.before_train()
            lock.release()
            cfg = get_cfg()
            cfg.OUTPUT_DIR = str(tmp_path)
            with pytest.raises(RuntimeError, match=in_use):
                default_setup(cfg, default_argument_parser().parse_args([]))
            assert set(tmp_path.iterdir()) == {path, leftover}, "nothing is written"
            holder.kill()
            holder.wait()
            lock.before_train()
            assert not leftover.exists() and path.read_text().startswith(f"process {os.getpid()} on ")
            lock.release()
        finally:
            os.kill(orphan, signal.SIGKILL)


def test_a_file_system_without_locks_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with mock.patch.object(fcntl, "lockf", side_effect=OSError(errno.ENOLCK, "No locks available")):
        OutputLock(str(tmp_path)).before_train()
    assert "cannot be locked" in caplog.text
