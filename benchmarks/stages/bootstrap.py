"""One image's share of a bootstrapping of CYBORGS' masks: features, k-means, file.

The plain way runs the whole network in float32, takes the features of the block by a hook, clusters them by FAISS and
stores the labels as the released code does: at the resolution of the image, as int64.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2_objssl.data.image_reading import read_rgb_image
from d2_objssl.data.region_files import MapSettings
from d2_objssl.data.region_writer import RegionWriter, begin_maps
from d2_objssl.engine.feature_clustering import ClusterSettings, FeatureClusterer
from d2_objssl.engine.mask_round import MaskMaker
from d2_objssl.modeling.meta_arch import ObjectSSL
from d2_objssl.proposals import spherical_kmeans

from .data import make_photographs
from .models import build_slotcon
from .timing import Measurement, Row, peak_memory, repeat_in_turns

SUMMARY = "bootstrapping CYBORGS' masks, ResNet-50"
_FEATURE, _CLUSTERS, _ITERATIONS = "res3.2", 64, 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this stage."""
    parser.add_argument(
        "--num-images", type=int, default=16, help="of one clustering (default: %(default)s; --quick: 4)"
    )


def run(args: argparse.Namespace) -> Measurement:
    """Time a clustering of images of 640x480 and count the bytes that it writes."""
    num_images = min(args.num_images, 4) if args.quick else args.num_images
    model = build_slotcon().eval()
    with tempfile.TemporaryDirectory(prefix="d2_objssl-speed-") as name:
        folder = Path(name)
        make_photographs(folder, num_images, args.seed)
        paths = sorted(folder.glob("*.jpg"))
        contestants = {
            "plain": PlainBootstrap(model, folder),
            "float32": OwnBootstrap(model, folder, None),
            "bfloat16": OwnBootstrap(model, folder, torch.bfloat16),
        }
        repeats = min(args.repeats, 2) if args.quick else args.repeats
        runs = repeat_in_turns({k: partial(_time, f, paths) for k, f in contestants.items()}, repeats, args.seed)
        kilobytes = {k: f.bytes_written / f.num_written / 1e3 for k, f in contestants.items()}
        peaks = {n: peak_of_round(model, paths, n, folder / f"round_{n}") for n in (num_images, 4 * num_images)}
    for n, megabytes in peaks.items():
        print(f"a round of masks of {n} images, {num_images} in a clustering: {megabytes:.0f} MB at the peak")
    ms = {k: statistics.median(v) for k, v in runs.items()}
    rows = [
        Row("bootstrapped mask, float32", ms["plain"], ms["float32"], unit="ms CPU an image", goal=2.0),
        Row("bootstrapped mask, bfloat16", ms["plain"], ms["bfloat16"], unit="ms CPU an image", goal=3.5),
        Row("bootstrapped mask, file", kilobytes["plain"], kilobytes["float32"], unit="kB an image", goal=100.0),
    ]
    return Measurement(rows, {"num_images": num_images, "ms_per_image": runs, "kilobytes": kilobytes, "peak_mb": peaks})


def peak_of_round(model: ObjectSSL, paths: list[Path], num_images: int, root: Path) -> float:
    """By how much a round of masks raises the memory at its peak, MB; as many images in a clustering as there are files."""
    files = itertools.islice(itertools.cycle(paths), num_images)
    dataset = [{"file_name": str(file), "region_key": f"speed/{i}"} for i, file in enumerate(files)]
    maker = MaskMaker(
        build_clusterer=partial(build_clusterer, model, torch.bfloat16),
        images_per_clustering=len(paths),
        dataset=dataset,
        dataset_names=["speed"],
        max_unreadable=0.0,
    )
    return peak_memory(partial(maker.make, 0, root, 0))


def build_clusterer(model: ObjectSSL, dtype: torch.dtype | None) -> FeatureClusterer:
    """Of the student's features."""
    return FeatureClusterer(
        model.student.backbone,
        normalize=lambda x: (x - model.pixel_mean) / model.pixel_std,
        settings=ClusterSettings(_FEATURE, _CLUSTERS, _CLUSTERS, _ITERATIONS),
        device_type="cpu",
        dtype=dtype,
    )


class PlainBootstrap:
    """See the module."""

    def __init__(self, model: ObjectSSL, folder: Path) -> None:
        self.model = model
        self.folder = folder
        self.features: Tensor | None = None
        stages = dict(zip(model.student.backbone.stage_names, model.student.backbone.stages, strict=True))
        stage, block = _FEATURE.split(".")
        stages[stage][int(block)].register_forward_hook(self._keep)
        self.bytes_written = self.num_written = 0

    def _keep(self, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.features = output

    @torch.no_grad()
    def __call__(self, images: list[np.ndarray]) -> None:
        """Cluster the images together and store their labels."""
        maps = []
        for image in images:
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
            self.model.student.backbone((pixels - self.model.pixel_mean) / self.model.pixel_std)
            assert self.features is not None
            maps.append(self.features[0].contiguous())
        cells = torch.cat([m.flatten(1).T for m in maps])
        _, labels = spherical_kmeans(cells, _CLUSTERS, _ITERATIONS, 0)
        parts = labels.split([m[0].numel() for m in maps])
        for image, part, m in zip(images, parts, maps, strict=True):
            small = part.view(1, 1, *m.shape[1:]).float()
            large = F.interpolate(small, size=image.shape[:2], mode="nearest")[0, 0].long()
            path = self.folder / "labels.npy"
            np.save(path, large.numpy())
            self.bytes_written += path.stat().st_size
            self.num_written += 1


class OwnBootstrap:
    """d2_objssl."""

    def __init__(self, model: ObjectSSL, folder: Path, dtype: torch.dtype | None) -> None:
        self.clusterer = build_clusterer(model, dtype)
        root = folder / f"maps_{dtype}"
        begin_maps(
            root, MapSettings("bootstrap", {}, overlapping=False, resolution="features", dataset_names=["speed"])
        )
        self.writer = RegionWriter(root, "0", overlapping=False)
        self.image_file = sorted(folder.glob("*.jpg"))[0]
        self.bytes_written = self.num_written = 0

    def __call__(self, images: list[np.ndarray]) -> None:
        """Cluster the images together and store their labels."""
        for image, labels in zip(images, self.clusterer.cluster(images, (0,)), strict=True):
            entry = self.writer.write(
                f"speed/{self.num_written}", labels, image_file=self.image_file, image_size=image.shape[:2]
            )
            self.bytes_written += entry.map_bytes
            self.num_written += 1


def _time(bootstrap: PlainBootstrap | OwnBootstrap, paths: list[Path]) -> float:
    """CPU time, reading included, ms per image."""
    start = time.process_time()
    bootstrap([read_rgb_image(str(path)) for path in paths])
    return 1e3 * (time.process_time() - start) / len(paths)
