"""Training of focal_det's detectors, from YAML and LazyConfig files alike."""

from .trainer import Trainer, build_evaluator, run_lazy, run_yaml

__all__ = ["Trainer", "build_evaluator", "run_lazy", "run_yaml"]
