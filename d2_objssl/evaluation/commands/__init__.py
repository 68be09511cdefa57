"""The subcommands of tools/evaluate.py: one module each, with SUMMARY, add_arguments(parser) and run(args).

Those that can fill a column of a table also have is_record_of(args, record).
"""

from types import ModuleType

from . import concepts, regions, segmentation, svm

COMMANDS: dict[str, ModuleType] = {
    "regions": regions,
    "svm": svm,
    "segmentation": segmentation,
    "concepts": concepts,
}

__all__ = ["COMMANDS"]
