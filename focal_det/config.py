"""Config keys of focal_det and the checks of a config before any data is read."""

import inspect
import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.config.defaults import _C as DETECTRON2_DEFAULTS

from .data import dataset_classes
from .losses import LOSS_REGISTRY, ClassificationLoss
from .plugins import load_plugins

# Below Detectron2's logger, whose handlers every Detectron2 script sets up.
logger = logging.getLogger(f"detectron2.{__name__}")

RECIPE_BATCH, RECIPE_LR = 16, 0.01  # arXiv 1708.02002, section 4.1
LR_TOLERANCE = 2.0


def add_config(cfg: CfgNode) -> None:
    """See :func:`focal_det.add_config`."""
    load_plugins()
    for key, default in default_keys().items():
        node = cfg
        *path, leaf = key.split(".")
        for part in path:
            if part not in node:
                node[part] = CfgNode()
            node = node[part]
        if leaf not in node:
            node[leaf] = default


def default_keys() -> dict[str, Any]:
    """All keys that focal_det adds, with their defaults.

    A loss's defaults are those of its constructor; keys that Detectron2 owns are left to it.

    Raises:
        TypeError: a constructor argument of a registered loss that no config key can hold.
    """
    keys: dict[str, Any] = {
        # A name in focal_det.modeling.DENSE_HEAD_REGISTRY.
        "MODEL.FOCAL_DET.HEAD.NAME": "FocalRetinaNetHead",
        # A name in focal_det.losses.LOSS_REGISTRY. FocalLoss reads its alpha and gamma from
        # MODEL.RETINANET.FOCAL_LOSS_ALPHA and FOCAL_LOSS_GAMMA.
        "MODEL.FOCAL_DET.LOSS.NAME": "FocalLoss",
        # What the losses are divided by: "ema" (Detectron2's moving average), "batch" or "image"
        # (the paper's).
        "MODEL.FOCAL_DET.NORMALIZER.NAME": "ema",
        # Count foreground anchors over all workers instead of in each alone.
        "MODEL.FOCAL_DET.NORMALIZER.SYNC": True,
    }
    for name, loss in LOSS_REGISTRY:
        parameters = inspect.signature(loss).parameters
        for argument, key in loss.config_keys().items():
            if not key.startswith("MODEL.FOCAL_DET."):
                continue
            default = parameters[argument].default
            if not isinstance(default, (int, float, str, bool, tuple, list, type(None))):
                raise TypeError(
                    f"argument {argument!r} of {name} needs a default that a config can hold "
                    "(number, string, bool, tuple, list or None), got "
                    + ("none" if default is inspect.Parameter.empty else repr(default))
                )
            keys[key] = default
    return keys


def detectron2_default(key: str) -> Any:
    """Detectron2's own default of a full key, None where it has no such key."""
    return _get(DETECTRON2_DEFAULTS, key)


def describe(cfg: CfgNode, cls_loss: ClassificationLoss, num_anchors: int) -> str:
    """One line with what the config resolves to: loss, normalizer, prior, K and A."""
    retinanet, normalizer = cfg.MODEL.RETINANET, cfg.MODEL.FOCAL_DET.NORMALIZER
    arguments = cls_loss.extra_repr()
    return (
        f"{type(cls_loss).__name__}({arguments}), normalizer {normalizer.NAME}, "
        f"prior {retinanet.PRIOR_PROB:g}, K={retinanet.NUM_CLASSES}, A={num_anchors}"
    )


def check_config(cfg: CfgNode) -> None:
    """Check what can be checked before data is read; warn of keys that have no effect.

    Args:
        cfg: the config that a model is about to be built from.

    Raises:
        ValueError: the keys of focal_det are missing, or ``MODEL.RETINANET.NUM_CLASSES`` is not
            the number of classes of a data set. Key, value and what is allowed are named.
    """
    if "FOCAL_DET" not in cfg.MODEL:
        raise ValueError(
            "the config has no MODEL.FOCAL_DET: call focal_det.add_config(cfg) before merging "
            "files and options, or set DETECTRON2_ENV_MODULE=focal_det.env"
        )
    _check_num_classes(cfg)
    for warning in [*_ignored_keys(cfg), *_learning_rate(cfg)]:
        logger.warning(warning)


def _check_num_classes(cfg: CfgNode) -> None:
    num_classes = cfg.MODEL.RETINANET.NUM_CLASSES
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            classes = dataset_classes(name)
            if classes is not None and len(classes) != num_classes:
                shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
                raise ValueError(
                    f"MODEL.RETINANET.NUM_CLASSES is {num_classes}, but {name!r} "
                    f"(DATASETS.{key}) has {len(classes)} classes ({shown}). Add "
                    f"MODEL.RETINANET.NUM_CLASSES {len(classes)}; background is not counted"
                )


def _ignored_keys(cfg: CfgNode) -> list[str]:
    """Warnings for keys that are set to something else than their default and that nobody reads."""
    chosen = cfg.MODEL.FOCAL_DET.LOSS.NAME
    if chosen not in LOSS_REGISTRY:
        return []  # build_loss has the better message
    read = set(LOSS_REGISTRY.get(chosen).config_keys().values())
    defaults = default_keys()
    warnings = []
    for name, loss in LOSS_REGISTRY:
        for key in loss.config_keys().values():
            default = defaults.get(key, detectron2_default(key))
            value = _get(cfg, key, default)
            if key not in read and value != default:
                warnings.append(
                    f"{key} is set to {value!r} but has no effect: it belongs to {name}, and "
                    f"MODEL.FOCAL_DET.LOSS.NAME is {chosen!r}"
                )
    roi_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if roi_classes not in (
        DETECTRON2_DEFAULTS.MODEL.ROI_HEADS.NUM_CLASSES,
        cfg.MODEL.RETINANET.NUM_CLASSES,
    ):
        warnings.append(
            f"MODEL.ROI_HEADS.NUM_CLASSES is set to {roi_classes} but has no effect: dense "
            "detectors read MODEL.RETINANET.NUM_CLASSES, which is "
            f"{cfg.MODEL.RETINANET.NUM_CLASSES}"
        )
    return warnings


def _learning_rate(cfg: CfgNode) -> list[str]:
    """A warning where the rate is far from the recipe that pretrained weights are tuned by."""
    if not cfg.MODEL.WEIGHTS:
        return []
    batch, rate = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR
    expected = RECIPE_LR * batch / RECIPE_BATCH
    if expected / LR_TOLERANCE <= rate <= expected * LR_TOLERANCE:
        return []
    return [
        f"SOLVER.BASE_LR is {rate:g} for SOLVER.IMS_PER_BATCH {batch} (the total over all GPUs); "
        f"the paper's {RECIPE_LR:g} for {RECIPE_BATCH} scales to {expected:g}"
    ]


def _get(cfg: CfgNode, key: str, absent: Any = None) -> Any:
    node: Any = cfg
    for part in key.split("."):
        if part not in node:
            return absent
        node = node[part]
    return node
