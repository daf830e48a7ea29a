"""A row of a table, a data set, a budget and a seed as one complete config."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from focal_det.config import add_config, check_training
from focal_det.data import dataset_classes

from .rivals import META_ARCHITECTURES
from .tables import Row, Table, check_override

ARCHITECTURE = "MODEL.META_ARCHITECTURE"
ALIKE = tuple(META_ARCHITECTURES[name] for name in ("focal_det", "retinanet"))
"""Whose configs mean the same for a FocalRetinaNet."""


@dataclass(frozen=True)
class Trial:
    """One training run of a sweep.

    Attributes:
        table: name of its table.
        label: of its row.
        overrides: of its row.
        seed: of weights and data order.
        iterations: of the training.
        config: the whole config as YAML; ``OUTPUT_DIR`` is empty.
        processes: that share each batch, a GPU each; statistics of batch norm are of one alone.
    """

    table: str
    label: str
    overrides: dict[str, Any]
    seed: int
    iterations: int
    config: str
    processes: int = 1

    @property
    def key(self) -> str:
        """Hash of config and processes, 12 hexadecimal digits: the same run has the same key."""
        run = self.config if self.processes == 1 else f"{self.config}# {self.processes} processes"
        return hashlib.sha256(run.encode()).hexdigest()[:12]

    def load_config(self, output_dir: str) -> CfgNode:
        """The frozen config.

        Args:
            output_dir: its ``OUTPUT_DIR``.
        """
        cfg = get_cfg()
        add_config(cfg)
        cfg.merge_from_other_cfg(CfgNode.load_cfg(self.config))
        cfg.OUTPUT_DIR = output_dir
        cfg.freeze()
        return cfg


def make_trials(
    table: Table,
    *,
    config_file: str,
    data: str,
    seeds: int,
    budget: int | None = None,
    device: str = "cpu",
    options: Sequence[str] = (),
    processes: int = 1,
) -> list[Trial]:
    """All trials of a table, seed by seed, so that every row has a result early.

    Args:
        table: which rows.
        config_file: what they start from, a YAML.
        data: data set, of which ``<data>_train`` and ``<data>_val`` are registered.
        seeds: how many, from 1 on.
        budget: iterations of each; the schedule is scaled to it. None for the config's own.
        device: ``MODEL.DEVICE``.
        options: ``KEY VALUE`` pairs for all rows, which a row's own outdo.
        processes: of each trial, see :class:`Trial`.

    Raises:
        AssertionError, KeyError: an override that is no config key (Detectron2's messages).
        OSError: the config file cannot be read.
        ValueError: another value that cannot be used, or two rows that are one setting with this
            config; the rows are named.
    """
    _check_data(data)
    base = base_config(
        config_file,
        data=data,
        num_classes=count_classes(dataset_names(data)[0]),
        budget=budget,
        device=device,
        options=options,
    )
    for row, first in zip(table.rows, _first_trials(table, base), strict=True):
        try:
            check_training(first)
            _check_trial(first)
            _try_to_build(first)
        except (AssertionError, KeyError, ValueError) as error:
            raise type(error)(f"table {table.name}, row {row.label!r}: {said(error)}") from error
    trials = []
    for seed in range(1, seeds + 1):
        for row in table.rows:
            cfg = row_config(base, row, seed)
            iterations, text = cfg.SOLVER.MAX_ITER, cfg.dump()
            trials.append(
                Trial(table.name, row.label, row.overrides, seed, iterations, text, processes)
            )
    return trials


def _first_trials(table: Table, base: CfgNode) -> list[CfgNode]:
    """The configs of the first seed.

    Raises:
        AssertionError, KeyError, ValueError: see :func:`make_trials`.
    """
    found: dict[str, tuple[str, CfgNode]] = {}
    for row in table.rows:
        where = f"table {table.name}, row {row.label!r}"
        try:
            cfg = row_config(base, row, 1)
        except (AssertionError, KeyError, ValueError) as error:
            raise type(error)(f"{where}: {said(error)}") from error
        other, _ = found.setdefault(cfg.dump(), (row.label, cfg))
        if other != row.label:
            raise ValueError(f"{where}: with this config it is the same setting as row {other!r}")
    return [cfg for _, cfg in found.values()]


def said(error: Exception) -> str:
    """The message of an error; a KeyError's own text has quotes around it."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _check_data(data: str) -> None:
    """See that both parts of a data set are registered.

    Raises:
        ValueError: one is not; says what there is.
    """
    if not data:
        raise ValueError(f"--data must name a data set, got {data!r}; there are {_pairs()}")
    for name in dataset_names(data):
        if name in DatasetCatalog:
            continue
        whole = data.removesuffix("_train").removesuffix("_val")
        both = whole != data and all(part in DatasetCatalog for part in dataset_names(whole))
        there = f"--data {whole} names both parts" if both else f"there are {_pairs()}"
        raise ValueError(f"--data {data}: {name!r} is not registered; {there}")


def dataset_names(data: str) -> tuple[str, str]:
    """The registered names of a data set's two parts, to train on and to evaluate on."""
    return f"{data}_train", f"{data}_val"


def base_config(
    config_file: str,
    *,
    data: str,
    num_classes: int,
    budget: int | None = None,
    device: str = "cpu",
    options: Sequence[str] = (),
) -> CfgNode:
    """The config that all rows of a sweep start from.

    Args:
        config_file: a YAML.
        data: see :func:`dataset_names`; need not be registered.
        num_classes: K; a class count that is told by the data needs no telling.
        budget, device, options: as of :func:`make_trials`.

    Raises:
        AssertionError, KeyError: an option that is no config key (Detectron2's messages).
        OSError: the config file cannot be read.
        ValueError: a meta-architecture that is not :data:`ALIKE`, or an option that a sweep sets
            itself.
    """
    base = get_cfg()
    add_config(base)
    base.merge_from_file(config_file)
    for key in options[::2]:
        if key != ARCHITECTURE:  # that of all rows without a `detector`; looked at below
            check_override(key)
    train, test = dataset_names(data)
    base.DATASETS.TRAIN, base.DATASETS.TEST = (train,), (test,)
    base.MODEL.RETINANET.NUM_CLASSES = num_classes
    base.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    base.MODEL.DEVICE = device
    base.merge_from_list(list(options))
    if base.MODEL.META_ARCHITECTURE not in ALIKE:
        raise ValueError(
            f"{config_file}: {ARCHITECTURE} is {base.MODEL.META_ARCHITECTURE!r}, but what a sweep "
            f"trains is FocalRetinaNet, or what a row's `detector` says: to go on from this "
            f"config, add {ARCHITECTURE} FocalRetinaNet"
        )
    if os.path.isfile(base.MODEL.WEIGHTS):  # for trials that run elsewhere
        base.MODEL.WEIGHTS = os.path.abspath(base.MODEL.WEIGHTS)
    if budget is not None and base.SOLVER.MAX_ITER > 0:  # else there is nothing to scale
        scale_schedule(base, budget)
    return base


def row_config(base: CfgNode, row: Row, seed: int) -> CfgNode:
    """The config of one trial; whether it can be trained is not looked at.

    Args:
        base: of :func:`base_config`; not changed.
        row: its setting.
        seed: of weights and data order.

    Raises:
        AssertionError, KeyError, ValueError: see :meth:`focal_det.lab.tables.Row.apply`.
    """
    cfg = base.clone()
    row.apply(cfg)
    cfg.SEED = seed
    cfg.OUTPUT_DIR = ""
    return cfg


def _check_trial(cfg: CfgNode) -> None:
    """Find what would stop a trial at its end, or in a worker.

    Raises:
        ValueError: key, value and what is allowed are named.
    """
    for key in ("MAX_ITER", "IMS_PER_BATCH"):
        if cfg.SOLVER[key] < 1:
            raise ValueError(f"SOLVER.{key} must be 1 or more, got {cfg.SOLVER[key]}")
    check_weights(cfg)
    try:
        kind = torch.device(cfg.MODEL.DEVICE).type
    except RuntimeError:
        kind = cfg.MODEL.DEVICE
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"MODEL.DEVICE must be cpu or cuda, got {cfg.MODEL.DEVICE!r}")


def check_weights(cfg: CfgNode) -> None:
    """See that a checkpoint that a config names as a file is there; none is named by ''.

    Raises:
        ValueError: it is not.
    """
    weights = cfg.MODEL.WEIGHTS
    if weights and "://" not in weights and not os.path.isfile(weights):
        raise ValueError(f"MODEL.WEIGHTS: there is no file {weights!r}")


def _try_to_build(cfg: CfgNode) -> None:
    """Build the model without its weights, which takes next to no time and memory.

    A model that works with numbers while it is built cannot be built so; it is built on the CPU.

    Raises:
        AssertionError, ValueError: it cannot be built.
    """
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    try:
        try:
            with torch.device("meta"):
                build_model(cfg)
        except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
            cfg.MODEL.DEVICE = "cpu"
            build_model(cfg)
    except KeyError as error:  # often no more than the key
        raise ValueError(f"the model cannot be built: KeyError: {said(error)}") from error


def count_classes(dataset: str) -> int:
    """Number of foreground classes of a registered data set, which is loaded where need be.

    Raises:
        ValueError: its metadata say none.
    """
    classes = dataset_classes(dataset)
    if classes is None:
        DatasetCatalog.get(dataset)
        classes = MetadataCatalog.get(dataset).get("thing_classes")
    if not classes:
        raise ValueError(f"the metadata of {dataset!r} name no thing_classes")
    return len(classes)


def _pairs() -> str:
    """The data sets that have a part for training and one for validation."""
    names = set(DatasetCatalog.list())
    pairs = (name.removesuffix("_train") for name in names if name.endswith("_train"))
    return ", ".join(sorted(name for name in pairs if f"{name}_val" in names)) or "none"


def scale_schedule(cfg: CfgNode, iterations: int) -> None:
    """Shorten or stretch a config's schedule, learning rate steps and periods with it.

    Args:
        cfg: changed in place.
        iterations: the new ``SOLVER.MAX_ITER``, >= 1.
    """
    factor = iterations / cfg.SOLVER.MAX_ITER
    steps = {round(step * factor) for step in cfg.SOLVER.STEPS}
    # Detectron2 takes rising steps inside the schedule only; in a short one, some coincide.
    cfg.SOLVER.STEPS = tuple(sorted(step for step in steps if 0 < step < iterations))
    cfg.SOLVER.WARMUP_ITERS = round(cfg.SOLVER.WARMUP_ITERS * factor)
    cfg.SOLVER.CHECKPOINT_PERIOD = max(1, round(cfg.SOLVER.CHECKPOINT_PERIOD * factor))
    if cfg.TEST.EVAL_PERIOD > 0:
        cfg.TEST.EVAL_PERIOD = max(1, round(cfg.TEST.EVAL_PERIOD * factor))
    cfg.SOLVER.MAX_ITER = iterations
