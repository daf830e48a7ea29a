"""The dense detector: meta-architecture, head and loss normalizers."""

from .backbone import build_slim_resnet_fpn_backbone
from .head import DENSE_HEAD_REGISTRY, FocalRetinaNetHead, build_dense_head
from .normalizer import (
    NORMALIZER_REGISTRY,
    BatchNormalizer,
    EMANormalizer,
    ImageNormalizer,
    LossNormalizer,
    build_normalizer,
)
from .retinanet import FocalRetinaNet

__all__ = [
    "DENSE_HEAD_REGISTRY",
    "NORMALIZER_REGISTRY",
    "BatchNormalizer",
    "EMANormalizer",
    "FocalRetinaNet",
    "FocalRetinaNetHead",
    "ImageNormalizer",
    "LossNormalizer",
    "build_dense_head",
    "build_normalizer",
    "build_slim_resnet_fpn_backbone",
]
