"""Semantic segmentation of whole images, or of overlapping windows of them.

    H, W  size of an image as the network gets it, pixels; K classes

The scores (logits) that a pixel has in the windows that show it are averaged, as MMSegmentation does: the softmax comes
after, or, for the arg-max, not at all. An image that is smaller than the window in one direction has windows of its own
size there.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, SemanticSegmentor
from detectron2.modeling.postprocessing import sem_seg_postprocess
from torch import Tensor


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """First pixels of windows that cover `size` pixels; the last one is moved back to end with the image."""
    if size <= window:
        return [0]
    return [*range(0, size - window, stride), size - window]


@META_ARCH_REGISTRY.register()
class SlidingWindowSegmentor(SemanticSegmentor):
    """Detectron2's `SemanticSegmentor`, which in tests may look at an image through windows."""

    @configurable
    def __init__(self, *, window: int = 0, stride: int = 0, **kwargs: Any) -> None:
        """
        Args:
            window: side of the windows, pixels; 0: the whole image.
            stride: from one window to the next, pixels.
            **kwargs: arguments of `SemanticSegmentor`.
        """
        super().__init__(**kwargs)
        self.window = window
        self.stride = stride

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read TEST.SEM_SEG, and whatever `SemanticSegmentor` reads.

        Raises:
            ValueError: for a STRIDE that would leave pixels out.
        """
        window, stride = cfg.TEST.SEM_SEG.WINDOW, cfg.TEST.SEM_SEG.STRIDE
        if window < 0 or (window > 0 and not 0 < stride <= window):
            raise ValueError(
                f"TEST.SEM_SEG.WINDOW is {window} and STRIDE {stride}; WINDOW must be 0 (whole images) or positive, and "
                "STRIDE from 1 to WINDOW"
            )
        return {**super().from_config(cfg), "window": window, "stride": stride}

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """As `SemanticSegmentor`: losses in training, else "sem_seg" (K, height, width) scores of each image."""
        if self.training or self.window == 0:
            return super().forward(batched_inputs)
        results = []
        for x in batched_inputs:
            size = x["image"].shape[-2:]
            height, width = x.get("height", size[0]), x.get("width", size[1])
            results.append({"sem_seg": sem_seg_postprocess(self._slide(x["image"]), size, height, width)})
        return results

    def _slide(self, image: Tensor) -> Tensor:
        """Mean scores (K, H, W) of a (3, H, W) image over all windows."""
        height, width = image.shape[-2:]
        total: Tensor | None = None
        count = torch.zeros(height, width, device=self.device)
        for top in window_starts(height, self.window, self.stride):
            for left in window_starts(width, self.window, self.stride):
                rows, columns = slice(top, top + self.window), slice(left, left + self.window)
                scores = super().forward([{"image": image[:, rows, columns]}])[0]["sem_seg"]
                if total is None:
                    total = scores.new_zeros(len(scores), height, width)
                total[:, rows, columns] += scores
                count[rows, columns] += 1
        assert total is not None
        return total / count
