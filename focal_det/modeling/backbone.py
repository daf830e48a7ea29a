"""A backbone for small detectors on small machines."""

from typing import TYPE_CHECKING

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem

if TYPE_CHECKING:
    from detectron2.config import CfgNode

BLOCKS_PER_STAGE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


@BACKBONE_REGISTRY.register()
def build_slim_resnet_fpn_backbone(cfg: "CfgNode", input_shape: ShapeSpec) -> FPN:
    """ResNet-18 or -34 of any width under an FPN without levels above the last stage.

    Detectron2's builder has these two at 64 channels only, too wide for a CPU. The stages have
    ``MODEL.RESNETS.RES2_OUT_CHANNELS`` x 1, 2, 4, 8 channels.

    Args:
        cfg: reads ``MODEL.RESNETS`` (DEPTH, STEM_OUT_CHANNELS, RES2_OUT_CHANNELS, NORM,
            OUT_FEATURES), ``MODEL.BACKBONE.FREEZE_AT`` and ``MODEL.FPN``.
        input_shape: channels of the images.

    Raises:
        ValueError: another depth.
    """
    resnets, fpn = cfg.MODEL.RESNETS, cfg.MODEL.FPN
    if resnets.DEPTH not in BLOCKS_PER_STAGE:
        raise ValueError(
            "build_slim_resnet_fpn_backbone: MODEL.RESNETS.DEPTH must be one of "
            f"{', '.join(map(str, BLOCKS_PER_STAGE))}, got {resnets.DEPTH}"
        )
    channels = resnets.STEM_OUT_CHANNELS
    stem = BasicStem(in_channels=input_shape.channels, out_channels=channels, norm=resnets.NORM)
    stages = []
    for index, blocks in enumerate(BLOCKS_PER_STAGE[resnets.DEPTH]):
        width = resnets.RES2_OUT_CHANNELS * 2**index
        first_stride = 1 if index == 0 else 2
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                blocks,
                stride_per_block=[first_stride] + [1] * (blocks - 1),
                in_channels=channels,
                out_channels=width,
                norm=resnets.NORM,
            )
        )
        channels = width
    bottom_up = ResNet(
        stem, stages, out_features=resnets.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT
    )
    return FPN(
        bottom_up=bottom_up,
        in_features=fpn.IN_FEATURES,
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        fuse_type=fpn.FUSE_TYPE,
    )
