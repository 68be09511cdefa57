"""Work in several processes: the order of its results, and what becomes of it when its parent is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from d2_objssl.parallel import map_in_processes

ENDLESS = """
import os, sys, time
from d2_objssl.parallel import map_in_processes

def work(i):
    open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
    time.sleep(0 if i < 2 else 1000)

if __name__ == "__main__":
    list(map_in_processes(work, range(4), 2, chunk_size=1))
"""


def test_results_come_in_order() -> None:
    assert list(map_in_processes(abs, [-3, 2, -1], 1, chunk_size=2)) == [3, 2, 1]
    assert list(map_in_processes(abs, [-3, 2, -1], 2, chunk_size=2)) == [3, 2, 1]


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    (script := tmp_path / "endless.py").write_text(ENDLESS)
    (started := tmp_path / "started").mkdir()
    parent = subprocess.Popen([sys.executable, str(script), str(started)])
    wait_until(lambda: len(list(started.iterdir())) == 2 or parent.poll() is not None)
    workers = [int(file.name) for file in started.iterdir()]
    assert len(workers) == 2 and all(map(is_alive, workers))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not any(map(is_alive, workers)))


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """A process that nobody waits for may stay as a zombie: it has ended, too."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
