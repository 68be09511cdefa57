"""ResNets of Detectron2's own blocks, with depths, widths, padding and dilations that Detectron2's builder does not offer.

    k, s, d   kernel size, stride and dilation of a convolution; n: size of its input, in cells
    depth     18, 34, 50, 101, 152 as in Detectron2; 200: (3, 24, 36, 3) bottleneck blocks
    width     MODEL.RESNETS.WIDTH_MULTIPLIER multiplies the channels of the stem and of all blocks, inside and outside
    padding   MODEL.RESNETS.PADDING "same": as TensorFlow and haiku pad, for checkpoints that were trained there
    dilation  MODEL.RESNETS.(RES4_DILATION, RES5_DILATION): (1, 1) stride 32, (1, 2) stride 16, (2, 4) stride 8
    output    MODEL.RESNETS.OUT_FEATURES ["res3.2"]: one block of a stage, from 0; what comes after it is not built

Source of depth 200 and of the 2x width: DetCon, section 4.1 and supplement, after BYOL (Grill et al., NeurIPS 2020).
Parameters without the classifier: ResNet-50 23.5M and 93.9M (2x), ResNet-200 62.6M and 250.1M (2x; "250M" in DetCon).

Parameters have Detectron2's names. With depth 50, width 1 and symmetric padding they have its values, too, and so have
the features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from ..weight_names import NUM_BLOCKS


def pad_same(
    x: Tensor,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...] = (1, 1),
    *,
    value: float = 0.0,
) -> Tensor:
    """Pad the input of a convolution or pooling as TensorFlow's 'SAME' does, so that it gives ceil(n / s) cells.

    In all max((ceil(n / s) - 1) s + d (k - 1) + 1 - n, 0) cells are added, the smaller half before the first cell:
    where n is even and s is 2, one cell less on the left than with symmetric padding.

    Args:
        x: (N, C, h, w).
        kernel_size, stride, dilation: along h and w.
        value: of the new cells.
    """
    padding: list[int] = []
    for n, k, s, d in zip(x.shape[-2:], kernel_size, stride, dilation, strict=True):
        total = max((math.ceil(n / s) - 1) * s + d * (k - 1) + 1 - n, 0)
        padding = [total // 2, total - total // 2, *padding]  # F.pad begins with the last dimension
    return F.pad(x, padding, value=value)


class SamePaddedConv2d(Conv2d):
    """Detectron2's convolution with 'SAME' padding, made of an ordinary one: it takes over weight and norm."""

    def __init__(self, conv: Conv2d) -> None:
        """
        Args:
            conv: without bias. Its padding is forgotten.
        """
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=False,
            norm=conv.norm,
            device="meta",  # neither memory nor random numbers for a weight that is replaced
        )
        self.weight = conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad_same(x, self.kernel_size, self.stride, self.dilation))


class SamePaddedStem(BasicStem):
    """Detectron2's stem with 'SAME' padding of its convolution and, with -inf, of its pooling."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64, norm: str = "BN") -> None:
        super().__init__(in_channels, out_channels, norm)
        use_same_padding(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.conv1(x))
        return F.max_pool2d(pad_same(x, (3, 3), (2, 2), value=-math.inf), kernel_size=3, stride=2)


class DilatedBasicBlock(BasicBlock):
    """Detectron2's block of ResNet-18 and 34, with dilated convolutions; the parameters are the same."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, norm: str = "BN", dilation: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, stride=stride, norm=norm)
        for conv in (self.conv1, self.conv2):
            conv.dilation = conv.padding = (dilation, dilation)


class BlockResNet(ResNet):
    """A ResNet that ends with some block of a stage, such as "res3.2", and has it as its only output."""

    def __init__(self, stem: nn.Module, stages: list[list[CNNBlockBase]], *, out_block: str, freeze_at: int) -> None:
        """
        Args:
            stem, freeze_at: as in `ResNet`.
            stages: blocks of each stage, up to the block `out_block`.
            out_block: name of the output.
        """
        super().__init__(stem, stages, freeze_at=freeze_at, out_features=[f"res{len(stages) + 1}"])
        self.out_block = out_block

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        (features,) = super().forward(x).values()
        return {self.out_block: features}

    def output_shape(self) -> dict[str, ShapeSpec]:
        (shape,) = super().output_shape().values()
        return {self.out_block: shape}


def use_same_padding(block: CNNBlockBase) -> None:
    """Give the strided convolutions of a stem or block 'SAME' padding (in place).

    The others, of stride 1 or kernel size 1, are padded alike in both conventions.
    """
    for name, layer in list(block.named_children()):
        if isinstance(layer, Conv2d) and max(layer.stride) > 1 and max(layer.kernel_size) > 1:
            setattr(block, name, SamePaddedConv2d(layer))


@BACKBONE_REGISTRY.register()
def build_objssl_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's `build_resnet_backbone` with more of MODEL.RESNETS: see the module.

    Raises:
        ValueError: naming the key of MODEL.RESNETS that is wrong.
    """
    _check_config(cfg)
    resnets = cfg.MODEL.RESNETS
    is_same = resnets.PADDING == "same"
    channels = resnets.STEM_OUT_CHANNELS * resnets.WIDTH_MULTIPLIER
    stem = (SamePaddedStem if is_same else BasicStem)(input_shape.channels, channels, resnets.NORM)
    stages = []
    for index in range(4):
        blocks = _make_stage(cfg, index, channels)
        channels = blocks[-1].out_channels
        if is_same:
            use_same_padding(blocks[0])
        stages.append(blocks)
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if not any("." in name for name in resnets.OUT_FEATURES):
        return ResNet(stem, stages, out_features=resnets.OUT_FEATURES, freeze_at=freeze_at)
    index, block = _parse_out_block(resnets.OUT_FEATURES, resnets.DEPTH)
    stages = [*stages[:index], stages[index][: block + 1]]
    return BlockResNet(stem, stages, out_block=resnets.OUT_FEATURES[0], freeze_at=freeze_at)


@BACKBONE_REGISTRY.register()
def build_objssl_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A feature pyramid, as Detectron2's `build_resnet_fpn_backbone`, on `build_objssl_resnet_backbone`."""
    return FPN(
        bottom_up=build_objssl_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def features_at(backbone: ResNet, images: Tensor, name: str) -> Tensor:
    """Run a ResNet (of this module or Detectron2's) up to one of its blocks and no further.

    Args:
        images: (N, 3, H, W) float, normalised.
        name: "res3.2": stage and block, from 0; "res3": the whole stage.

    Returns:
        (N, C, h, w), the output of that block.

    Raises:
        ValueError: if there is no such block.
    """
    stages = dict(zip(backbone.stage_names, backbone.stages, strict=True))
    blocks = {f"{stage}.{i}": block for stage, modules in stages.items() for i, block in enumerate(modules)}
    last = f"{name}.{len(stages[name]) - 1}" if name in stages else name
    if last not in blocks:
        known = ", ".join(f"{stage}, {stage}.0 to {stage}.{len(modules) - 1}" for stage, modules in stages.items())
        raise ValueError(f'MODEL.SSL.CYBORGS.BOOTSTRAP_FEATURE is "{name}"; this backbone has {known}')
    x = backbone.stem(images)
    for key, block in blocks.items():
        x = block(x)
        if key == last:
            break
    return x


def _parse_out_block(out_features: Sequence[str], depth: int) -> tuple[int, int]:
    """Index of the stage (0 is res2) and of the block of OUT_FEATURES ["res3.2"]."""
    blocks = {f"res{i + 2}.{j}": (i, j) for i, n in enumerate(NUM_BLOCKS[depth]) for j in range(n)}
    if len(out_features) != 1 or out_features[0] not in blocks:
        raise ValueError(
            f"MODEL.RESNETS.OUT_FEATURES is {list(out_features)}; it must be names of stages, or one block of "
            f"ResNet-{depth}: {', '.join(blocks)}"
        )
    return blocks[out_features[0]]


def _make_stage(cfg: CfgNode, index: int, in_channels: int) -> list[CNNBlockBase]:
    """The blocks of res2 (index 0) to res5 (index 3)."""
    resnets = cfg.MODEL.RESNETS
    num_blocks = NUM_BLOCKS[resnets.DEPTH][index]
    width = resnets.WIDTH_MULTIPLIER * 2**index
    # A dilated stage keeps the resolution of the one before.
    dilation = (1, 1, resnets.RES4_DILATION, resnets.RES5_DILATION)[index]
    first_stride = 1 if index == 0 or dilation > 1 else 2
    bottleneck: dict[str, Any] = {
        "bottleneck_channels": resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP * width,
        "num_groups": resnets.NUM_GROUPS,
        "stride_in_1x1": resnets.STRIDE_IN_1X1,
    }
    return ResNet.make_stage(
        BottleneckBlock if resnets.DEPTH >= 50 else DilatedBasicBlock,
        num_blocks,
        in_channels=in_channels,
        out_channels=resnets.RES2_OUT_CHANNELS * width,
        stride_per_block=[first_stride] + [1] * (num_blocks - 1),
        norm=resnets.NORM,
        dilation=dilation,
        **(bottleneck if resnets.DEPTH >= 50 else {}),
    )


def _check_config(cfg: CfgNode) -> None:
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH not in NUM_BLOCKS:
        raise ValueError(f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}; it must be one of {sorted(NUM_BLOCKS)}")
    if resnets.PADDING not in ("symmetric", "same"):
        raise ValueError(f'MODEL.RESNETS.PADDING is "{resnets.PADDING}"; it must be "symmetric" or "same"')
    if resnets.WIDTH_MULTIPLIER < 1:
        raise ValueError(f"MODEL.RESNETS.WIDTH_MULTIPLIER is {resnets.WIDTH_MULTIPLIER}; it must be at least 1")
    dilations = (resnets.RES4_DILATION, resnets.RES5_DILATION)
    if dilations not in ((1, 1), (1, 2), (2, 4)):
        raise ValueError(
            f"MODEL.RESNETS.RES4_DILATION and RES5_DILATION are {dilations}; they must be (1, 1), (1, 2) or (2, 4)"
        )
    if any(resnets.DEFORM_ON_PER_STAGE):
        raise ValueError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {resnets.DEFORM_ON_PER_STAGE}; MODEL.BACKBONE.NAME "
            f"{cfg.MODEL.BACKBONE.NAME} has no deformable convolutions, build_resnet_backbone has"
        )
    if resnets.DEPTH < 50:
        for key, value in (("RES2_OUT_CHANNELS", 64), ("NUM_GROUPS", 1)):
            if resnets[key] != value:
                raise ValueError(
                    f"MODEL.RESNETS.{key} is {resnets[key]}; for ResNet-{resnets.DEPTH} it must be {value}"
                )
