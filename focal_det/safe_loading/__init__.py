"""Reads checkpoints, configs and annotations of others without running anything that they contain.

A pickle is a program: what it names is imported and called. So is a YAML file with Python's tags.
Here only plain data is read: tensors, numpy arrays, numbers, text and Python's own containers.
Everything else raises :class:`UnsafeFileError` before anything of it has run. For a checkpoint
whose author is trusted, ``python -m focal_det.safe_loading.convert`` makes a plain one of it.

What is code by its nature stays code: a ``.py`` LazyConfig is executed when it is loaded, and
``instantiate`` calls whatever the ``_target_`` of any LazyConfig names, a ``.yaml`` one's too.
"""

from .checkpoints import load_checkpoint, load_named_tensors, load_torch, reads_by_torch_load
from .configs import load_yaml
from .installation import install
from .paths import ALLOW_OUTSIDE_IMAGES, check_inside
from .pickles import UnsafeFileError, load_pickle

__all__ = [
    "ALLOW_OUTSIDE_IMAGES",
    "UnsafeFileError",
    "check_inside",
    "install",
    "load_checkpoint",
    "load_named_tensors",
    "load_pickle",
    "load_torch",
    "load_yaml",
    "reads_by_torch_load",
]
