"""Where the regions of an image come from: INPUT.REGIONS.SOURCE.

    H, W  size of the image as it is read, that is, after rotation by its EXIF orientation, pixels

A `RegionSource` maps an image and its dataset dict to a region map: (H, W) int32 region ids from 0 on and NO_REGION, or,
where `overlapping`, bit sets; see `structures.py`. A source that reads stored maps may return a smaller map of the whole
image. Sources compute on whole images, before any crop; `proposals.py` has the algorithms.

Labels of a data set are in the frame in which Detectron2 takes them: that of the rotated image. A map of another size
is an error, never resized. Ids of given maps ("sem_seg", "file") must be below MODEL.SSL.DETCON.MAX_REGION_IDS; of
regions that are computed or counted ("felzenszwalb", "instances") the largest are kept, see `limit_region_ids`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import Metadata

from ..proposals import boxes_to_bits, felzenszwalb_regions, grid_regions, largest_regions, selective_search_boxes
from ..structures import MAX_OVERLAPPING, NO_REGION
from .ground_truth import check_same_size, paint_objects, read_label_map, shape_of
from .region_files import RegionIndex

logger = logging.getLogger(__name__)

_MAX_INT16 = 2**15 - 1  # region maps of views travel as int16
_NUM_EXAMPLES = 5  # files that a message names


class RegionSource(ABC):
    """Gives images their region maps: `source(image, dataset_dict)`.

    Attributes:
        name: its name in INPUT.REGIONS.SOURCE.
        overlapping: whether maps are bit sets.
        ready: whether there are maps yet; while False, do not call it.
        label_keys: what it reads of a dataset dict beside "file_name", if it is there.
        required_key: what every dataset dict must have.
    """

    name: str
    overlapping: bool = False
    ready: bool = True
    label_keys: tuple[str, ...] = ()
    required_key: str = "file_name"

    @abstractmethod
    def __call__(self, image: np.ndarray, dataset_dict: dict[str, Any]) -> np.ndarray:
        """Map an image.

        Args:
            image: (H, W, 3) uint8 RGB.
            dataset_dict: its dict, as `prepare` returned it or as Detectron2's catalog has it.

        Returns:
            (H, W) int32 region ids or bit sets.
        """

    def prepare(self, dataset_dicts: Sequence[dict[str, Any]], metadata: Metadata) -> list[dict[str, Any]]:
        """Reduce the dicts of one data set to paths and the labels that the source needs; new dicts."""
        keys = ("file_name", "image_id", *self.label_keys)
        return [{k: d[k] for k in keys if k in d} for d in dataset_dicts]

    def check(self, dataset_dicts: Sequence[dict[str, Any]]) -> None:
        """Find images without a usable label before training starts.

        Raises:
            ValueError: with their number and the first of them.
        """
        unlabelled = [d["file_name"] for d in dataset_dicts if self.required_key not in d]
        _refuse(unlabelled, f'without "{self.required_key}", which INPUT.REGIONS.SOURCE "{self.name}" needs')


class GridRegions(RegionSource):
    """A grid of equal rectangles over the image."""

    name = "grid"

    def __init__(self, size: int = 5) -> None:
        """
        Args:
            size: n of the n x n rectangles.
        """
        if size < 1:
            raise ValueError(f"INPUT.REGIONS.GRID_SIZE is {size}; it must be at least 1")
        self.size = size

    def __call__(self, image: np.ndarray, dataset_dict: dict[str, Any]) -> np.ndarray:
        """See `RegionSource`."""
        return grid_regions(image.shape[0], image.shape[1], self.size)


class GlobalRegions(RegionSource):
    """One region, the image."""

    name = "global"

    def __call__(self, image: np.ndarray, dataset_dict: dict[str, Any]) -> np.ndarray:
        """See `RegionSource`."""
        return np.zeros(image.shape[:2], dtype=np.int32)


class FelzenszwalbRegions(RegionSource):
    """Segments of Felzenszwalb and Huttenlocher's algorithm."""

    name = "felzenszwalb"

    def __init__(self, settings: Sequence[tuple[float, int]] = ((1000.0, 1000),)) -> None:
        """
        Args:
            settings: (scale, min_size) pairs; of several, `numpy.random` draws one for each image.
        """
        settings = tuple(settings)
        if not settings or not all(map(_is_felzenszwalb_pair, settings)):
            raise ValueError(
                f"INPUT.REGIONS.FELZENSZWALB is {settings}; it must hold at least one pair (scale > 0, min_size >= 0), "
                "as in ((1000.0, 1000),)"
            )
        self.settings = [(float(scale), int(min_size)) for scale, min_size in settings]

    def __call__(self, image: np.ndarray, dataset_dict: dict[str, Any]) -> np.ndarray:
        """See `RegionSource`."""
        drawn = int(np.random.randint(len(self.settings))) if len(self.settings) > 1 else 0
        return felzenszwalb_regions(image, *self.settings[drawn])


def _is_felzenszwalb_pair(pair: Any) -> bool:
    try:
        scale, min_size = pair
        return scale > 0 and min_size >= 0
    except (TypeError, ValueError):
        return False


class SelectiveSearchRegions(RegionSource):
    """The best boxes of selective search, as overlapping regions."""

    name = "selective_search"
    overlapping = True

    def __init__(self, num_proposals: int = MAX_OVERLAPPING) -> None:
        """
        Args:
            num_proposals: how many boxes at most.
        """
        if not 1 <= num_proposals <= MAX_OVERLAPPING:
            raise ValueError(f"INPUT.REGIONS.NUM_PROPOSALS is {num_proposals}; it must be from 1 to {MAX_OVERLAPPING}")
        self.num_proposals = num_proposals

    def __call__(self, image: np.ndarray, dataset_dict: dict[str, Any]) -> np.ndarray:
        """See `RegionSource`."""
        boxes = selective_search_boxes(image, self.num_proposals)
        return boxes_to_bits(boxes, image.shape[0], image.shape[1])


class InstanceRegions(RegionSource):
    """The labelled objects of an image: annotation i is region i + 1, the pixels of no object are region 0.

    Where objects overlap, the one of the smaller area is on top. Crowds are regions like any other. An object without a
    segmentation is its box. An image without objects is one region.
    """

    name = "instances"
    label_keys = ("height", "width", "annotations")
    required_key = "annotations"

    def __call__(self, image: np.ndarray, dataset_dict: dict[str, Any]) -> np.ndarray:
        """See `RegionSource`."""
        height, width = image.shape[:2]
        labelled_size = (dataset_dict.get("height") or height, dataset_dict.get("width") or width)
        check_same_size(f"The annotations of {dataset_dict['file_name']}", labelled_size, (height, width))
        return paint_objects(dataset_dict["annotations"], height, width, dataset_dict["file_name"])

    def prepare(self, dataset_dicts: Sequence[dict[str, Any]], metadata: Metadata) -> list[dict[str, Any]]:
        """See `RegionSource`."""
        kept = super().prepare(dataset_dicts, metadata)
        for d in kept:
            if "annotations" in d:
                d["annotations"] = [shape_of(a) for a in d["annotations"]]
        return kept

    def check(self, dataset_dicts: Sequence[dict[str, Any]]) -> None:
        """See `RegionSource`."""
        super().check(dataset_dicts)
        shapes = [(d["file_name"], shape_of(a)) for d in dataset_dicts for a in d["annotations"]]
        _refuse([f for f, s in shapes if not s], 'with an annotation that has neither "segmentation" nor "bbox"')
        num_boxes = sum("bbox" in s for _, s in shapes)
        if num_boxes:
            logger.warning("%d of %d objects have no segmentation: their boxes are regions.", num_boxes, len(shapes))


class SemSegRegions(RegionSource):
    """The semantic label map of an image: its values are the ids; the ignored value is no region."""

    name = "sem_seg"
    label_keys = ("sem_seg_file_name",)
    required_key = "sem_seg_file_name"

    def __init__(self, max_region_ids: int = 256, ignore_label: int | None = None) -> None:
        """
        Args:
            max_region_ids: labels must be below this.
            ignore_label: of label maps whose dataset dict has no "ignore_label"; None: nothing is ignored.
        """
        self.max_region_ids = max_region_ids
        self.ignore_label = ignore_label

    def __call__(self, image: np.ndarray, dataset_dict: dict[str, Any]) -> np.ndarray:
        """See `RegionSource`."""
        file = dataset_dict["sem_seg_file_name"]
        region_map = read_label_map(file)
        check_same_size(f"The label map {file} of {dataset_dict['file_name']}", region_map.shape, image.shape[:2])
        ignore_label = dataset_dict.get("ignore_label", self.ignore_label)
        if ignore_label is not None:
            region_map[region_map == ignore_label] = NO_REGION
        if region_map.max() >= self.max_region_ids:
            raise ValueError(
                f"{file} holds the label {region_map.max()}, but MODEL.SSL.DETCON.MAX_REGION_IDS is "
                f"{self.max_region_ids}, and the data set ignores {ignore_label}"
            )
        return region_map

    def prepare(self, dataset_dicts: Sequence[dict[str, Any]], metadata: Metadata) -> list[dict[str, Any]]:
        """See `RegionSource`; adds the "ignore_label" of the data set."""
        ignore_label = metadata.get("ignore_label", self.ignore_label)
        return [{**d, "ignore_label": ignore_label} for d in super().prepare(dataset_dicts, metadata)]


class FileRegions(RegionSource):
    """Maps in a folder that tools/generate_masks.py or bootstrapping filled, or will fill."""

    name = "file"
    required_key = "region_key"

    def __init__(self, root: str | None, max_region_ids: int = 256) -> None:
        """
        Args:
            root: the folder; None: there is none yet.
            max_region_ids: ids must be below this.

        Raises:
            ValueError: if the folder does not hold complete region maps.
        """
        self.max_region_ids = max_region_ids
        self.set_root(root)

    def set_root(self, root: str | None) -> None:
        """Read from another folder, or from none (`ready` is False then); call `check` next."""
        self.index = None if root is None else RegionIndex.load(root)
        self.root = root
        self.ready = root is not None
        self.overlapping = self.index is not None and self.index.overlapping

    def __call__(self, image: np.ndarray, dataset_dict: dict[str, Any]) -> np.ndarray:
        """See `RegionSource`; reads the "region_key" that `assign_region_keys` gave. Maps may be smaller than images."""
        assert self.index is not None, "no region maps yet"
        return self.index.read(dataset_dict["region_key"], *image.shape[:2])

    def check(self, dataset_dicts: Sequence[dict[str, Any]]) -> None:
        """See `RegionSource`."""
        super().check(dataset_dicts)
        if self.index is not None:
            self.index.check(dataset_dicts, self.max_region_ids)


def limit_region_ids(region_map: np.ndarray, max_region_ids: int) -> tuple[np.ndarray, int]:
    """Make the ids of a label map fit: where one is too large, keep the largest regions, renumbered.

    Args:
        region_map: (h, w) int32 region ids and NO_REGION.
        max_region_ids: ids of the result are below this.

    Returns:
        region_map: (h, w) int32; the input where its ids fit.
        num_dropped: how many regions became NO_REGION.
    """
    if region_map.max(initial=NO_REGION) < max_region_ids:
        return region_map, 0
    return largest_regions(region_map, max_region_ids)


def build_region_source(cfg: CfgNode) -> RegionSource | None:
    """Build the source of INPUT.REGIONS; None for "none".

    Raises:
        ValueError: for an unknown source or a setting out of range.
    """
    regions, max_region_ids = cfg.INPUT.REGIONS, cfg.MODEL.SSL.DETCON.MAX_REGION_IDS
    if not 1 <= max_region_ids <= _MAX_INT16:
        raise ValueError(f"MODEL.SSL.DETCON.MAX_REGION_IDS is {max_region_ids}; it must be from 1 to {_MAX_INT16}")
    if regions.SOURCE == "grid" and regions.GRID_SIZE**2 > max_region_ids:
        raise ValueError(
            f"INPUT.REGIONS.GRID_SIZE is {regions.GRID_SIZE}: these are {regions.GRID_SIZE**2} regions, more than "
            f"MODEL.SSL.DETCON.MAX_REGION_IDS {max_region_ids}"
        )
    if regions.SOURCE == "file" and not regions.ROOT:
        raise ValueError('INPUT.REGIONS.ROOT is empty, but INPUT.REGIONS.SOURCE is "file": name the folder of the maps')
    builders = {
        "none": lambda: None,
        "grid": lambda: GridRegions(regions.GRID_SIZE),
        "global": GlobalRegions,
        "felzenszwalb": lambda: FelzenszwalbRegions(regions.FELZENSZWALB),
        "selective_search": lambda: SelectiveSearchRegions(regions.NUM_PROPOSALS),
        "instances": InstanceRegions,
        "sem_seg": lambda: SemSegRegions(max_region_ids),
        "file": lambda: FileRegions(regions.ROOT, max_region_ids),
        "bootstrap": lambda: FileRegions(None, max_region_ids),
    }
    if regions.SOURCE not in builders:
        raise ValueError(f'INPUT.REGIONS.SOURCE is "{regions.SOURCE}"; it must be one of {list(builders)}')
    return builders[regions.SOURCE]()


def _refuse(files: list[str], reason: str) -> None:
    """Raise a ValueError if there are such images."""
    if files := list(dict.fromkeys(files)):
        raise ValueError(f"The data set has {len(files)} image(s) {reason}; the first: {files[:_NUM_EXAMPLES]}")
