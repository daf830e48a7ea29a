"""The losses by name."""

from typing import TYPE_CHECKING, Any

from fvcore.common.registry import Registry
from torch import nn

from .contract import as_classification_loss, config_keys

if TYPE_CHECKING:
    from detectron2.config import CfgNode

IMPL_KEY = "MODEL.FOCAL_DET.IMPL"

LOSS_REGISTRY: Registry = Registry("LOSS")
LOSS_REGISTRY.__doc__ = """
Classification losses, by class name. A loss of your own is one decorated class; its constructor
arguments become config keys (see :class:`focal_det.losses.ClassificationLoss`).
"""


def build_loss(cfg: "CfgNode") -> nn.Module:
    """Build the loss that ``MODEL.FOCAL_DET.LOSS.NAME`` names.

    Args:
        cfg: a config with the keys of :func:`focal_det.add_config`.

    Returns:
        The loss, an ``nn.Module``.

    Raises:
        ValueError: an unknown name (the valid ones are listed), or a value out of range (its
            config key is named).
        RuntimeError: ``MODEL.FOCAL_DET.IMPL`` asks for what cannot be had on this machine.
    """
    loss_class = find_registered(LOSS_REGISTRY, cfg, "MODEL.FOCAL_DET.LOSS.NAME")
    keys = config_keys(loss_class)
    # An argument without a key (a loss registered after add_config) keeps its default.
    absent = object()
    values = {argument: get_key(cfg, key, absent) for argument, key in keys.items()}
    try:
        loss: nn.Module = loss_class(
            **{argument: value for argument, value in values.items() if value is not absent}
        )
    except ValueError as error:
        raise ValueError(
            f"{error}. {loss_class.__name__} is configured by {', '.join(keys.values())}"
        ) from error
    try:
        as_classification_loss(loss).use(get_key(cfg, IMPL_KEY, "auto"))
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"{IMPL_KEY}: {error}") from error
    return loss


def find_registered(registry: Registry, cfg: "CfgNode", key: str) -> Any:
    """What a registry holds under the name that a config key gives.

    Args:
        registry: names to classes.
        cfg: any config.
        key: full key whose value is the name.

    Raises:
        ValueError: an unknown name; the key, the name and the valid ones are listed.
    """
    name = get_key(cfg, key)
    if name not in registry:
        valid = ", ".join(sorted(known for known, _ in registry))
        raise ValueError(f"{key} is {name!r}, which is not one of: {valid}")
    return registry.get(name)


def get_key(cfg: "CfgNode", key: str, absent: Any = None) -> Any:
    """The value of a full key such as ``MODEL.FOCAL_DET.LOSS.NAME``.

    Args:
        cfg: any config.
        key: names joined by dots.
        absent: what to return where there is no such key.
    """
    node: Any = cfg
    for part in key.split("."):
        if part not in node:
            return absent
        node = node[part]
    return node
