"""Merging configs such that all keys that do not go are found at once, where yacs stops at the first."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from detectron2.config import CfgNode


def merge_file(cfg: CfgNode, config_file: str) -> list[str]:
    """Merge a file as Detectron2 does (in place); if that fails, key by key, and list all that is wrong.

    Raises:
        ValueError: naming the file, if it is no YAML of keys and values.
    """
    loaded = _load_file(config_file)
    before = cfg.clone()
    try:
        cfg.merge_from_file(config_file)
    except (KeyError, ValueError, TypeError, AttributeError):
        mistakes = merge_node(before, loaded, config_file)
        cfg.update(before)
        return mistakes
    return []


def _load_file(config_file: str) -> CfgNode:
    try:
        loaded = CfgNode.load_yaml_with_base(config_file, allow_unsafe=True)  # as merge_from_file
        if isinstance(loaded, dict):
            return CfgNode(loaded)
        reason = "it has none"
    except Exception as error:  # of YAML, of the file system, of the encoding
        reason = "it has none" if isinstance(error, TypeError) else str(error)  # TypeError: nowhere to look for _BASE_
    raise ValueError(
        f"--config-file {config_file} must have keys of the config and their values as YAML, such as "
        f'"SOLVER: {{MAX_ITER: 7}}": {reason}'
    )


def merge_node(cfg: CfgNode, node: CfgNode, where: str) -> list[str]:
    """As `merge_pairs`, for all keys of a tree."""
    return merge_pairs(cfg, _leaves(node), where)


def merge_pairs(cfg: CfgNode, pairs: Iterable[tuple[str, Any]], where: str) -> list[str]:
    """Merge full keys and values into `cfg` (in place); list those that do not go, and go on behind them.

    Args:
        cfg: the config.
        pairs: such as ("SOLVER.MAX_ITER", "7"); text is read as Python.
        where: what they come from, for the message.
    """
    known = [key for key, _ in _leaves(cfg)]
    mistakes = []
    for key, value in pairs:
        if below := [k for k in known if k.startswith(f"{key}.")]:  # the message of yacs would show all of them
            mistakes.append(f"{key} ({where}): it is {value!r}; it must have keys below it, such as {below[0]}")
            continue
        try:
            cfg.merge_from_list([key, value])
        except (AssertionError, TypeError):  # yacs has no such key; TypeError: what is above is no node
            mistakes.append(f"{key} ({where}): there is no such key{suggest(key, known)}")
        except ValueError as error:  # of another type
            mistakes.append(f"{key} ({where}): {error}")
    return mistakes


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def suggest(word: str, known: Iterable[str]) -> str:
    """What to say of an unknown word: "; did you mean ...?", or nothing where no known one is near."""
    near = difflib.get_close_matches(word, list(known), n=2)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def raise_mistakes(mistakes: Iterable[str]) -> None:
    """Raise the ValueError that lists the mistakes, if there are any."""
    if mistakes := list(dict.fromkeys(mistakes)):
        lines = "".join(f"\n {i}. {mistake}" for i, mistake in enumerate(mistakes, start=1))
        raise ValueError(f"{len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''} in the config:{lines}")
