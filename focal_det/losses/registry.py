"""The losses by name."""

from typing import TYPE_CHECKING

from fvcore.common.registry import Registry

from .contract import ClassificationLoss

if TYPE_CHECKING:
    from detectron2.config import CfgNode

LOSS_REGISTRY: Registry = Registry("LOSS")
LOSS_REGISTRY.__doc__ = """
Classification losses, by class name. A loss of your own is one decorated class; its constructor
arguments become config keys (see :class:`focal_det.losses.ClassificationLoss`).
"""


def build_loss(cfg: "CfgNode") -> ClassificationLoss:
    """Build the loss that ``MODEL.FOCAL_DET.LOSS.NAME`` names.

    Args:
        cfg: a config with the keys of :func:`focal_det.add_config`.

    Returns:
        The loss, an ``nn.Module``.

    Raises:
        ValueError: an unknown name (the valid ones are listed), or a value out of range (its
            config key is named).
    """
    name = cfg.MODEL.FOCAL_DET.LOSS.NAME
    if name not in LOSS_REGISTRY:
        valid = ", ".join(sorted(key for key, _ in LOSS_REGISTRY))
        raise ValueError(f"MODEL.FOCAL_DET.LOSS.NAME is {name!r}, which is not one of: {valid}")
    loss_class = LOSS_REGISTRY.get(name)
    try:
        return loss_class(**loss_class.from_config(cfg))
    except ValueError as error:
        keys = ", ".join(loss_class.config_keys().values())
        raise ValueError(f"{error}. {name} is configured by {keys}") from error
