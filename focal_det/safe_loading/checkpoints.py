"""Checkpoints of Detectron2, Caffe2, pycls and PyTorch, read as plain data."""

import logging
import pickle
import re
import reprlib
import tarfile
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager

from .pickles import UnsafeFileError, damage, load_pickle, refusal

# Below Detectron2's logger, whose handlers every Detectron2 script sets up.
logger = logging.getLogger(f"detectron2.{__name__}")


def load_checkpoint(filename: str) -> dict[str, Any]:
    """What ``DetectionCheckpointer._load_file`` reads from a file, if all of it is plain data.

    Args:
        filename: a path or URL that Detectron2's ``PathManager`` knows: a ``.pkl`` of the zoos of
            Detectron2 or Caffe2, a ``.pyth`` of pycls, or a file of ``torch.save``.

    Returns:
        ``"model"``, names to arrays or to tensors on the CPU, and what else the file has.

    Raises:
        UnsafeFileError: it contains more than plain data. The file, what it contains and how to
            convert it are named.
        ValueError: it is damaged or no checkpoint.
        OSError: it cannot be opened.
    """
    path = PathManager.get_local_path(filename)
    if filename.endswith(".pkl"):
        with open(path, "rb") as file:
            data = _by_name(load_pickle(file), filename)
        if "model" in data and "__author__" in data:
            _by_name(data["model"], filename, "model")
            logger.info(f"Reading a file from {reprlib.repr(data['__author__'])}")
            return data
        if "blobs" in data:  # ImageNet's models are without
            data = _by_name(data["blobs"], filename, "blobs")
        model = {key: value for key, value in data.items() if not key.endswith("_momentum")}
        return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}
    if not filename.endswith(".pyth"):
        data = load_named_tensors(path)
        return data if "model" in data else {"model": data}
    data = _by_name(load_torch(path), filename)
    if "model_state" not in data:
        raise ValueError(f"{filename!r} has no 'model_state', which pycls' .pyth files have")
    state = _by_name(data["model_state"], filename, "model_state")
    model = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    return {"model": model, "__author__": "pycls", "matching_heuristics": True}


def _by_name(data: Any, filename: str, part: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        what = f"its {part!r} is" if part else "it holds"
        raise ValueError(f"{filename!r} is no checkpoint: {what} a {type(data).__name__}")
    unnamed = [key for key in data if not isinstance(key, str)]
    if unnamed:
        key = reprlib.repr(unnamed[0])
        raise ValueError(f"{filename!r} is no checkpoint: it has the key {key}, which is no name")
    return data


def load_named_tensors(path: str) -> dict[str, Any]:
    """A file of ``torch.save`` that holds the state of a model, or that as ``"model"`` and more.

    Args:
        path: a local file.

    Raises:
        UnsafeFileError, OSError: see :func:`load_torch`.
        ValueError: it is damaged or no checkpoint.
    """
    data = _by_name(load_torch(path), path)
    if "model" in data:
        _by_name(data["model"], path, "model")
    return data


def load_torch(path: str) -> Any:
    """``torch.load`` onto the CPU with ``weights_only=True``.

    TorchScript and tar archives are refused here, since PyTorch before 2.6 runs what they contain
    all the same (CVE-2025-32434).

    Args:
        path: a local file that ``torch.save`` wrote.

    Returns:
        What was saved: tensors, numbers, text and containers of them.

    Raises:
        UnsafeFileError: it contains something else, which is named.
        ValueError: it is damaged.
        OSError: it cannot be opened.
    """
    try:
        if tarfile.is_tarfile(path):
            raise refusal(path, "an archive of PyTorch before 0.1.10")
        if _is_torchscript(path):
            raise refusal(path, "a TorchScript program")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, UnsafeFileError):
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error))
        what = found[1] if found else "something else than tensors"
        raise refusal(path, what) from error
    except Exception as error:  # a damaged file may raise anything
        raise damage(path, error) from error


def _is_torchscript(path: str) -> bool:
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    # Asked of torch.load's own reader: another might list other files of a crafted archive.
    return "constants.pkl" in torch._C.PyTorchFileReader(path).get_all_records()


def reads_by_torch_load(filename: str) -> bool:
    """Whether Detectron2 reads a file by its checkpointer's ``_torch_load``, which 0.6 has not.

    There the query of a file name (``?matching_heuristics=True``) is heeded; so such a file is left
    to Detectron2's ``_load_file``, and what that calls is made safe.
    """
    return hasattr(DetectionCheckpointer, "_torch_load") and not filename.endswith(
        (".pkl", ".pyth")
    )
