"""Classification losses for dense detectors, one file a family, chosen by name."""

from .balanced_cross_entropy import BalancedCrossEntropyLoss
from .contract import ClassificationLoss, ElementwiseLoss, LossSums
from .cross_entropy import CrossEntropyLoss
from .focal import FocalLoss
from .focal_star import FocalLossStar
from .hinge import HingeLoss
from .ohem import OHEMLoss
from .registry import LOSS_REGISTRY, build_loss

__all__ = [
    "LOSS_REGISTRY",
    "BalancedCrossEntropyLoss",
    "ClassificationLoss",
    "CrossEntropyLoss",
    "ElementwiseLoss",
    "FocalLoss",
    "FocalLossStar",
    "HingeLoss",
    "LossSums",
    "OHEMLoss",
    "build_loss",
]
