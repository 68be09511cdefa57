"""Logs on a full disk."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter
from tiny_runs import pretrain_cfg

from d2_objssl.engine import Trainer
from d2_objssl.engine.log_writers import GuardedWriter


class _FullDisk(EventWriter):
    """Fails while `is_full`."""

    is_full = True
    num_written = 0

    def write(self) -> None:
        if self.is_full:
            raise OSError(28, "No space left on device")
        self.num_written += 1

    close = write


def test_a_run_outlives_a_full_disk(caplog: Any) -> None:
    disk = _FullDisk()
    writer = GuardedWriter(disk, "/some/run")
    for _ in range(201):
        writer.write()
    writer.close()
    messages = [r.getMessage() for r in caplog.records]
    assert [m.split()[-1] for m in messages] == ["1.", "101.", "201."]
    assert messages[0].startswith("_FullDisk cannot write its log in OUTPUT_DIR /some/run: [Errno 28] No space left")
    disk.is_full = False
    writer.write()
    writer.close()
    assert disk.num_written == 2 and len(caplog.records) == 3


def test_other_errors_are_raised() -> None:
    class Broken(_FullDisk):
        def write(self) -> None:
            raise KeyError("loss")

    with pytest.raises(KeyError):
        GuardedWriter(Broken(), "").write()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_metrics_on_a_full_device_are_warned_about(caplog: Any) -> None:
    writer = GuardedWriter(JSONWriter("/dev/full"), "out")
    with EventStorage() as storage, caplog.at_level(logging.WARNING, "d2_objssl"):
        for _ in range(3):
            storage.put_scalar("loss", 1.0)
            storage.step()
            writer.write()
        writer.close()
    (record,) = caplog.records
    assert "JSONWriter cannot write its log in OUTPUT_DIR out: [Errno 28]" in record.getMessage()


def test_the_trainer_guards_its_writers(photos: Path, folder: Path, monkeypatch: Any, caplog: Any) -> None:
    """The run comes to its end, with its checkpoint, and the parent's list of writers is used."""
    disk = _FullDisk()
    monkeypatch.setattr("detectron2.engine.defaults.default_writers", lambda *args: [disk])
    trainer = Trainer(pretrain_cfg(photos, folder, "SOLVER.MAX_ITER", 1, "SOLVER.WARMUP_ITERS", 0))
    trainer.train()
    assert (folder / "model_final.pth").exists() and "_FullDisk cannot write its log" in caplog.text
