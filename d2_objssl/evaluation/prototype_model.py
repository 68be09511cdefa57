"""A pretrained model whose prototypes are read as classes: loading it, and running it over images.

N, K, D, h, w  as in structures.py
S              side of an image, pixels
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..checkpoint import ObjSSLCheckpointer, checkpoint_metadata, load_checkpoint
from ..engine import resolve_norms, setup_cfg
from ..modeling import ObjectSSL
from ..structures import RegionEmbeddings

PRECISIONS = ("float32", "bfloat16")


def pretraining_cfg(weights: str, config_file: str = "", opts: Sequence[str] = ()) -> CfgNode:
    """The config of a pretrained model: the one that its checkpoint stores, unless a file is given.

    Args:
        weights: checkpoint of pretraining; "": random initialisation, which needs `config_file`.
        config_file: YAML config, or "".
        opts: KEY VALUE overrides.

    Raises:
        ValueError: if there is no config, or it is not one of a method with prototypes.
    """
    stored = ""
    if not config_file:
        if not weights:
            raise ValueError(
                "give --weights, a checkpoint of pretraining, or --config-file for a random initialisation"
            )
        stored = (load_checkpoint(weights).get("d2_objssl") or {}).get("config") or ""
        if not stored:
            raise ValueError(f"{weights} stores no config, so it is no checkpoint of pretraining: give --config-file")
    try:
        cfg = setup_cfg(config_file, [*opts, "MODEL.WEIGHTS", weights], stored=stored)
    except ValueError as error:
        advice = "" if config_file else "; if another version wrote it, give --config-file"
        raise ValueError(f"the config of {config_file or weights}: {error.args[0]}{advice}") from error
    if cfg.MODEL.META_ARCHITECTURE != "ObjectSSL":
        raise ValueError(
            f'MODEL.META_ARCHITECTURE is "{cfg.MODEL.META_ARCHITECTURE}" in {config_file or weights}; it must be '
            '"ObjectSSL", a model of pretraining'
        )
    return cfg


def load_prototype_model(cfg: CfgNode, *, seed: int = 0) -> ObjectSSL:
    """Build the model of `cfg` and fill all of it from MODEL.WEIGHTS, or at random from `seed` where that is empty.

    Raises:
        ValueError: if its method has no prototypes, or the file does not fill it.
    """
    torch.manual_seed(seed)
    model = build_model(resolve_norms(cfg))
    if model.prototypes is None:
        raise ValueError(f"{cfg.MODEL.SSL.METHOD} has no prototypes (MODEL.SSL.METHOD); SlotCon has")
    if cfg.MODEL.WEIGHTS:
        ObjSSLCheckpointer(model, metadata=checkpoint_metadata(cfg)).load(cfg.MODEL.WEIGHTS, [], require="all")
    return model.eval()


def embed_dataset(
    model: ObjectSSL,
    dataset: Dataset,
    *,
    batch_size: int,
    num_workers: int = 0,
    precision: str = "float32",
    progress: bool = False,
) -> Iterator[tuple[dict[str, Any], RegionEmbeddings]]:
    """Run the exported branch over all images, in order.

    Args:
        model: in evaluation mode.
        dataset: items are dicts with "image", (3, S, S) uint8 RGB.
        batch_size: N.
        num_workers: processes that read images; 0: this one.
        precision: "float32", or "bfloat16": autocast.
        progress: show a progress bar with the time left.

    Returns:
        Batches: the collated items, and the embeddings of their images.
    """
    assert precision in PRECISIONS and not model.training
    loader: DataLoader = DataLoader(dataset, batch_size, num_workers=num_workers)
    with tqdm(total=len(dataset), unit="image", disable=not progress) as bar:  # type: ignore[arg-type]
        for batch in loader:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                embeddings = model.embed_images(batch["image"])
            yield batch, embeddings
            bar.update(len(batch["image"]))
