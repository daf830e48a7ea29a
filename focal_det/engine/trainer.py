"""Detectron2's trainers with the evaluators and checks of focal_det."""

import argparse
import logging
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    default_setup,
    default_writers,
    defaults,
    hooks,
)
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from omegaconf import DictConfig, OmegaConf
from torch import nn

from focal_det.compat import allow_ddp_on_cpu, keeps_inner_trainer
from focal_det.config import add_config, check_num_classes, describe
from focal_det.data.loader import TrainLoader, build_lazy_train_loader, build_train_loader
from focal_det.modeling import FocalRetinaNet
from focal_det.plugins import load_plugins
from focal_det.safe_loading import install as load_files_safely

from .checkpoint import Checkpointer
from .guard import NonFiniteGuard
from .resume import FinishStep, RunState, drop_unfit_state
from .skipped import ReportSkipped

logger = logging.getLogger(f"detectron2.{__name__}")


def build_evaluator(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """The evaluator for a data set's annotation format.

    Args:
        dataset_name: a registered data set.
        output_folder: where its predictions and results are kept.

    Raises:
        ValueError: an ``evaluator_type`` that does not score boxes.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if kind == "coco":
        return COCOEvaluator(dataset_name, output_dir=output_folder)
    if kind == "lvis":
        return LVISEvaluator(dataset_name, output_dir=output_folder)
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    raise ValueError(
        f"{dataset_name!r} has evaluator_type {kind!r}; one of coco, lvis, pascal_voc is needed "
        "to score boxes"
    )


class Trainer(DefaultTrainer):
    """Detectron2's trainer with exact resume; evaluates by the data set's annotation format.

    A run that was killed at any moment and is started again with ``resume`` ends as it would have
    ended: see :class:`focal_det.engine.resume.RunState`.

    Args:
        cfg: the config.
        allow_changes: go on from a checkpoint of another loss or number of classes.
    """

    guards_images = True  # it heeds DATALOADER.ON_BAD_IMAGE

    def __init__(self, cfg: CfgNode, *, allow_changes: bool = False) -> None:
        self._allow_changes = allow_changes
        super().__init__(cfg)
        if not hasattr(self, "_run_state"):
            raise TypeError(
                f"{type(self).__name__}.build_hooks must add to super().build_hooks(), which has "
                "what exact resume needs"
            )

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """A :class:`focal_det.data.loader.TrainLoader`."""
        return build_train_loader(cfg)

    def build_hooks(self) -> list[hooks.HookBase]:
        """Detectron2's hooks, and what exact resume needs."""
        # Here, since Detectron2 makes its own just before, which these hooks would hold.
        self._run_state = RunState(
            self.model,
            self.data_loader,
            identify(self.model),
            self.cfg.SOLVER.CHECKPOINT_PERIOD,
            os.path.join(self.cfg.OUTPUT_DIR, "metrics.json"),
            settings={
                "SOLVER.IMS_PER_BATCH": self.cfg.SOLVER.IMS_PER_BATCH,
                "SEED": self.cfg.SEED,
                "DATASETS.TRAIN": list(self.cfg.DATASETS.TRAIN),
            },
            allow_changes=self._allow_changes,
        )
        self.checkpointer = Checkpointer(
            self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        chosen = [hook for hook in super().build_hooks() if hook is not None]
        return _with_ours(
            chosen, self._trainer, self._run_state, self.cfg.OUTPUT_DIR, self.cfg.dump()
        )

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's writers."""
        writers: list[EventWriter] = super().build_writers()
        self._run_state.writers = writers
        return writers

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint of OUTPUT_DIR, or ``MODEL.WEIGHTS``.

        Args:
            resume: go on from the last checkpoint, if there is one.

        Raises:
            ValueError: that checkpoint is of another loss or number of classes, and changes are not
                allowed.
        """
        self.checkpointer.remove_partial_files()
        found = _checkpoint_everywhere(self.checkpointer) if resume else None
        super().resume_or_load(resume)
        drop_unfit_state(self.optimizer)
        self._run_state.start(self.start_iter, found)
        for hook in self._hooks:
            if isinstance(hook, hooks.PreciseBN) and isinstance(hook._data_loader, TrainLoader):
                # It reads on where it stopped, NUM_ITER batches each time.
                times = self.start_iter // max(1, self.cfg.TEST.EVAL_PERIOD)
                hook._data_loader.seed = self.data_loader.seed
                hook._data_loader.start_at(times * self.cfg.TEST.PRECISE_BN.NUM_ITER)

    def train(self) -> Any:
        """Train to the end; what Detectron2's method returns."""
        self.register_hooks([FinishStep(self._run_state)])
        return super().train()

    def state_dict(self) -> dict[str, Any]:
        """Detectron2's, with the optimizer and the loss scale in any version."""
        state: dict[str, Any] = super().state_dict()
        if not keeps_inner_trainer():
            state["_trainer"] = self._trainer.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        if not keeps_inner_trainer():
            self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """See :func:`build_evaluator`; the default folder is ``OUTPUT_DIR/inference``."""
        return build_evaluator(
            dataset_name, output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        )


def _with_ours(
    chosen: list[hooks.HookBase],
    trainer: SimpleTrainer,
    state: RunState,
    output_dir: str,
    config_yaml: str,
) -> list[hooks.HookBase]:
    """Detectron2's hooks and ours, in their order."""
    guard = NonFiniteGuard(
        trainer.model,
        trainer.optimizer,
        output_dir,
        grad_scaler=getattr(trainer, "grad_scaler", None),
        config_yaml=config_yaml,
    )
    return [guard, ReportSkipped(trainer.data_loader), *state.join(chosen)]


def _checkpoint_everywhere(checkpointer: Checkpointer) -> bool:
    """Whether there is a checkpoint to resume from.

    Raises:
        FileNotFoundError: some processes see one and others do not.
    """
    found = comm.all_gather(bool(checkpointer.get_checkpoint_file()))
    if len(set(found)) > 1:
        without = [rank for rank, has in enumerate(found) if not has]
        raise FileNotFoundError(
            f"processes {without} find no checkpoint in {checkpointer.save_dir!r}, the others do: "
            "OUTPUT_DIR (in a LazyConfig: train.output_dir) must be shared by all machines"
        )
    return bool(found[0])


def identify(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint must agree on with the model that goes on from it."""
    model = getattr(model, "module", model)
    if not isinstance(model, FocalRetinaNet):
        return {"the model": type(model).__name__}
    loss = model.cls_loss
    return {
        "the loss": f"{type(loss).__name__}({loss.extra_repr()})",
        "the number of classes": model.num_classes,
    }


def run_yaml(args: argparse.Namespace) -> Any:
    """Train or evaluate (``args.eval_only``) what a YAML config describes.

    Args:
        args: of :func:`detectron2.engine.default_argument_parser`.

    Returns:
        The evaluation results by data set and metric.
    """
    cfg = get_cfg()
    add_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    if not args.eval_only:
        trainer = Trainer(cfg, allow_changes=args.allow_changes)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def run_lazy(args: argparse.Namespace) -> Any:
    """Train or evaluate (``args.eval_only``) what a LazyConfig file describes.

    Args:
        args: of :func:`detectron2.engine.default_argument_parser`.

    Returns:
        The evaluation results by metric, None without an evaluator.
    """
    load_plugins()
    allow_ddp_on_cpu()
    load_files_safely()
    cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    default_setup(cfg, args)
    _check_lazy(cfg)
    model = instantiate(cfg.model).to(cfg.train.device)
    if isinstance(model, FocalRetinaNet):
        logger.info(_describe_lazy(model))
    if args.eval_only:
        model = defaults.create_ddp_model(model)
        Checkpointer(model).load(cfg.train.init_checkpoint)
        return _evaluate_lazy(cfg, model)
    return _train_lazy(cfg, model, resume=args.resume, allow_changes=args.allow_changes)


def _check_lazy(cfg: DictConfig) -> None:
    """What `check_training` does for a YAML config."""
    num_classes = OmegaConf.select(cfg, "model.num_classes")
    for split in ("train", "test"):
        names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names")
        if num_classes is None or names is None:
            continue
        for name in [names] if isinstance(names, str) else names:
            check_num_classes(num_classes, name, split.upper())


def _describe_lazy(model: FocalRetinaNet) -> str:
    prior = model.head.cls_score.bias.detach().sigmoid().mean().item()
    num_anchors = model.anchor_generator.num_cell_anchors[0]
    normalizer = type(model.normalizer).__name__
    return describe(model.cls_loss, normalizer, prior, model.num_classes, num_anchors)


def _train_lazy(cfg: DictConfig, model: nn.Module, resume: bool, allow_changes: bool) -> Any:
    config_yaml = _as_yaml(cfg)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    if _detectron2_loads(cfg.dataloader.train):
        cfg.dataloader.train._target_ = build_lazy_train_loader
        cfg.dataloader.train.seed = cfg.train.get("seed", -1)
        cfg.dataloader.train.num_classes = OmegaConf.select(cfg, "model.num_classes")
    loader = instantiate(cfg.dataloader.train)
    model = defaults.create_ddp_model(model, **cfg.train.ddp)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    output_dir = cfg.train.output_dir
    state = RunState(
        model,
        loader,
        identify(model),
        cfg.train.checkpointer.period,
        os.path.join(output_dir, "metrics.json"),
        settings={
            "dataloader.train.total_batch_size": cfg.dataloader.train.get("total_batch_size"),
            "train.seed": cfg.train.get("seed", -1),
        },
        allow_changes=allow_changes,
    )
    checkpointer = Checkpointer(model, output_dir, trainer=trainer)
    latest: dict[str, Any] = {}

    def evaluate() -> Any:
        latest["results"] = _evaluate_lazy(cfg, model)
        return latest["results"]

    chosen = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
    ]
    evaluation = hooks.EvalHook(cfg.train.eval_period, evaluate)
    if comm.is_main_process():
        state.writers = default_writers(output_dir, cfg.train.max_iter)
        chosen += [
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
            evaluation,
            hooks.PeriodicWriter(state.writers, period=cfg.train.log_period),
        ]
    else:
        chosen.append(evaluation)
    ours = _with_ours(chosen, trainer, state, output_dir, config_yaml)
    trainer.register_hooks([*ours, FinishStep(state)])
    checkpointer.remove_partial_files()
    found = _checkpoint_everywhere(checkpointer) if resume else None
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    drop_unfit_state(optimizer)
    # A checkpoint holds the iteration that was finished last.
    start = trainer.iter + 1 if found else 0
    state.start(start, found)
    trainer.train(start, cfg.train.max_iter)
    return latest.get("results")


def _as_yaml(cfg: DictConfig) -> str:
    """A LazyConfig as text, empty where YAML cannot hold it (a ``torch.dtype``, say)."""
    theirs = logging.getLogger("detectron2.config.lazy")
    quiet = theirs.disabled
    theirs.disabled = True  # default_setup(), which saves it too, has told of what cannot be saved
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.yaml"
            LazyConfig.save(cfg, str(path))
            return path.read_text(encoding="utf-8") if path.exists() else ""
    finally:
        theirs.disabled = quiet


def _detectron2_loads(train: DictConfig) -> bool:
    """Whether the training data are to be loaded by Detectron2's own function."""
    target = train._target_
    name = target if isinstance(target, str) else f"{target.__module__}.{target.__qualname__}"
    return name.startswith("detectron2.") and name.endswith(".build_detection_train_loader")


def _evaluate_lazy(cfg: DictConfig, model: nn.Module) -> Any:
    if "evaluator" not in cfg.dataloader:
        return None
    # In this order, since reading a data set makes its annotation file where it is generated.
    loader = instantiate(cfg.dataloader.test)
    results = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results
