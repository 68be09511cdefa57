"""A stand-in for a pretrained model whose prototypes are colours, images for it, and a checkpoint of a real, tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from tiny_runs import pretrain_cfg
from torch import nn

from d2_objssl.checkpoint import checkpoint_metadata, write_checkpoint
from d2_objssl.evaluation.prototype_model import load_prototype_model
from d2_objssl.structures import RegionEmbeddings

COLORS = np.array([(230, 20, 20), (20, 200, 20), (30, 30, 240), (240, 240, 240)], dtype=np.uint8)


class ColorModel(nn.Module):
    """Stands for a pretrained model: features are the mean colours of 4 x 4 pixels, prototypes colours."""

    def __init__(self, colors: np.ndarray) -> None:
        super().__init__()
        self.prototypes = torch.from_numpy(colors).float() - 128
        self.device = torch.device("cpu")
        self.eval()

    def embed_images(self, images: torch.Tensor) -> RegionEmbeddings:
        features = F.avg_pool2d(images.float(), 4) - 128
        scores = torch.einsum("nchw,kc->nkhw", F.normalize(features, dim=1), F.normalize(self.prototypes, dim=1))
        winners = F.one_hot(scores.argmax(dim=1), len(self.prototypes)).amax(dim=(1, 2)).bool()
        slots = scores.new_zeros(len(images), len(self.prototypes), 3)
        return RegionEmbeddings(slots, winners.long(), winners, scores=scores, features=features)


def write_color_images(
    folder: Path, num_images: int = 5, num_classes: int = 3, size: tuple[int, int] = (48, 72)
) -> list[dict[str, Any]]:
    """Labelled images of two coloured halves, of one class each, with bars of class 3 that a centre crop cuts off."""
    rng = np.random.default_rng(0)
    dicts = []
    for i in range(num_images):
        halves = rng.choice(num_classes, (2, 1) if i % 2 else (1, 2), replace=False)
        classes = np.kron(halves, np.ones([n // m for n, m in zip(size, halves.shape, strict=True)], np.int64))
        classes[:, :8] = classes[:, -8:] = 3
        files = {"file_name": str(folder / f"{i}.png"), "sem_seg_file_name": str(folder / f"{i}_labels.png")}
        cv2.imwrite(files["file_name"], COLORS[classes][..., ::-1])
        cv2.imwrite(files["sem_seg_file_name"], classes.astype(np.uint8))
        dicts.append({**files, "image_id": i, "height": size[0], "width": size[1]})
    return dicts


def write_slotcon(path: Path, *, num_prototypes: int) -> str:
    """Write a checkpoint as pretraining by SlotCon does, of a narrow network with random weights."""
    cfg = pretrain_cfg(path.parent, path.parent, "MODEL.SSL.SLOTCON.NUM_PROTOTYPES", num_prototypes)
    write_checkpoint({"model": load_prototype_model(cfg).state_dict(), "d2_objssl": checkpoint_metadata(cfg)}, path)
    return str(path)
