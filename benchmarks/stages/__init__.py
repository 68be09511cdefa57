"""The subcommands of speed.py: one module each, with SUMMARY, add_arguments(parser) and run(args) -> Measurement.

`args` has repeats, seed and quick beside the module's own; with `quick` a stage takes a minute at most.
"""

from types import ModuleType

from . import data, masks, optimizer, step

STAGES: dict[str, ModuleType] = {
    "data": data,
    "masks": masks,
    "step": step,
    "optimizer": optimizer,
}

__all__ = ["STAGES"]
