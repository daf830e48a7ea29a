"""Makes a plain checkpoint of one that holds more than plain data.

    python -m focal_det.safe_loading.convert IN OUT.pth --trust

IN IS EXECUTED: whatever its author put into it runs with your rights. So trust its author, and run
this where it can do no harm. OUT.pth has the weights, and ``matching_heuristics`` and
``__author__`` where there are any; all else is left out, and named.
"""

import argparse
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    # fvcore scripts its focal loss when it is imported; PyTorch warns that this will go.
    warnings.filterwarnings("ignore", ".*torch.jit.script.*")
    from focal_det.files import write_whole

import numpy as np
import torch
from torch import Tensor, nn

from .checkpoints import load_checkpoint

# Where files keep the weights; those that have none of these are the weights themselves.
PARTS = ("model", "state_dict", "model_state", "blobs")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m focal_det.safe_loading.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", metavar="IN", type=Path, help="what torch.save or pickle wrote")
    parser.add_argument("output", metavar="OUT.pth", type=Path)
    parser.add_argument("--trust", action="store_true", help="you trust the author of IN")
    args = parser.parse_args(arguments)
    if args.output.suffix != ".pth":
        parser.error(f"OUT must end with .pth, got {str(args.output)!r}")
    if not args.input.is_file():
        parser.error(f"IN must be a file, got {str(args.input)!r}")
    if not args.trust:
        parser.error(
            f"{str(args.input)!r} would be executed, with all that its author put into it: add "
            "--trust if you trust that author"
        )
    try:
        checkpoint, left_out = convert(_execute(args.input), args.input.suffix)
    except Exception as error:  # an executed file may raise anything
        parser.error(f"{str(args.input)!r} cannot be converted: {type(error).__name__}: {error}")
    write_whole(args.output, lambda file: torch.save(checkpoint, file))
    load_checkpoint(str(args.output))
    print(f"Written: {args.output}, {len(checkpoint['model'])} weights")
    if left_out:
        print(f"Left out: {', '.join(left_out)}")


def _execute(path: Path) -> Any:
    if path.suffix != ".pkl":
        return torch.load(path, map_location="cpu", weights_only=False)
    with path.open("rb") as file:
        return pickle.load(file, encoding="latin1")


def convert(loaded: Any, suffix: str = ".pth") -> tuple[dict[str, Any], list[str]]:
    """The plain checkpoint that a loaded file stands for.

    Args:
        loaded: its weights, a module, or a dictionary that has either as ``"model"``,
            ``"state_dict"``, ``"model_state"`` or ``"blobs"``.
        suffix: of the file. Weights of a ``.pkl`` that does not call them ``"model"`` are Caffe2's
            and those of a ``.pyth`` pycls', as for Detectron2, which matches their names.

    Returns:
        What to give to ``torch.save``, and the names of what is left out.

    Raises:
        ValueError: it has no weights.
    """
    if isinstance(loaded, nn.Module):
        loaded = {"model": loaded}
    if not isinstance(loaded, Mapping):
        raise ValueError(f"it holds a {type(loaded).__name__}, no weights by name")
    kinds = (Mapping, nn.Module)
    part = next((key for key in PARTS if isinstance(loaded.get(key), kinds)), None)
    found = loaded if part is None else loaded[part]
    state = found.state_dict() if isinstance(found, nn.Module) else found
    checkpoint: dict[str, Any] = {}
    if suffix == ".pyth":
        checkpoint = {"__author__": "pycls", "matching_heuristics": True}
        state = {k: v for k, v in state.items() if not str(k).endswith("num_batches_tracked")}
    elif suffix == ".pkl" and part in (None, "blobs"):
        checkpoint = {"__author__": "Caffe2", "matching_heuristics": True}
        state = {k: v for k, v in state.items() if not str(k).endswith("_momentum")}
    if "matching_heuristics" in loaded:
        checkpoint["matching_heuristics"] = bool(loaded["matching_heuristics"])
    if "__author__" in loaded:
        checkpoint["__author__"] = str(loaded["__author__"])
    tensors = {str(name): _tensor(value) for name, value in state.items()}
    checkpoint["model"] = {name: x for name, x in tensors.items() if x is not None}
    if not checkpoint["model"]:
        raise ValueError("it has no weights, only " + (", ".join(map(str, loaded)) or "nothing"))
    # Where the weights are not in a part of their own, these are of the file itself.
    left_out = [] if part is None else [str(key) for key in loaded if key != part]
    left_out += [name for name, x in tensors.items() if x is None]
    return checkpoint, [name for name in left_out if name not in checkpoint]


def _tensor(value: Any) -> Tensor | None:
    """A weight, None for what is no number or array of numbers."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if not isinstance(value, np.ndarray | np.generic | int | float):
        return None
    array = np.asarray(value)
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    except TypeError:  # text, objects, dates
        return None


if __name__ == "__main__":
    main()
