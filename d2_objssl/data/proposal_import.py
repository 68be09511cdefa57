"""Regions from files of ranked, overlapping proposals: MCG's .mat files and results in COCO's format.

    H, W  size of an image, pixels

Both become bit sets of the best proposals by score, as in DetCon, section 4.1 (16 of MCG). The files hold numbers only:
reading them runs no code of theirs.

* MCG (Multiscale Combinatorial Grouping, Arbelaez et al., CVPR 2014), as precomputed for COCO and as its own scripts
  write it: one file an image, with `superpixels` (H, W) labels from 1 on, `labels`, a cell array with the superpixels of
  each proposal, and `scores`.
* COCO results: JSON, a list of {"image_id", "segmentation", "score"} for any number of images; the segmentations
  are run-length encoded, {"size": [H, W], "counts": ...}.
"""

from __future__ import annotations

import heapq
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import Metadata
from scipy.io import loadmat

from ..proposals import masks_to_bits
from ..structures import MAX_OVERLAPPING
from .ground_truth import check_same_size
from .region_maps import RegionSource

logger = logging.getLogger(__name__)

_MCG_FIELDS = ("superpixels", "labels", "scores")
# The proposals for COCO were published for the images of 2014, whose names had these prefixes.
_MCG_PREFIXES = ("", "COCO_train2014_", "COCO_val2014_")
_NUM_EXAMPLES = 5  # that a message names


class McgProposals(RegionSource):
    """The best proposals of MCG, from a folder of .mat files named as the images."""

    name = "mcg"
    overlapping = True

    def __init__(self, folder: str | os.PathLike[str], num_proposals: int = MAX_OVERLAPPING) -> None:
        """
        Args:
            folder: with NAME.mat, or COCO_train2014_NAME.mat, for an image NAME.jpg.
            num_proposals: how many proposals of an image are kept.
        """
        _check_num_proposals(num_proposals)
        self.folder = Path(folder)
        self.num_proposals = num_proposals

    def __call__(self, image: np.ndarray, dataset_dict: dict[str, Any]) -> np.ndarray:
        """See `RegionSource`."""
        file = self._find(dataset_dict)
        superpixels, labels, scores = _read_mcg(file)
        check_same_size(f"The proposals in {file} for {dataset_dict['file_name']}", superpixels.shape, image.shape[:2])
        if not len(scores):
            return np.zeros(image.shape[:2], dtype=np.int32)
        best = np.argsort(-scores, kind="stable")[: self.num_proposals]
        return masks_to_bits(np.isin(superpixels, labels[i]) for i in best)

    def check(self, dataset_dicts: Iterable[dict[str, Any]]) -> None:
        """See `RegionSource`."""
        missing = [d["file_name"] for d in dataset_dicts if not self._find(d).exists()]
        if missing:
            raise ValueError(f"{self.folder} has no .mat file for {len(missing)} image(s): {_examples(missing)}")

    def _find(self, dataset_dict: dict[str, Any]) -> Path:
        """The image's file; the first of its possible names if there is none."""
        stem = Path(dataset_dict["file_name"]).stem
        files = [self.folder / f"{prefix}{stem}.mat" for prefix in _MCG_PREFIXES]
        return next((file for file in files if file.exists()), files[0])


class CocoRleProposals(RegionSource):
    """The best segments of results in COCO's format.

    Where a data set has no annotations, and thus no ids of its own, the id of an image is the number at the end of its
    file's name, as in COCO; without a number, it is the name.
    """

    name = "coco_rle"
    overlapping = True

    def __init__(self, files: Sequence[str | os.PathLike[str]], num_proposals: int = MAX_OVERLAPPING) -> None:
        """
        Args:
            files: JSON; an image's results may be in several of them.
            num_proposals: how many results of an image are kept.
        """
        _check_num_proposals(num_proposals)
        self.files = [os.fspath(file) for file in files]
        self._best = _read_coco_results(self.files, num_proposals)
        self._unknown = set(self._best)

    def __call__(self, image: np.ndarray, dataset_dict: dict[str, Any]) -> np.ndarray:
        """See `RegionSource`."""
        what = f"A proposal in {_join(self.files)} for {dataset_dict['file_name']}"
        masks = [_decode_rle(segmentation, image.shape[:2], what) for segmentation in dataset_dict["proposals"]]
        return masks_to_bits(masks) if masks else np.zeros(image.shape[:2], dtype=np.int32)

    def prepare(self, dataset_dicts: Sequence[dict[str, Any]], metadata: Metadata) -> list[dict[str, Any]]:
        """See `RegionSource`; adds the "proposals" of each image, segmentations, best first."""
        kept = super().prepare(dataset_dicts, metadata)
        for d in kept:
            image_id = d["image_id"] if metadata.get("json_file") else _id_of_file(d["file_name"])
            d["proposals"] = self._best.get(image_id, [])
            self._unknown.discard(image_id)
        return kept

    def check(self, dataset_dicts: Iterable[dict[str, Any]]) -> None:
        """See `RegionSource`: images without proposals, and proposals for other images, do not go together."""
        without = [d["file_name"] for d in dataset_dicts if not d["proposals"]]
        if without and self._unknown:
            raise ValueError(
                f"{_join(self.files)}: the image ids are not those of the data set: {len(self._unknown)} have no image "
                f"({_examples(sorted(self._unknown, key=str))}), and {len(without)} image(s) have no proposal "
                f"({_examples(without)})"
            )
        if without:
            logger.warning("%s: %d image(s) have no proposal: %s", _join(self.files), len(without), _examples(without))

    def __getstate__(self) -> dict[str, Any]:
        """For other processes: there, each dataset dict brings its proposals."""
        return self.__dict__ | {"_best": {}, "_unknown": set()}


def _read_mcg(file: Path) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Superpixels (H, W), superpixels of each of R proposals, and scores (R,) of a .mat file."""
    try:
        content = loadmat(file, variable_names=_MCG_FIELDS)
    except NotImplementedError as error:
        raise ValueError(
            f"{file} is a MATLAB 7.3 file, which is not read: load it in MATLAB and save it again with -v7"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file raises anything
        raise ValueError(f"{file}: cannot read this .mat file: {error}") from error
    if absent := [field for field in _MCG_FIELDS if field not in content]:
        raise ValueError(
            f"{file} lacks {' and '.join(absent)}; MCG's proposals of segments have {', '.join(_MCG_FIELDS)} "
            "(MCG's files of boxes do not serve)"
        )
    superpixels, cells, scores = (content[field] for field in _MCG_FIELDS)
    if superpixels.ndim != 2 or superpixels.dtype.kind not in "biuf" or scores.dtype.kind not in "biuf":
        raise ValueError(f"{file}: superpixels is {superpixels.dtype} {superpixels.shape} and scores is {scores.dtype}")
    if cells.dtype != object or cells.size != scores.size or any(c.dtype.kind not in "biuf" for c in cells.ravel()):
        raise ValueError(f"{file}: labels must be a cell array of numbers for each of the {scores.size} scores")
    scores = scores.ravel().astype(np.float64)
    if not np.isfinite(scores).all():
        raise ValueError(f"{file}: {np.sum(~np.isfinite(scores))} of the {scores.size} scores are NaN or infinite")
    return superpixels, list(cells.ravel()), scores


def _read_coco_results(files: Sequence[str], num_proposals: int) -> dict[Any, list[dict[str, Any]]]:
    """By image id, the segmentations with the best scores, best first; of equal scores, the first ones."""
    best: dict[Any, list[tuple[float, int, dict[str, Any]]]] = {}
    number = 0
    for file in files:
        for position, result in enumerate(_load_list(file)):
            image_id, score, segmentation = _check_result(result, f"{file}: result {position}")
            number -= 1  # unique, so that segmentations are not compared
            heap = best.setdefault(image_id, [])
            if len(heap) < num_proposals:
                heapq.heappush(heap, (score, number, segmentation))
            else:
                heapq.heappushpop(heap, (score, number, segmentation))
    return {image_id: [s for _, _, s in sorted(heap, reverse=True)] for image_id, heap in best.items()}


def _load_list(file: str) -> list[Any]:
    try:
        with open(file, encoding="utf-8") as f:
            content = json.load(f)
    except ValueError as error:  # also of text that is no UTF-8
        raise ValueError(f"{file}: cannot read this JSON file: {error}") from error
    if not isinstance(content, list):
        raise ValueError(f"{file} holds a {type(content).__name__}; COCO results are a list")
    return content


def _check_result(result: Any, where: str) -> tuple[Any, float, dict[str, Any]]:
    """Image id, score and segmentation of a result."""
    if not isinstance(result, dict):
        raise ValueError(f"{where} is a {type(result).__name__}, not an object")
    if absent := [k for k in ("image_id", "segmentation", "score") if k not in result]:
        raise ValueError(f"{where} lacks {' and '.join(absent)}")
    image_id, score, segmentation = result["image_id"], result["score"], result["segmentation"]
    if not isinstance(image_id, (int, str)):
        raise ValueError(f"{where}: image_id is {image_id}")
    if not isinstance(score, (int, float)) or not math.isfinite(score):
        raise ValueError(f"{where} (image {image_id}): the score is {score}; it must be a finite number")
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError(f'{where} (image {image_id}): the segmentation is no run-length encoding ("size", "counts")')
    if not isinstance(segmentation["size"], list) or len(segmentation["size"]) != 2:
        raise ValueError(f"{where} (image {image_id}): the size of the segmentation is {segmentation['size']}")
    return image_id, float(score), segmentation


def _decode_rle(segmentation: dict[str, Any], size: tuple[int, int], what: str) -> np.ndarray:
    """(H, W) bool pixels of a segmentation. Checked, for pycocotools returns stray memory for runs that end too early."""
    check_same_size(what, segmentation["size"], size)
    counts = segmentation["counts"]
    try:
        runs = np.array(_parse_counts(counts) if isinstance(counts, str) else counts, dtype=np.int64)
    except (ValueError, TypeError, OverflowError, IndexError) as error:
        raise ValueError(f"{what}: cannot read its runs, {str(counts)[:50]!r}: {error}") from error
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError(f"{what}: its runs, of {runs.sum()} pixels, are not those of {size[0]} x {size[1]} pixels")
    values = np.arange(len(runs)) % 2 == 1  # the first run is background
    return np.repeat(values, runs).reshape(size[1], size[0]).T


def _parse_counts(text: str) -> list[int]:
    """Runs in COCO's text: digits of 5 bits, the lowest first, each with a flag (32) that another follows, plus 48.

    From the fourth on, a run is stored as its difference from the one before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for byte in text.encode("ascii"):
        digit = byte - 48
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            value -= (1 << shift) if digit & 16 else 0  # the sign bit
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def _id_of_file(file_name: str) -> int | str:
    stem = Path(file_name).stem
    number = re.search(r"\d+$", stem)
    return int(number[0]) if number else stem


def _check_num_proposals(num_proposals: int) -> None:
    if not 1 <= num_proposals <= MAX_OVERLAPPING:
        raise ValueError(f"The number of proposals is {num_proposals}; it must be from 1 to {MAX_OVERLAPPING}")


def _join(files: Sequence[str]) -> str:
    return ", ".join(files)


def _examples(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values[:_NUM_EXAMPLES])) + (", ..." if len(values) > _NUM_EXAMPLES else "")
