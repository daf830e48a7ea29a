"""Running the tests in an environment, and what came of it: counts, and failures of known cause."""

import fnmatch
import re
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, NamedTuple

from .combinations import OLD_TORCH, ROOT, Combination
from .environments import Environment, clean

ENTRY_POINTS = "tests/test_entry_points.py"
SELECTION = (
    "tests/test_config.py",
    "tests/test_configs.py",
    "tests/kernels/test_blocks.py",
    "tests/kernels/test_sums.py",
    "tests/engine",
    "tests/losses",
    "tests/modeling",
    f"{ENTRY_POINTS}::test_both_import_orders",
    f"{ENTRY_POINTS}::test_stock_script_trains_with_each_loss[FocalLoss]",
    f"{ENTRY_POINTS}::test_two_processes_train[stock]",
    f"{ENTRY_POINTS}::test_our_script_trains_resumes_and_evaluates",
    f"{ENTRY_POINTS}::test_our_script_trains_a_lazy_config",
    # Minutes, and nothing that a version would change.
    "--ignore=tests/modeling/test_sync.py",
    "--ignore=tests/modeling/test_many_workers.py",
)
QUICK = (
    "tests/modeling/test_parity.py",
    f"{ENTRY_POINTS}::test_both_import_orders",
    f"{ENTRY_POINTS}::test_our_script_trains_resumes_and_evaluates",
)
HOURS = 2.0  # after which the tests of one combination are stopped


class Breakage(NamedTuple):
    """A failure that is not focal_det's, and what cures it.

    Attributes:
        where: pattern of the names of the combinations that have it; elsewhere it is a failure.
        pattern: regular expression of what pytest says.
        cause: for people.
        cure: for people.
    """

    where: str
    pattern: str
    cause: str
    cure: str


OLD_DETECTRON2 = "*-detectron2-0.6*"
OLD_PYTORCH = f"*-torch{OLD_TORCH.torch}-*"


KNOWN = (
    Breakage(
        OLD_DETECTRON2,
        r"module 'PIL\.Image' has no attribute 'LINEAR'",
        "Detectron2 0.6 uses `Image.LINEAR`, which Pillow 10 dropped",
        "pip install 'pillow<10'",
    ),
    Breakage(
        OLD_DETECTRON2,
        r"module 'numpy' has no attribute '(int|bool|float|str)'",
        "Detectron2 0.6 uses `np.int` and `np.bool`, which NumPy 1.24 dropped",
        "pip install 'numpy<1.24'",
    ),
    Breakage(
        OLD_DETECTRON2,
        r"num_channels( \(1\))? must be divisible by num_groups",
        "Detectron2 0.6's RetinaNetHead cannot be built with GN",
        "a newer Detectron2",
    ),
    Breakage(
        OLD_DETECTRON2,
        r"No module named 'caffe2'",
        "Detectron2 0.6's `export` imports caffe2, which PyTorch no longer ships",
        "a newer Detectron2",
    ),
    Breakage(
        OLD_DETECTRON2,
        r"cuda is not available\. Please check your installation",
        "Detectron2 0.6 starts several processes on GPUs only",
        "a newer Detectron2",
    ),
    Breakage(
        OLD_PYTORCH,
        r"not implemented for 'Half'",
        "this PyTorch lacks float16 operations on CPUs",
        "a newer PyTorch",
    ),
    Breakage(
        OLD_PYTORCH,
        r"dets should have the same type as scores",
        "this torchvision's NMS refuses bfloat16 scores",
        "a newer torchvision",
    ),
    Breakage(
        "*",
        r"No module named 'pkg_resources'",
        "`detectron2.model_zoo` imports pkg_resources, which setuptools 82 dropped",
        "pip install 'setuptools<82'",
    ),
)


class Counts(NamedTuple):
    """How tests went; `failures` are names and what was printed."""

    passed: int
    skipped: int
    failures: tuple[tuple[str, str], ...]


def run_tests(
    combination: Combination, layer: Environment, quick: bool, workers: str, log: Path
) -> dict[str, Any]:
    """Run the chosen tests in an environment.

    Args:
        combination: what is tested.
        layer: its environment.
        quick: whether to run only a handful.
        workers: processes of pytest, a number or ``"auto"``.
        log: for what is printed; pytest's report goes beside it.

    Returns:
        The fields of a record that tell how they went.
    """
    report = log.with_suffix(".xml")
    report.unlink(missing_ok=True)
    options = ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    options += ["--numprocesses", workers]
    command: list[Any] = [layer.python, "-m", "pytest", *options, f"--junitxml={report}"]
    command += QUICK if quick else SELECTION
    begin, ended = time.monotonic(), ""
    with log.open("a", encoding="utf-8") as stream:
        try:
            status = subprocess.run(
                command, cwd=ROOT, env=clean(), stdout=stream, stderr=subprocess.STDOUT,
                timeout=HOURS * 3600,
            ).returncode  # fmt: skip
            ended = f"pytest ended with status {status}" if status not in (0, 1) else ""
        except subprocess.TimeoutExpired:
            ended = f"the tests did not end in {HOURS} hours"
    counts = count(report) if report.is_file() else Counts(0, 0, ())
    if ended and not counts.failures:
        counts = counts._replace(failures=((ended, log.read_text(encoding="utf-8")),))
    return {**conclude(combination, counts), "seconds": round(time.monotonic() - begin, 1)}


def count(report: Path) -> Counts:
    """Read pytest's JUnit file."""
    passed = skipped = 0
    failures = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        wrong = [part for part in case if part.tag in ("failure", "error")]
        if wrong:
            file = case.get("classname", "").replace(".", "/")
            name = f"{file}.py::{case.get('name')}" if file else str(case.get("name"))
            text = "\n".join(f"{part.get('message')}\n{part.text}" for part in wrong)
            failures.append((name, text))
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return Counts(passed, skipped, tuple(failures))


def conclude(combination: Combination, counts: Counts) -> dict[str, Any]:
    """The fields of a record from how tests went."""
    here = [breakage for breakage in KNOWN if fnmatch.fnmatch(combination.name, breakage.where)]
    found = [
        [known for known in here if re.search(known.pattern, text)] for _, text in counts.failures
    ]
    known = [breakage for breakage in here if any(breakage in some for some in found)]
    return {
        "status": "passed" if not found else "known" if all(found) else "failed",
        "passed": counts.passed,
        "failed": len(counts.failures),
        "skipped": counts.skipped,
        "failures": [name for name, _ in counts.failures],
        "known": [{"cause": breakage.cause, "cure": breakage.cure} for breakage in known],
    }


def doctor(layer: Environment) -> str:
    """What ``python -m focal_det.doctor`` prints in an environment."""
    command = [str(layer.python), "-m", "focal_det.doctor"]
    done = subprocess.run(command, cwd=ROOT, env=clean(), capture_output=True, text=True)
    return done.stdout
