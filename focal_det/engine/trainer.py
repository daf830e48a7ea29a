"""Detectron2's trainers with the evaluators and checks of focal_det."""

import argparse
import logging
import os
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
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
from omegaconf import DictConfig, OmegaConf
from torch import nn

from focal_det.compat import allow_ddp_on_cpu
from focal_det.config import add_config, check_num_classes, describe
from focal_det.modeling import FocalRetinaNet
from focal_det.plugins import load_plugins

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
    """Detectron2's trainer; evaluates by the data set's annotation format."""

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """See :func:`build_evaluator`; the default folder is ``OUTPUT_DIR/inference``."""
        return build_evaluator(
            dataset_name, output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        )


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
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    model = Trainer.build_model(cfg)
    checkpointer = DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
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
    cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    default_setup(cfg, args)
    _check_lazy(cfg)
    model = instantiate(cfg.model).to(cfg.train.device)
    if isinstance(model, FocalRetinaNet):
        logger.info(_describe_lazy(model))
    if args.eval_only:
        model = defaults.create_ddp_model(model)
        DetectionCheckpointer(model).load(cfg.train.init_checkpoint)
        return _evaluate_lazy(cfg, model)
    return _train_lazy(cfg, model, resume=args.resume)


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


def _train_lazy(cfg: DictConfig, model: nn.Module, resume: bool) -> Any:
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    model = defaults.create_ddp_model(model, **cfg.train.ddp)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    latest: dict[str, Any] = {}

    def evaluate() -> Any:
        latest["results"] = _evaluate_lazy(cfg, model)
        return latest["results"]

    evaluation = hooks.EvalHook(cfg.train.eval_period, evaluate)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        ]
    )
    if comm.is_main_process():
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        trainer.register_hooks(
            [
                hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
                evaluation,
                hooks.PeriodicWriter(writers, period=cfg.train.log_period),
            ]
        )
    else:
        trainer.register_hooks([evaluation])
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    # A checkpoint holds the iteration that was finished last.
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    trainer.train(start, cfg.train.max_iter)
    return latest.get("results")


def _evaluate_lazy(cfg: DictConfig, model: nn.Module) -> Any:
    if "evaluator" not in cfg.dataloader:
        return None
    # In this order, since reading a data set makes its annotation file where it is generated.
    loader = instantiate(cfg.dataloader.test)
    results = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results
