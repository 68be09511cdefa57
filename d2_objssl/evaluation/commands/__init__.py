"""The subcommands of tools/evaluate.py: one module each, with SUMMARY, add_arguments(parser) and run(args)."""

from types import ModuleType

from . import concepts, regions, segmentation, svm

COMMANDS: dict[str, ModuleType] = {
    "regions": regions,
    "svm": svm,
    "segmentation": segmentation,
    "concepts": concepts,
}

__all__ = ["COMMANDS"]
