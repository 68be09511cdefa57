"""Commands that run to their end once: resumed where they were stopped, not repeated when they are done."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAIN_NET = ROOT / "tools/train_net.py"
CONVERT = ROOT / "tools/convert_checkpoint.py"
EVALUATE = ROOT / "tools/evaluate.py"
PERIOD_S = 20.0  # between two lines of progress


@dataclass
class Run:
    """A command with a folder of its own.

    The folder keeps all state: `command.txt`, `stdout.txt`, and `done`, once the command has succeeded.

    Attributes:
        name: in messages.
        output: the folder.
        arguments: a Python script and its arguments; called again, it must go on with what it left in the folder.
    """

    name: str
    output: Path
    arguments: list[str]

    @property
    def is_done(self) -> bool:
        """Whether it has succeeded before."""
        return (self.output / "done").exists()

    def metrics(self) -> list[dict[str, float]]:
        """Rows of metrics.json, by iteration."""
        path = self.output / "metrics.json"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = {}
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the last line, if the run is being written or was killed
                continue
            rows[row["iteration"]] = row
        return [rows[i] for i in sorted(rows)]


def training(name: str, config: str, output: Path, overrides: list[str], num_gpus: int = 1) -> Run:
    """A call of tools/train_net.py with a config file, relative to the checkout, and KEY VALUE overrides."""
    arguments = [os.path.relpath(TRAIN_NET), "--resume", "--config-file", os.path.relpath(ROOT / config)]
    if num_gpus > 1:
        arguments += ["--num-gpus", str(num_gpus)]
    return Run(name, output, [*arguments, "OUTPUT_DIR", str(output), *overrides])


def conversion(pretraining: Run) -> tuple[Run, Path]:
    """The conversion, with its check, of what a run has pretrained; and the file of Detectron2 weights that it writes."""
    weights = pretraining.output / "backbone.pkl"
    arguments = [os.path.relpath(CONVERT), str(pretraining.output / "model_final.pth"), str(weights), "--verify"]
    return Run(f"convert {pretraining.name}", pretraining.output / "conversion", arguments), weights


def environment_of(threads: int) -> dict[str, str]:
    """Environment of a process with that many CPU threads, which imports this checkout."""
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    return os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


def execute(run: Run, threads: int) -> None:
    """Run to the end unless that was done before; show progress once in a while.

    Raises:
        SystemExit: if the command fails, with the end of its log, or if another command began in the same folder.
    """
    command = shlex.join(run.arguments)
    begun = run.output / "command.txt"
    if begun.exists() and begun.read_text() != command:
        raise SystemExit(f"{run.output} belongs to another command (see {begun}); choose another --output or delete it")
    if run.is_done:
        print(f"[{run.name}] done before: {run.output}", flush=True)
        return
    print(f"[{run.name}] {'goes on: ' if begun.exists() else ''}{command}", flush=True)
    run.output.mkdir(parents=True, exist_ok=True)
    begun.write_text(command)
    start = time.time()
    with open(run.output / "stdout.txt", "a") as log:
        environment = environment_of(threads)
        process = subprocess.Popen(
            [sys.executable, *run.arguments], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            _watch(process, run)
        finally:
            if process.poll() is None:
                process.terminate()
    if process.returncode != 0:
        tail = "\n".join((run.output / "stdout.txt").read_text(errors="replace").splitlines()[-30:])
        raise SystemExit(
            f"[{run.name}] failed with status {process.returncode}; end of {run.output}/stdout.txt:\n{tail}"
        )
    (run.output / "done").touch()
    print(f"[{run.name}] finished in {time.time() - start:.0f} s", flush=True)


def _watch(process: subprocess.Popen[bytes], run: Run) -> None:
    """Wait for a process, and print how far it is."""
    last = time.time()
    while process.poll() is None:
        time.sleep(0.2)
        if time.time() - last > PERIOD_S:
            last = time.time()
            rows = [r for r in run.metrics() if "total_loss" in r]
            if rows:
                row, eta = rows[-1], f"{rows[-1].get('eta_seconds', 0):.0f} s to go"
                print(f"[{run.name}] iteration {row['iteration'] + 1}, loss {row['total_loss']:.3f}, {eta}", flush=True)
