"""The subcommands of tools/evaluate.py: one module each, with SUMMARY, add_arguments(parser) and run(args)."""

from types import ModuleType

from . import regions

COMMANDS: dict[str, ModuleType] = {
    "regions": regions,
}

__all__ = ["COMMANDS"]
