"""A batch without classes of anyone, for files that ``torch.load(weights_only=True)`` reads."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, RotatedBoxes
from torch import Tensor

# Structures that hold one tensor, by the name under which a batch is saved.
STRUCTURES = {kind.__name__: kind for kind in (Boxes, RotatedBoxes, BitMasks, Keypoints)}
PLAIN = (str, int, float, bool, type(None))


def to_plain(value: Any) -> Any:
    """A batch as tensors, strings, numbers, lists and dictionaries, for ``torch.load``.

    Args:
        value: a batch, or a part of it. Instances become their image size and fields; fields and
            entries of kinds that cannot be told in this way (polygons of masks, arrays of text,
            objects or dates) are left out.

    Returns:
        Tensors are copies on the CPU.
    """
    if isinstance(value, Instances):
        fields = {k: v for k, v in value.get_fields().items() if _has_plain_form(v)}
        size = list(value.image_size)
        return {"kind": "Instances", "image_size": size, "fields": to_plain(fields)}
    if type(value).__name__ in STRUCTURES:
        return {"kind": type(value).__name__, "tensor": to_plain(value.tensor)}
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.ndarray) and _has_plain_form(value):
        # A copy, in the machine's own byte order, which alone PyTorch knows.
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {_plain(k): to_plain(v) for k, v in value.items() if _has_plain_form(v)}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value if _has_plain_form(v)]
    return _plain(value)


def _plain(value: Any) -> Any:
    """A value as one of the types of `PLAIN` itself: an Enum may be a number, and is a class."""
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value if type(value) in PLAIN else str(value)


def _has_plain_form(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return _is_known(value.dtype)
    kinds = (Instances, Tensor, np.generic, dict, list, tuple, Path, *PLAIN)
    return isinstance(value, kinds) or type(value).__name__ in STRUCTURES


def _is_known(dtype: np.dtype[Any]) -> bool:
    """Whether PyTorch has tensors of a kind of arrays, as it has not of text and dates."""
    if dtype.kind not in "biufc":
        return False
    try:
        torch.from_numpy(np.empty(0, dtype.newbyteorder("=")))
    except TypeError:  # numbers of 128 bits; uint16 before PyTorch 2.3
        return False
    return True


def from_plain(value: Any) -> Any:
    """What :func:`to_plain` was given."""
    if isinstance(value, list):
        return [from_plain(v) for v in value]
    if not isinstance(value, dict):
        return value
    if value.get("kind") == "Instances":
        return Instances(tuple(value["image_size"]), **from_plain(value["fields"]))
    if value.get("kind") in STRUCTURES:
        return STRUCTURES[value["kind"]](value["tensor"])
    return {k: from_plain(v) for k, v in value.items()}
