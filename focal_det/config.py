"""Config keys of focal_det and the checks of a config before any data is read."""

import copy
import inspect
import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.config.defaults import _C as DETECTRON2_DEFAULTS
from detectron2.utils.logger import log_first_n
from torch import nn

from .compat import allow_ddp_on_cpu, check_before_building
from .data import dataset_classes
from .losses import LOSS_REGISTRY
from .losses.contract import config_keys
from .losses.registry import get_key
from .plugins import load_plugins
from .safe_loading import install as load_files_safely

# Below Detectron2's logger, whose handlers every Detectron2 script sets up.
logger = logging.getLogger(f"detectron2.{__name__}")

META_ARCHITECTURE = "FocalRetinaNet"
RECIPE_BATCH, RECIPE_LR = 16, 0.01  # arXiv 1708.02002, section 4.1
LR_TOLERANCE = 2.0


def add_config(cfg: CfgNode) -> None:
    """See :func:`focal_det.add_config`."""
    load_plugins()
    allow_ddp_on_cpu()
    load_files_safely()
    check_before_building(check_training)
    absent = object()
    for key, default in default_keys().items():
        if get_key(cfg, key, absent) is not absent:
            continue
        if cfg.is_frozen():
            raise ValueError(f"the config is frozen, {key} cannot be added: call add_config before")
        node = cfg
        *path, leaf = key.split(".")
        for part in path:
            node = node.setdefault(part, CfgNode())
        node[leaf] = copy.deepcopy(default)


def default_keys() -> dict[str, Any]:
    """All keys that focal_det adds, with their defaults.

    A loss's defaults are those of its constructor; keys that Detectron2 owns are left to it.

    Raises:
        TypeError: a constructor argument of a registered loss that no config key can hold.
        ValueError: two losses claim one key with different defaults.
    """
    keys: dict[str, Any] = {
        # A name in focal_det.modeling.DENSE_HEAD_REGISTRY.
        "MODEL.FOCAL_DET.HEAD.NAME": "FocalRetinaNetHead",
        # A name in focal_det.losses.LOSS_REGISTRY. FocalLoss reads its alpha and gamma from
        # MODEL.RETINANET.FOCAL_LOSS_ALPHA and FOCAL_LOSS_GAMMA.
        "MODEL.FOCAL_DET.LOSS.NAME": "FocalLoss",
        # How the classification loss is computed: "torch" (any device), "triton" (CUDA), "eager"
        # (slow, with second derivatives) or "auto", the fastest that can be had.
        "MODEL.FOCAL_DET.IMPL": "auto",
        # What the losses are divided by: "ema" (Detectron2's moving average), "batch" or "image"
        # (the paper's).
        "MODEL.FOCAL_DET.NORMALIZER.NAME": "ema",
        # Count foreground anchors over all workers instead of in each alone.
        "MODEL.FOCAL_DET.NORMALIZER.SYNC": True,
        # What becomes of a training image that cannot be used: "stop", or "skip" it and count. Read
        # by focal_det's own trainer.
        "DATALOADER.ON_BAD_IMAGE": "stop",
    }
    for name, loss in LOSS_REGISTRY:
        parameters = inspect.signature(loss).parameters
        for argument, key in config_keys(loss).items():
            if not key.startswith("MODEL.FOCAL_DET."):
                continue
            default = parameters[argument].default
            if keys.get(key, default) != default:
                raise ValueError(
                    f"{key} has two defaults, {keys[key]!r} and {default!r} (of {name}): give the "
                    "loss a config_node of its own"
                )
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
    return get_key(DETECTRON2_DEFAULTS, key)


def describe(
    cls_loss: nn.Module, normalizer: str, prior_prob: float, num_classes: int, num_anchors: int
) -> str:
    """One line with what a config resolves to: loss, normalizer, prior, K and A."""
    return (
        f"{type(cls_loss).__name__}({cls_loss.extra_repr()}), normalizer {normalizer}, "
        f"prior {prior_prob:g}, K={num_classes}, A={num_anchors}"
    )


def check_model(cfg: CfgNode) -> None:
    """Check a config that a FocalRetinaNet is about to be built from; warn of keys without effect.

    Args:
        cfg: the config.

    Raises:
        ValueError: the keys of focal_det are missing.
    """
    if "FOCAL_DET" not in cfg.MODEL:
        raise ValueError(
            "the config has no MODEL.FOCAL_DET: call focal_det.add_config(cfg) before merging "
            "files and options, or set DETECTRON2_ENV_MODULE=focal_det.env"
        )
    for warning in ignored_keys(cfg):
        # A process may build several models from one config.
        log_first_n(logging.WARNING, warning, name=logger.name, key="message")


def check_training(cfg: CfgNode, trainer: type | None = None) -> None:
    """Check a config that is about to be trained or evaluated, before any data is read.

    Args:
        cfg: the config.
        trainer: the class that is about to do so.

    Raises:
        ValueError: ``MODEL.RETINANET.NUM_CLASSES`` is not the number of classes of a data set. Key,
            value and what is allowed are named.
    """
    if cfg.MODEL.META_ARCHITECTURE != META_ARCHITECTURE:
        ours = [
            key
            for key, value in default_keys().items()
            if key.startswith("MODEL.") and get_key(cfg, key, value) != value
        ]
        if ours:
            logger.warning(
                f"{', '.join(ours)} set, but without effect: MODEL.META_ARCHITECTURE is "
                f"{cfg.MODEL.META_ARCHITECTURE!r}, not {META_ARCHITECTURE!r}"
            )
        return
    for split in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[split]:
            check_num_classes(cfg.MODEL.RETINANET.NUM_CLASSES, name, split)
    warning = unusual_learning_rate(cfg)
    if warning:
        logger.warning(warning)
    if cfg.DATALOADER.ON_BAD_IMAGE != "stop" and not getattr(trainer, "guards_images", False):
        logger.warning(
            f"DATALOADER.ON_BAD_IMAGE is {cfg.DATALOADER.ON_BAD_IMAGE!r}, but without effect: "
            "train with focal_det's tools/train_net.py or focal_det.engine.Trainer"
        )


def check_num_classes(num_classes: int, dataset: str, split: str) -> None:
    """Check the number of classes of a model against those of a data set.

    Args:
        num_classes: K, foreground classes.
        dataset: name of a registered data set.
        split: TRAIN or TEST, for the message.

    Raises:
        ValueError: they differ.
    """
    classes = dataset_classes(dataset)
    if classes is not None and len(classes) != num_classes:
        shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        raise ValueError(
            f"MODEL.RETINANET.NUM_CLASSES (in a LazyConfig: model.num_classes) is {num_classes}, "
            f"but {dataset!r} (DATASETS.{split}) has {len(classes)} classes ({shown}). It must be "
            f"{len(classes)}; background is not counted"
        )


def ignored_keys(cfg: CfgNode) -> list[str]:
    """Warnings for keys that are set to something else than their default and that nobody reads."""
    chosen = cfg.MODEL.FOCAL_DET.LOSS.NAME
    if chosen not in LOSS_REGISTRY:
        return []  # build_loss has the better message
    read = set(config_keys(LOSS_REGISTRY.get(chosen)).values())
    defaults = default_keys()
    warnings = []
    for name, loss in LOSS_REGISTRY:
        for key in config_keys(loss).values():
            default = defaults.get(key, detectron2_default(key))
            value = get_key(cfg, key, default)
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


def unusual_learning_rate(cfg: CfgNode) -> str:
    """A warning where the rate is far from the recipe that pretrained weights are tuned by."""
    if not cfg.MODEL.WEIGHTS:
        return ""
    batch, rate = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR
    expected = RECIPE_LR * batch / RECIPE_BATCH
    if expected / LR_TOLERANCE <= rate <= expected * LR_TOLERANCE:
        return ""
    return (
        f"SOLVER.BASE_LR is {rate:g} for SOLVER.IMS_PER_BATCH {batch} (the total over all GPUs); "
        f"the paper's {RECIPE_LR:g} for {RECIPE_BATCH} scales to {expected:g}"
    )
