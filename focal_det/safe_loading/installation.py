"""Has Detectron2's own classes read files as :mod:`focal_det.safe_loading` does."""

import functools
import io
import os
from contextvars import ContextVar
from types import SimpleNamespace
from typing import IO, Any

import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig
from detectron2.data import build
from detectron2.utils.file_io import PathManager
from omegaconf import OmegaConf

from .checkpoints import load_checkpoint, load_named_tensors, reads_by_torch_load
from .configs import load_yaml
from .pickles import load_pickle

_YAML_ENDINGS = (".yaml", ".yml")


@functools.cache
def install() -> None:
    """Change Detectron2's loading of files, in this process, to the functions of this package.

    - ``DetectionCheckpointer``: :func:`~focal_det.safe_loading.load_checkpoint`.
    - ``CfgNode.merge_from_file`` and ``load_yaml_with_base``, ``_BASE_`` files included, and
      ``LazyConfig.load`` of YAML: :func:`~focal_det.safe_loading.load_yaml`, whatever
      ``allow_unsafe`` says. A file that is its own ``_BASE_``, is no YAML or maps no keys to values
      is a ``ValueError`` that names it.
    - Proposal files: :func:`~focal_det.safe_loading.load_pickle`.

    A ``.py`` LazyConfig is still executed: it is a program. Safe to call more than once. Can go
    once Detectron2 loads safely by itself.
    """
    _install_checkpoints()
    _install_configs()
    _install_lazy_configs()
    _install_proposals()


def _install_checkpoints() -> None:
    theirs = DetectionCheckpointer._load_file

    @functools.wraps(theirs)
    def _load_file(self: DetectionCheckpointer, filename: str) -> dict[str, Any]:
        if reads_by_torch_load(filename):
            loaded: dict[str, Any] = theirs(self, filename)
            return loaded
        return load_checkpoint(filename)

    DetectionCheckpointer._load_file = _load_file
    if hasattr(DetectionCheckpointer, "_torch_load"):
        DetectionCheckpointer._torch_load = lambda self, f: load_named_tensors(f)


def _install_configs() -> None:
    theirs = CfgNode._open_cfg.__func__

    @functools.wraps(theirs)
    def _open_cfg(cls: type[CfgNode], filename: str) -> IO[str]:
        # fvcore, which merges the _BASE_ files, falls back to unsafe loading by itself. It is
        # handed text that has no tags left.
        with theirs(cls, filename) as file:
            try:
                content = load_yaml(file)
            except yaml.YAMLError as error:
                raise ValueError(f"{filename}: no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise ValueError(
                f"{filename}: a config must map keys to values, got {str(content)!r:.80}"
            )
        return io.StringIO(yaml.safe_dump(content, sort_keys=False))

    CfgNode._open_cfg = classmethod(_open_cfg)
    _install_check_of_bases()


def _install_check_of_bases() -> None:
    theirs = CfgNode.load_yaml_with_base.__func__
    # The files that are being read: each is a _BASE_ of the one before.
    reading: ContextVar[tuple[str, ...]] = ContextVar("reading", default=())

    @functools.wraps(theirs)
    def load_yaml_with_base(cls: type[CfgNode], filename: str, *args: Any, **kwargs: Any) -> Any:
        path = os.path.realpath(filename) if isinstance(filename, str) else filename
        if path in reading.get():
            raise ValueError(f"{path!r} is its own _BASE_: " + " -> ".join([*reading.get(), path]))
        token = reading.set((*reading.get(), path))
        try:
            return theirs(cls, filename, *args, **kwargs)
        finally:
            reading.reset(token)

    CfgNode.load_yaml_with_base = classmethod(load_yaml_with_base)


def _install_lazy_configs() -> None:
    theirs = LazyConfig.load

    @functools.wraps(theirs)
    def load(filename: str, keys: str | tuple[str, ...] | None = None) -> Any:
        if os.path.splitext(filename)[1] not in _YAML_ENDINGS:
            return theirs(filename, keys)
        with PathManager.open(filename) as file:
            config = OmegaConf.create(load_yaml(file), flags={"allow_objects": True})
        if keys is None or isinstance(keys, str):
            return config if keys is None else config[keys]
        return tuple(config[key] for key in keys)

    LazyConfig.load = staticmethod(load)


def _install_proposals() -> None:
    # Its one use of pickle is load_proposals_into_dataset, within a function that does more.
    build.pickle = SimpleNamespace(load=lambda file, encoding: load_pickle(file))
