"""focal_det: dense detectors in Detectron2 whose classification loss is swapped by a config key.

>>> import focal_det
>>> from detectron2.config import get_cfg
>>> cfg = get_cfg()
>>> focal_det.add_config(cfg)
>>> cfg.MODEL.META_ARCHITECTURE = "FocalRetinaNet"
"""

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode

__version__ = "0.1.0"
__all__ = ["__version__", "add_config"]

# The package stays importable without Detectron2, so that `python -m focal_det.doctor` can say
# how to get it and so that the losses can be used alone.
if importlib.util.find_spec("detectron2") is not None:
    # Detectron2 first: while it is imported it may run `focal_det.env` (DETECTRON2_ENV_MODULE),
    # which needs modules of ours that must not be half-imported at that moment.
    import detectron2  # noqa: F401

    from . import data, modeling  # noqa: F401  only registration

    data.register_all()


def add_config(cfg: "CfgNode") -> None:
    """Add the keys of focal_det under ``MODEL.FOCAL_DET``, with their defaults.

    Safe to call more than once: a key that is there already keeps its value. Call it again after
    registering a loss of your own to get that loss's keys.

    Args:
        cfg: a Detectron2 config that is not frozen; changed in place.

    Raises:
        TypeError: a registered loss has a constructor argument that no config key can hold.
    """
    from .config import add_config as add

    add(cfg)
