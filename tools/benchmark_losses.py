"""Time and memory of every classification loss, side by side with other implementations.

    python tools/benchmark_losses.py                        # all losses, on the GPU if there is one
    python tools/benchmark_losses.py --losses "FL gamma 2 alpha .25" --shapes 800x1216x80 --full
    python tools/benchmark_losses.py --quick                # does it run?

From a head's raw output (N, A x K, H, W) a level to the gradient of it, with realistic labels. Each
variant is first checked against float64, value and gradient; the tool refuses to time what is
wrong. All variants of a case take turns in one process. On the CPU, everything is measured with the
allocator as it comes ("cold") and then with one that reuses memory ("warm").

Without --full, a CPU is spared the slowest: the eager twins in low precision and where the logits
take more than 32 MiB; where they take half a GiB, all but focal loss and Detectron2's path in
float32.

Writes OUTPUT/<device>/benchmark_losses.json; `make docs` makes the tables of it.
"""

import argparse
import itertools
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    # fvcore scripts its focal loss when it is imported; PyTorch warns that this will go.
    warnings.filterwarnings("ignore", ".*torch.jit.script.*")
    from focal_det.benchmarks import losses

import torch
from tabulate import tabulate
from tqdm import tqdm

from focal_det.benchmarks import measure
from focal_det.benchmarks.memory import allocators, available_gib, on_cuda, tensors_mib

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = ("800x1216x80", "512x512x80", "800x1216x1203")
MODES = ("forward+backward", "forward")
MEDIUM, LARGE, MOST = 2**25, 2**29, 2**32  # bytes of logits
SECONDS = 12.0  # after which no further round of a case begins


class Disagreement(Exception):
    """A variant does not compute what it should."""


def main() -> int:
    """Run the command line; the exit status."""
    args = parse()
    rows: list[dict[str, Any]] = []
    try:
        with tqdm(total=count(args), unit="case", dynamic_ncols=True) as bar:
            for allocator in allocators(args.device):
                for shape, dtype in cases(args):
                    rows += run_case(args, shape, dtype, allocator, rows, bar)
    except Disagreement as failure:
        print(f"nothing is reported: {failure}", file=sys.stderr)
        return 1
    keys = ("shape", "dtype", "mode", "allocator")
    measure.add_ratio(rows, keys, lambda row: row["variant"] == "detectron2")
    measure.add_ratio(rows, keys, lambda row: row["variant"] == "copy", "floor_ratio")
    typed = measure.without_option(sys.argv[1:], "--output")
    record = measure.make_record("benchmark_losses", typed, args.device, args.seed, rows)
    print_table(rows)
    print(f"\nWritten: {measure.save(record, args.output)}")
    return 0


def images(args: argparse.Namespace, shape: losses.Shape) -> int:
    """N."""
    if args.images is not None:
        return int(args.images)
    return max(1, min(16, MOST // shape.s_bytes(1))) if on_cuda(args.device) else 1


def spared(args: argparse.Namespace, shape: losses.Shape) -> bool:
    """Whether only the essential is run at this shape."""
    return not (args.full or on_cuda(args.device)) and shape.s_bytes(images(args, shape)) > LARGE


def cases(args: argparse.Namespace) -> Iterator[tuple[losses.Shape, str]]:
    """What shares one set of inputs."""
    for shape in args.shapes:
        for dtype in args.dtypes:
            if dtype == "float32" or not spared(args, shape):
                yield shape, dtype


def count(args: argparse.Namespace) -> int:
    """Number of cases over all modes and allocators."""
    modes = [len(MODES[:1] if spared(args, shape) else MODES) for shape, _ in cases(args)]
    return sum(modes) * (1 if on_cuda(args.device) else 2)


def run_case(
    args: argparse.Namespace,
    shape: losses.Shape,
    dtype: str,
    allocator: str,
    earlier: list[dict[str, Any]],
    bar: Any,
) -> list[dict[str, Any]]:
    """Check and time all variants of one shape and dtype; the rows.

    Args:
        args: the command line.
        shape, dtype, allocator: the case.
        earlier: rows so far; what has failed there is not tried again.
        bar: progress.

    Raises:
        Disagreement: a variant is wrong.
    """
    bar.set_description(f"{allocator} {shape} {dtype}")
    common = {
        "part": "loss",
        "dtype": dtype,
        "shape": str(shape),
        "images": images(args, shape),
        "allocator": allocator,
    }
    inputs = losses.Inputs(shape, images(args, shape), DTYPES[dtype], args.seed, args.device)
    known = [row for row in earlier if (row["shape"], row["dtype"]) == (str(shape), dtype)]
    failures = {(r["loss"], r["variant"]): r["error"] for r in known if r["error"]}
    variants = list(make_variants(args, inputs, failures))
    if not known:
        bar.write(
            f"{shape}, {images(args, shape)} image(s): S = {mib(shape, args):.1f} MiB in float32"
        )
        check_all(args, inputs, variants, failures, bar)
    rows = []
    modes = MODES[:1] if spared(args, shape) else MODES
    for mode in modes:
        rows += time_all(args, inputs, variants, {**common, "mode": mode}, failures)
        bar.update()
    return rows


def mib(shape: losses.Shape, args: argparse.Namespace) -> float:
    """S in MiB."""
    return shape.s_bytes(images(args, shape)) / 2**20


def make_variants(
    args: argparse.Namespace, inputs: losses.Inputs, failures: dict[tuple[str, str], str]
) -> Iterator[losses.Variant]:
    """The variants to run; those that need more memory than there is become failures."""
    few = spared(args, inputs.shape)
    cheap = inputs.raw[0].dtype == torch.float32 and inputs.shape.s_bytes(inputs.images) <= MEDIUM
    impls = ["torch", *(["eager"] if args.full or on_cuda(args.device) or cheap else [])]
    if on_cuda(args.device):
        impls.append("triton")
    made = [
        losses.our_variant(inputs, setting, impl)
        for setting in ([losses.FOCAL] if few else args.losses)
        for impl in impls
    ]
    peers = losses.peer_variants(inputs, args.compile)
    made += peers[:1] if few else peers
    free = available_gib(args.device)
    s_gib = inputs.shape.s_bytes(inputs.images) / 2**30
    for variant in made:
        if variant.needs_s * s_gib > free:
            missing = f"skipped: needs {variant.needs_s * s_gib:.1f} GiB"
            failures.setdefault((variant.loss, variant.name), missing)
        yield variant
    if not few and losses.PEER_NEEDS * s_gib < free:
        yield losses.fvcore_variant(inputs)


def check_all(
    args: argparse.Namespace,
    inputs: losses.Inputs,
    variants: Sequence[losses.Variant],
    failures: dict[tuple[str, str], str],
    bar: Any,
) -> None:
    """Run each variant once against float64; what cannot run is added to the failures.

    Raises:
        Disagreement: a variant is wrong.
    """
    smallest = min(args.shapes, key=lambda shape: shape.s_bytes(1))
    impl = "eager" if inputs.shape == smallest else "torch"
    tolerance = losses.TOLERANCES[inputs.raw[0].dtype]
    for setting in dict.fromkeys(variant.loss for variant in variants):
        expected = losses.reference(inputs, setting, impl)
        for variant in variants:
            key = (variant.loss, variant.name)
            if variant.loss != setting or key in failures:
                continue
            bar.set_postfix_str(f"checking {variant.loss} {variant.name}")
            try:
                wrong = losses.disagreement(variant, expected, tolerance)
            except Exception as error:
                if variant.name == "torch":
                    raise
                failures[key] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                continue
            if wrong:
                raise Disagreement(f"{variant.loss}, {variant.name}, {inputs.shape}: {wrong}")
    bar.set_postfix_str("")


def time_all(
    args: argparse.Namespace,
    inputs: losses.Inputs,
    variants: Sequence[losses.Variant],
    common: dict[str, Any],
    failures: dict[tuple[str, str], str],
) -> list[dict[str, Any]]:
    """One row for each variant and floor."""
    calls = {
        (variant.loss, variant.name): variant.call(common["mode"])
        for variant in variants
        if (variant.loss, variant.name) not in failures
    }
    calls |= {("", name): call for name, call in losses.floor_calls(inputs).items()}
    cold = common["allocator"] == "cold"
    by_name = {" | ".join(key): call for key, call in calls.items()}
    timings = measure.measure(
        by_name,
        args.rounds,
        device=args.device,
        seconds=SECONDS,
        with_peak=on_cuda(args.device) or cold,
        queued=True,
    )
    rows = []
    for (loss, name), timing in zip(calls, timings.values(), strict=True):
        fields = timing.fields()
        peak = timing.peak_mib
        fields["peak_s"] = None if peak is None else peak / mib(inputs.shape, args)
        fields["tensors_s"] = fields["peak_s"]
        if not on_cuda(args.device):
            tensors = tensors_mib(calls[loss, name]) if cold else None
            fields["tensors_s"] = None if tensors is None else tensors / mib(inputs.shape, args)
        rows.append({**common, "loss": loss, "variant": name, **fields})
    for (loss, name), reason in failures.items():
        fields = {**measure.not_measured(reason), "peak_s": None, "tensors_s": None}
        rows.append({**common, "loss": loss, "variant": name, **fields})
    return rows


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """All rows on the console."""
    columns = ("shape", "dtype", "mode", "allocator", "loss", "variant")
    times = ("median_ms", "quartile_low_ms", "quartile_high_ms", "ratio")
    numbers = (*times, "peak_mib", "peak_s", "tensors_s")
    table = [[row[key] for key in (*columns, *numbers, "error")] for row in rows]
    head = (*columns, "ms", "25%", "75%", "/ detectron2", "peak MiB", "peak S", "tensors S", "")
    print("\n" + tabulate(table, head, floatfmt=".3g", missingval="-"))
    print("Detectron2's path is that of its focal loss: the ratio of other losses is to that, too.")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ends the program with a message where it cannot be carried out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="HxWxK")
    parser.add_argument("--losses", nargs="+", default=list(losses.SETTINGS), metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument(
        "--images",
        type=int,
        help="N; default 1 on the CPU, 16 on a GPU or as many as have logits of 4 GiB",
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the peers, too")
    parser.add_argument("--full", action="store_true", help="spare the CPU nothing")
    parser.add_argument(
        "--quick", action="store_true", help="one tiny shape, two rounds, all paths"
    )
    parser.add_argument("--output", type=Path, help="folder; default tools/results")
    args = parser.parse_args(argv)
    # A quick run says nothing of performance: it must not replace a record that does.
    args.output = args.output or ROOT / ("output/benchmarks" if args.quick else "tools/results")
    if args.quick:
        args.shapes, args.rounds, args.full = ["64x96x5"], 2, True
    try:
        args.shapes = [losses.Shape(*(int(x) for x in shape.split("x"))) for shape in args.shapes]
    except (TypeError, ValueError):
        parser.error(f"--shapes must be HEIGHTxWIDTHxCLASSES, got {' '.join(args.shapes)}")
    numbers = [args.rounds, *itertools.chain(*args.shapes)]
    if min(numbers) < 1 or (args.images is not None and args.images < 1):
        parser.error("--images, --rounds and the numbers of --shapes must be 1 or more")
    unknown = [name for name in args.losses if name not in losses.SETTINGS]
    if unknown:
        parser.error(f"--losses must be among {', '.join(losses.SETTINGS)}; got {unknown[0]!r}")
    return args


if __name__ == "__main__":
    sys.exit(main())
