"""Run a training step again that was stopped for a loss or gradient that is not finite.

    python tools/replay.py OUTPUT_DIR/non_finite/iter_<n>_rank_<r>

Builds the model from the folder's config, loads its weights, runs its batch forward and backward
and prints the report anew, with the gradient of each loss, of each image by itself and of the
parameters. Parts of your own are found as in training, by FOCAL_DET_PLUGINS. Several processes
average their gradients; here is one alone, so run the folder of the rank that the report blames.

A LazyConfig may hold what a kept config cannot (classes, functions, dtypes). Then name the file
that the training was started with, and what it was overridden with:

    python tools/replay.py FOLDER --config-file my.py model.num_classes=3

Exit status: 1 if something is not finite again, 0 if all is finite, 2 if that could not be tried.
"""

import argparse
import contextlib
import json
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    # fvcore scripts its focal loss when it is imported; PyTorch warns that this will go.
    warnings.filterwarnings("ignore", ".*torch.jit.script.*")
    from focal_det.engine import diagnosis, failure_text, plain_batch

import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from omegaconf import OmegaConf
from tabulate import tabulate
from torch import Tensor, nn

from focal_det.config import add_config
from focal_det.plugins import load_plugins
from focal_det.safe_loading import install as load_files_safely
from focal_det.safe_loading import load_named_tensors, load_torch, load_yaml

FILES = ("report.json", "config.yaml", "batch.pt", "model.pth")
ROWS = 15  # of the table of parameters


def main() -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="OUTPUT_DIR/non_finite/iter_<n>_rank_<r>")
    parser.add_argument("--device", help="cpu, cuda, ...; the config's, or the CPU without a GPU")
    parser.add_argument("--config-file", type=Path, help="in place of the config in the folder")
    parser.add_argument("opts", nargs="*", help="overrides of the config, as in training")
    args = parser.parse_intermixed_args()
    if args.device and not is_here(args.device):
        parser.error(f"--device {args.device} is not on this machine")
    config = args.config_file or args.folder / "config.yaml"
    files = [args.folder / name for name in FILES if args.config_file is None or name != FILES[1]]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        parser.error(f"{args.folder} has no {', '.join(missing)}: name a folder of non_finite/")
    if not config.is_file():
        parser.error(f"--config-file must name a .yaml or .py file, got {str(config)!r}")
    if not config.read_text(encoding="utf-8").strip():
        parser.error(f"{config} is empty: name the config of that training with --config-file")
    with refusing(parser, args.folder / "report.json"):
        report = json.loads((args.folder / "report.json").read_text(encoding="utf-8"))
        failure_text.headline(report)
        getattr(torch, report["precision"]), float(report["loss_scale"])
    with refusing(parser, args.folder / "batch.pt"):
        batch = plain_batch.from_plain(load_torch(str(args.folder / "batch.pt")))
    with refusing(parser, config, ". Parts of your own must be named by FOCAL_DET_PLUGINS"):
        model = build(config, args.device, args.opts)
    with refusing(parser, args.folder / "model.pth"):
        model.load_state_dict(load_named_tensors(str(args.folder / "model.pth"))["model"])
    try:
        return replay(model.train(), batch, report)
    except Exception:  # 1, with which Python would end, says that it is not finite again
        traceback.print_exc()
        return 2


@contextlib.contextmanager
def refusing(parser: argparse.ArgumentParser, path: Path, hint: str = "") -> Iterator[None]:
    """End with status 2, naming the file, if reading it raises."""
    try:
        yield
    except Exception as error:  # a damaged file, or a class of the user's, may raise anything
        parser.error(f"{path} cannot be used: {type(error).__name__}: {error}{hint}")


def build(path: Path, device: str | None, overrides: Sequence[str] = ()) -> nn.Module:
    """The model of a YAML or LazyConfig file.

    Args:
        path: the config.
        device: where to put it; None for the config's, if this machine has it.
        overrides: of the config, in the form of its kind.
    """
    load_plugins()
    load_files_safely()
    if is_detectron2_yaml(path):
        cfg = get_cfg()
        add_config(cfg)
        cfg.set_new_allowed(True)  # keys of the user's own script
        cfg.merge_from_file(str(path))
        cfg.merge_from_list(list(overrides))
        cfg.MODEL.DEVICE = usable(device or cfg.MODEL.DEVICE)
        model: nn.Module = build_model(cfg)
        return model
    lazy = LazyConfig.apply_overrides(LazyConfig.load(str(path)), list(overrides))
    place = device or OmegaConf.select(lazy, "train.device", default="cpu")
    lazy_model: nn.Module = instantiate(lazy.model).to(usable(place))
    return lazy_model


def is_detectron2_yaml(path: Path) -> bool:
    """Whether it is a YAML config with Detectron2's keys, and no LazyConfig."""
    if path.suffix == ".py":
        return False
    with path.open(encoding="utf-8") as file:
        keys = load_yaml(file)
    return "MODEL" in keys or "_BASE_" in keys


def is_here(device: str) -> bool:
    """Whether this machine has a device."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):  # AssertionError: PyTorch was built without it
        return False
    return True


def usable(device: str) -> str:
    """The device, or the CPU where it is a GPU and there is none."""
    return "cpu" if device.startswith("cuda") and not torch.cuda.is_available() else device


def replay(model: nn.Module, batch: Sequence[dict[str, Any]], report: diagnosis.Report) -> int:
    """Run the step and print what it gives.

    Args:
        model: in training mode.
        batch: N dictionaries in Detectron2's form.
        report: of the step as it was in training.

    Returns:
        1 if a loss or gradient is not finite, else 0.
    """
    precision, scale = getattr(torch, report["precision"]), report["loss_scale"]
    with diagnosis.undisturbed(model):
        losses = forward(model, batch, precision)
        by_loss = {name: gradients(model, scale * loss) for name, loss in losses.items()}
        total = gradients(model, scale * torch.stack(list(losses.values())).sum())
    values = {name: loss.detach() for name, loss in losses.items()}
    step = diagnosis.Step(batch, values, precision, scale)
    found = diagnosis.describe_failure(model, step, total)
    print(f"In training: {failure_text.headline(report)}.\n")
    if found["term"] is None:
        print(f"Not reproduced: every loss and gradient is finite here. {not_here(report)}")
        return 0
    again = {**report, **found}
    again["ranks"] = [failure_text.summary(again)]
    print(f"Reproduced: {failure_text.format_report(again)}")
    print_table(
        "gradient of each loss",
        [{"loss": name, **describe(x, scale)} for name, x in by_loss.items()],
    )
    if found["images"]:  # of a batch in Detectron2's form
        print_table("gradient of each image by itself", describe_images(model, step))
    print_table("gradient of each parameter", describe_parameters(total, scale, found))
    return 1


def forward(
    model: nn.Module, batch: Sequence[dict[str, Any]], precision: torch.dtype
) -> dict[str, Tensor]:
    """The losses by name, 0-d."""
    with diagnosis.lowered_to(precision, model):
        return diagnosis.name_losses(model(batch))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of each parameter that the loss reaches; the graph stays."""
    parameters = {name: x for name, x in model.named_parameters() if x.requires_grad}
    found = torch.autograd.grad(
        loss, list(parameters.values()), retain_graph=True, allow_unused=True
    )
    return {name: x for name, x in zip(parameters, found, strict=True) if x is not None}


def describe(found: Mapping[str, Tensor], scale: float) -> dict[str, Any]:
    """Norm of gradients, and how many parameters have one that is not finite."""
    bad = sum(not bool(x.isfinite().all()) for x in found.values())
    return {
        "norm": diagnosis.gradient_norm(found.values()) / scale,
        "parameters": len(found),
        "non-finite": bad,
    }


def describe_images(model: nn.Module, step: diagnosis.Step) -> list[dict[str, Any]]:
    """A row an image: its losses and gradient when it is the only one of its batch."""
    rows = []
    for index, image in enumerate(step.batch):
        with diagnosis.undisturbed(model), diagnosis.images_apart(model):
            losses = forward(model, [image], step.precision)
            loss = torch.stack(list(losses.values())).sum()
            found = describe(gradients(model, step.loss_scale * loss), step.loss_scale)
        values = {name: loss.item() for name, loss in losses.items()}
        rows.append({"index": index, "file name": image.get("file_name"), **values, **found})
    return rows


def describe_parameters(
    found: Mapping[str, Tensor], scale: float, report: diagnosis.Report
) -> list[dict[str, Any]]:
    """A row for each gradient that is not finite, as the backward pass met them, then the largest.

    Args:
        found: by the parameter's name.
        scale: the loss scale, which the gradients hold.
        report: of the same gradients.
    """
    norms = {name: diagnosis.gradient_norm([x]) / scale for name, x in found.items()}
    bad = report["non_finite_gradients"]
    rest = sorted(norms.keys() - set(bad), key=lambda name: -norms[name])
    return [
        {
            "parameter": name,
            "shape": list(found[name].shape),
            "non-finite share": 1 - found[name].isfinite().double().mean().item(),
            "norm": norms[name],
        }
        for name in [*bad, *rest][:ROWS]
    ]


def not_here(report: diagnosis.Report) -> str:
    """Why a step may be finite here that was not in training."""
    blamed = failure_text.cause(report)
    if blamed["rank"] != report["rank"]:
        return f"It came from rank {blamed['rank']}: run {blamed['folder']}."
    reasons = ["another device or version", "something random in the model"]
    if report["world_size"] > 1:
        reasons.append("the gradient of another rank, whose folder is beside this one")
    return f"What may differ: {', '.join(reasons)}."


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows under a title."""
    print(f"\n{title}")
    print(tabulate(rows, headers="keys", floatfmt=".4g"))


if __name__ == "__main__":
    sys.exit(main())
