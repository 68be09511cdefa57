"""The subcommands of speed.py: one module each, with SUMMARY, add_arguments(parser) and run(args) -> Measurement.

`args` has repeats, seed and quick beside the module's own; with `quick` a stage takes a minute at most.
"""

from types import ModuleType

from . import bootstrap, data, evaluation, losses, masks, optimizer, regions, step

STAGES: dict[str, ModuleType] = {
    "data": data,
    "regions": regions,
    "masks": masks,
    "bootstrap": bootstrap,
    "losses": losses,
    "step": step,
    "optimizer": optimizer,
    "evaluation": evaluation,
}

__all__ = ["STAGES"]
