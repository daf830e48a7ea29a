"""focal_det: dense detectors in Detectron2 whose classification loss is swapped by a config key.

>>> import focal_det
>>> from detectron2.config import get_cfg
>>> cfg = get_cfg()
>>> focal_det.add_config(cfg)
>>> cfg.MODEL.META_ARCHITECTURE = "FocalRetinaNet"
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode

__version__ = "0.1.0"
__all__ = ["__version__", "add_config"]

_import_error: Exception | None = None
try:
    # Detectron2 first: while it is imported it may run `focal_det.env` (DETECTRON2_ENV_MODULE),
    # which needs modules of ours that must not be half-imported at that moment.
    import detectron2  # noqa: F401

    from . import data, modeling  # noqa: F401  only registration

    data.register_all()
except Exception as error:
    # Kept for add_config: the losses work alone, and `python -m focal_det.doctor` must run where
    # something is missing or does not fit, to say what.
    _import_error = error


def add_config(cfg: "CfgNode") -> None:
    """Add the keys of focal_det under ``MODEL.FOCAL_DET``, with their defaults.

    Safe to call more than once: a key that is there already keeps its value. Call it again after
    registering a loss of your own to get that loss's keys.

    Args:
        cfg: a Detectron2 config that is not frozen; changed in place.

    Raises:
        ImportError: Detectron2, or something that it needs, is missing or does not fit; or an
            environment variable that focal_det reads is wrong.
        TypeError: a registered loss has a constructor argument that no config key can hold.
    """
    if _import_error is not None:
        raise ImportError(
            f"focal_det could not be set up: {_import_error} (`python -m focal_det.doctor` says "
            "what is missing or does not fit, and how to mend it)"
        ) from _import_error
    from .config import add_config as add

    add(cfg)
