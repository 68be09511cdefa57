"""ObjectSSL: the one meta-architecture of pretraining; a method supplies the embedder and the criterion.

N images of a process, V views, S side of a view. Data flow: views -> regions -> student and teacher -> criterion.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from ..data.collation import SSLBatch, collate_views
from ..data.device_augmentation import finish_colors
from ..structures import RegionEmbeddings, ViewBatch
from ..visualization import draw_regions
from .activation_checkpointing import checkpoint_blocks
from .methods.registry import SSL_METHOD_REGISTRY, SSLMethod

# Metrics cost a device synchronisation, so they are logged as often as Detectron2 writes its logs.
_LOG_PERIOD = 20


class Branch(nn.Module):
    """A backbone and the embedder of a method: the student, or the teacher."""

    def __init__(self, backbone: Backbone, embedder: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.embedder = embedder

    def forward(self, view: ViewBatch, regions: Any) -> RegionEmbeddings:
        """Embed the regions of one view (its images already normalised)."""
        return self.embedder(self.backbone(view.images), view, regions)


def assign_pixels(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Assign every pixel to the region that scores highest there (SlotCon A.3, Eq. 1).

    Args:
        scores: (N, K, h, w) of the cells, resized bilinearly, one image at a time to save memory.
        size: (H, W) of the result, pixels.

    Returns:
        (N, H, W) int64 region ids.
    """
    resized = (F.interpolate(x[None].float(), size=size, mode="bilinear", align_corners=False) for x in scores)
    return torch.cat([x.argmax(dim=1) for x in resized])


@META_ARCH_REGISTRY.register()
class ObjectSSL(nn.Module):
    """Student branch + teacher branch (its moving average) + criterion.

    The teacher's parameters are moved by the hook `engine.hooks.EMATeacher`, not by this module.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        method: SSLMethod,
        use_teacher: bool,
        export_branch: str,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
        channels_last: bool = True,
        checkpoint_activations: bool = False,
        vis_period: int = 0,
    ) -> None:
        """
        Args:
            backbone: the network to pretrain.
            method: see `SSLMethod`.
            use_teacher: keep a moving average of the student that makes the targets; else the student makes them.
            export_branch: the branch used by `inference`: "student" or "teacher".
            pixel_mean, pixel_std: of RGB pixels in 0-255.
            channels_last: memory layout of images and convolutions.
            checkpoint_activations: see `activation_checkpointing.py`.
            vis_period: iterations between pictures in TensorBoard; 0: none.

        Raises:
            ValueError: if `export_branch` does not exist.
        """
        super().__init__()
        if export_branch not in ("student", "teacher") or (export_branch == "teacher" and not use_teacher):
            raise ValueError(
                f'MODEL.SSL.EXPORT_BRANCH is "{export_branch}"; it must be "student"'
                + (' or "teacher"' if use_teacher else ": MODEL.SSL.TEACHER.ENABLED is False")
            )
        self.student = Branch(backbone, method.embedder)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False) if use_teacher else None
        if checkpoint_activations:
            checkpoint_blocks(self.student.backbone)
        self.criterion = method.criterion
        self.sample = method.sample
        self.separate_teacher_regions = method.separate_teacher_regions
        self.idle_parameters = method.idle_parameters
        self.build_method_hooks = method.build_hooks
        self.draw = method.draw
        self.num_views = method.num_views
        self.export_branch = export_branch
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.vis_period = vis_period
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        for module in (self.student, self.teacher):
            if module is not None:
                module.to(memory_format=self.memory_format)  # type: ignore[call-overload]

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read every setting of the model from `cfg`."""
        if cfg.MODEL.SSL.METHOD not in SSL_METHOD_REGISTRY:
            known = sorted(name for name, _ in SSL_METHOD_REGISTRY)
            raise ValueError(f'MODEL.SSL.METHOD is "{cfg.MODEL.SSL.METHOD}"; known: {known}')
        backbone = build_backbone(cfg)
        method = SSL_METHOD_REGISTRY.get(cfg.MODEL.SSL.METHOD)(cfg, backbone.output_shape())
        if cfg.INPUT.SSL.NUM_VIEWS not in (0, method.num_views):
            raise ValueError(
                f"INPUT.SSL.NUM_VIEWS is {cfg.INPUT.SSL.NUM_VIEWS}, but {cfg.MODEL.SSL.METHOD} works on "
                f"{method.num_views} views"
            )
        return {
            "backbone": backbone,
            "method": method,
            "use_teacher": cfg.MODEL.SSL.TEACHER.ENABLED,
            "export_branch": cfg.MODEL.SSL.EXPORT_BRANCH,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "channels_last": cfg.MODEL.SSL.CHANNELS_LAST,
            "checkpoint_activations": cfg.MODEL.SSL.CHECKPOINT_ACTIVATIONS,
            "vis_period": cfg.VIS_PERIOD,
        }

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: SSLBatch | list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: a batch collated by the data loader, or a list of the mapper's dicts.

        Returns:
            In training, a dict of weighted "loss_*" scalars; else see `inference`.
        """
        if not self.training:
            assert isinstance(batched_inputs, list)
            return self.inference(batched_inputs)
        batch = batched_inputs if isinstance(batched_inputs, SSLBatch) else collate_views(batched_inputs)
        batch.views = [finish_colors(view, self.device) for view in batch.views]
        views = self.preprocess_views(batch.views)
        regions = self.sample_regions(views)
        # One call per view: batch-norm statistics are per view.
        student = [self.student(view, region) for view, region in zip(views, regions, strict=True)]
        teacher = self.teacher_forward(views, regions, student)
        losses = self.criterion(student, teacher, views)
        self._log(batch.views, teacher)
        return losses

    def preprocess_views(self, views: list[ViewBatch]) -> list[ViewBatch]:
        """Move the views to the device and normalise their images to float32."""
        processed = []
        for view in views:
            moved = view.to(self.device)
            images = moved.images.contiguous(memory_format=self.memory_format)
            moved.images = (images - self.pixel_mean) / self.pixel_std
            processed.append(moved)
        return processed

    def sample_regions(self, views: list[ViewBatch]) -> list[Any]:
        """Choose the regions of each view, where the method does so before the networks run."""
        return [None] * len(views) if self.sample is None else self.sample(views)

    @torch.no_grad()
    def teacher_forward(
        self, views: list[ViewBatch], regions: list[Any], student: list[RegionEmbeddings]
    ) -> list[RegionEmbeddings]:
        """Embeddings of the teacher without gradient; the student's own where there is no teacher."""
        if self.teacher is None:
            return student
        if self.separate_teacher_regions:
            regions = self.sample_regions(views)
        return [self.teacher(view, region) for view, region in zip(views, regions, strict=True)]

    @property
    def exported_branch(self) -> Branch:
        """The branch that `inference` uses and that is converted to a backbone."""
        branch = self.teacher if self.export_branch == "teacher" else self.student
        assert branch is not None
        return branch

    @property
    def prototypes(self) -> Tensor | None:
        """(K, D) prototypes of the exported branch, shared by all images; None where the method has none."""
        return getattr(self.exported_branch.embedder, "prototypes", None)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> RegionEmbeddings:
        """Embed whole images with the exported branch: (N, 3, H, W) RGB pixels in 0-255, on any device."""
        n, _, height, width = images.shape
        images = images.to(self.device).contiguous(memory_format=self.memory_format)
        view = ViewBatch(
            images=(images.float() - self.pixel_mean) / self.pixel_std,
            crop_boxes=torch.tensor([[0.0, 0.0, width, height]], device=self.device).repeat(n, 1),
            hflip=torch.zeros(n, dtype=torch.bool, device=self.device),
        )
        return self.exported_branch(view, self.sample_regions([view] * self.num_views)[0])

    @torch.no_grad()
    def inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Segment whole images by the method's regions, with the branch that is exported.

        Args:
            batched_inputs: dicts with "image", a (3, H, W) tensor of RGB pixels in 0-255, and optionally "height" and
                "width", the size of the result.

        Returns:
            A dict with "region_map", (height, width) int64 region ids, for each image.

        Raises:
            ValueError: if the method does not score cells by regions.
        """
        results = []
        for x in batched_inputs:
            scores = self.embed_images(x["image"][None]).scores
            if scores is None:
                raise ValueError("this method does not assign cells to regions, so it has no region map to predict")
            size = x["image"].shape[-2:]
            out_size = (x.get("height", size[0]), x.get("width", size[1]))
            results.append({"region_map": assign_pixels(scores, out_size)[0]})
        return results

    def _log(self, views: list[ViewBatch], teacher: list[RegionEmbeddings]) -> None:
        """Put the criterion's metrics, and every `vis_period` iterations pictures, into the event storage."""
        if not has_event_storage():
            return
        storage = get_event_storage()
        if (storage.iter + 1) % _LOG_PERIOD == 0:
            metrics: dict[str, Tensor] = getattr(self.criterion, "metrics", {})
            storage.put_scalars(**{k: float(v) for k, v in metrics.items()}, smoothing_hint=False)
        if self.vis_period > 0 and storage.iter % self.vis_period == 0:
            storage.put_image("views", self.draw(views))
            maps = [
                v.region_maps if t.scores is None else t.scores.argmax(dim=1)
                for v, t in zip(views, teacher, strict=True)
            ]
            known = [m for m in maps if m is not None]
            if len(known) == len(views) and not any(v.overlapping for v in views):
                storage.put_image("regions", draw_regions(views, known))
