"""A small detector as a LazyConfig, for tests that train one."""

from pathlib import Path

_BASE = Path(__file__).parent.parent / "configs/lazy/focal_retinanet_R_50_FPN_1x.py"

TINY_LAZY = f"""\
from detectron2.layers import ShapeSpec
{_BASE.read_text()}
model.backbone.bottom_up.stages.depth = 18
model.backbone.bottom_up.stages.norm = "BN"
del model.backbone.bottom_up.stages.stride_in_1x1
model.backbone.bottom_up.freeze_at = 0
model.backbone.top_block.in_channels = 512
model.backbone.out_channels = 32
model.head.input_shape = [L(ShapeSpec)(channels=32)] * 5
model.head.conv_dims = [32]
"""
"""The shipped config with a ResNet-18 and 32 channels; tests add what else they change."""
