"""Run a part of the tests with other versions of Python, PyTorch and Detectron2, and record it.

    python tools/test_matrix.py                               # all that this machine can make
    python tools/test_matrix.py --list
    python tools/test_matrix.py --only 'py3.12-*' '*-detectron2-main'
    python tools/test_matrix.py --quick                       # a handful of tests of each
    python tools/test_matrix.py --detectron2-source ../detectron2

Each pair of Python and PyTorch gets a virtual environment in CACHE (3 to 6 GB; --prune removes it
after use) with everything but Detectron2. Where this tool runs in such a pair, its own environment
serves. Each Detectron2 gets a small environment on top, whose packages come before those of the
larger one. What was imported is asked in a process of that environment, and a combination whose
Detectron2 is not its own is an error.

Detectron2 is installed as Python only, but for main-built, which is built here. 0.6 insists on its
compiled part: the import is guarded as in the main branch, and pycocotools takes the place of its
COCO evaluation.

Writes OUTPUT/<Python and PyTorch>/detectron2-<version>.json; `make docs` makes the README's table.
"""

import argparse
import contextlib
import datetime
import fnmatch
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from tqdm import tqdm

from focal_det.analysis import records

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
DETECTRON2_URL = "https://github.com/facebookresearch/detectron2"
SDIST = (
    "pb1-detectron2==0.6 "
    "--hash=sha256:5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
)
WHEEL = ROOT / "requirements" / "detectron2.txt"
EXTRAS = ("", "detectron2-deps")
TEST_TOOLS = ("hypothesis", "pytest", "pytest-xdist")
ENTRY_POINTS = "tests/test_entry_points.py"
SELECTION = (
    "tests/test_config.py",
    "tests/test_configs.py",
    "tests/kernels/test_blocks.py",
    "tests/kernels/test_sums.py",
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
# How Detectron2 0.6 imports its compiled part, and how its main branch does.
UNGUARDED = "\nfrom detectron2 import _C\n"
GUARDED = "\ntry:\n    from detectron2 import _C\nexcept ImportError:\n    _C = None\n"
HOURS = 2.0  # after which the tests of one combination are stopped


class Torch(NamedTuple):
    """A release of PyTorch.

    Attributes:
        torch: its version.
        torchvision: the version that fits it.
        pins: what is installed beside it, older than pip would choose.
    """

    torch: str
    torchvision: str
    pins: tuple[str, ...] = ()


OLD_TORCH = Torch("2.1.2", "0.16.2", ("numpy<2",))


class Detectron2(NamedTuple):
    """A Detectron2 to test with.

    Attributes:
        source: ``"sdist"``, ``"wheel"`` or ``"git"``.
        label: of the table.
        pins: what is installed beside it, older than pip would choose.
        compiled: whether its compiled part is built, for which a C++ compiler is needed.
    """

    source: str
    label: str
    pins: tuple[str, ...] = ()
    compiled: bool = False


# The first two dropped names that 0.6 uses; of the others, the newest need a newer NumPy.
OLD_PINS = ("numpy<1.24", "pillow<10", "matplotlib", "opencv-python-headless", "pycocotools")
DETECTRON2 = {
    "0.6": Detectron2("sdist", "0.6, NumPy and Pillow of its time", OLD_PINS),
    "0.6-unpinned": Detectron2("sdist", "0.6, newest NumPy and Pillow"),
    "0.7.2": Detectron2("wheel", "0.7.2, the wheel that `make` installs"),
    "main": Detectron2("git", "main, Python only"),
    "main-built": Detectron2("git", "main, built", compiled=True),
}


class Breakage(NamedTuple):
    """A failure that is not focal_det's, and what cures it."""

    pattern: str
    cause: str
    cure: str


KNOWN = (
    Breakage(
        r"module 'PIL\.Image' has no attribute 'LINEAR'",
        "Detectron2 0.6 uses `Image.LINEAR`, which Pillow 10 dropped",
        "pip install 'pillow<10'",
    ),
    Breakage(
        r"module 'numpy' has no attribute '(int|bool|float|str)'",
        "Detectron2 0.6 uses `np.int` and `np.bool`, which NumPy 1.24 dropped",
        "pip install 'numpy<1.24'",
    ),
    Breakage(
        r"num_channels( \(1\))? must be divisible by num_groups",
        "Detectron2 0.6's RetinaNetHead cannot be built with GN",
        "a newer Detectron2",
    ),
    Breakage(
        r"No module named 'caffe2'",
        "Detectron2 0.6's `export` imports caffe2, which PyTorch no longer ships",
        "a newer Detectron2",
    ),
    Breakage(
        r"cuda is not available\. Please check your installation",
        "Detectron2 0.6 starts several processes on GPUs only",
        "a newer Detectron2",
    ),
    Breakage(
        r"not implemented for 'Half'",
        "this PyTorch lacks float16 operations on CPUs",
        "a newer PyTorch",
    ),
    Breakage(
        r"dets should have the same type as scores",
        "this torchvision's NMS refuses bfloat16 scores",
        "a newer torchvision",
    ),
    Breakage(
        r"No module named 'pkg_resources'",
        "`detectron2.model_zoo` imports pkg_resources, which setuptools 82 dropped",
        "pip install 'setuptools<82'",
    ),
)

PROBE = """
import importlib, importlib.util, json, platform
versions = {"python": platform.python_version()}
for name in ("torch", "torchvision", "detectron2", "numpy", "PIL", "fvcore"):
    versions[name] = str(importlib.import_module(name).__version__)
try:
    importlib.import_module("detectron2._C")
    versions["detectron2._C"] = "compiled"
except ImportError:
    versions["detectron2._C"] = "absent"
paths = {name: importlib.util.find_spec(name).origin for name in ("detectron2", "focal_det")}
print(json.dumps({"versions": versions, "paths": paths}))
"""


class NotMade(Exception):
    """A combination cannot be made on this machine; the message says why."""


@dataclass(frozen=True)
class Combination:
    """What is tested together.

    Attributes:
        python: minor release, such as ``"3.11"``.
        torch: release of PyTorch.
        detectron2: a key of :data:`DETECTRON2`.
    """

    python: str
    torch: str
    detectron2: str

    @property
    def pair(self) -> str:
        """Name of the environment that combinations of this Python and PyTorch share."""
        return f"py{self.python}-torch{self.torch}"

    @property
    def name(self) -> str:
        """Name on the command line."""
        return f"{self.pair}-detectron2-{self.detectron2}"


@dataclass(frozen=True)
class Environment:
    """A virtual environment: its interpreter and the folder of its packages."""

    python: Path
    site: Path


@dataclass(frozen=True)
class Source:
    """A Detectron2 to install.

    Attributes:
        folder: a checkout, or an unpacked sdist; None for the wheel, which pip installs.
        label: where it is from, for people.
    """

    folder: Path | None
    label: str


def main() -> int:
    """Run the command line; 1 if a combination fails for a reason that is not known, else 0."""
    args = parse()
    if args.list:
        print("\n".join(combination.name for combination in args.chosen))
        return 0
    found = interpreters(args.python)
    made = []
    with tqdm(args.chosen, unit="combination", dynamic_ncols=True) as bar:
        for index, combination in enumerate(bar):
            record = try_combination(args, combination, found, bar)
            save(record, args.output)
            bar.write(f"{combination.name}: {result(record)}")
            made.append(record)
            last = args.chosen[index + 1 : index + 2]
            if args.prune and not (last and last[0].pair == combination.pair):
                shutil.rmtree(args.cache / combination.pair, ignore_errors=True)
    print("\n" + render(made))
    print(f"Written below {args.output}; what was printed meanwhile is in {args.cache / 'logs'}.")
    return int(any(record["status"] == "failed" for record in made))


def combinations() -> list[Combination]:
    """All, those that share an environment one after another."""
    newest, every = newest_torch().torch, ("0.6", "0.7.2", "main")
    made = [Combination(PYTHONS[0], OLD_TORCH.torch, name) for name in every]
    made += [Combination(python, newest, name) for python in PYTHONS for name in every]
    at = made.index(Combination("3.11", newest, "0.6"))
    made.insert(at + 1, Combination("3.11", newest, "0.6-unpinned"))
    made.insert(at + 4, Combination("3.11", newest, "main-built"))
    return made


def newest_torch() -> Torch:
    """The pair that requirements/torch.txt pins."""
    text = (ROOT / "requirements" / "torch.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^(torch|torchvision)==(\S+)", text, re.M))
    return Torch(pins["torch"], pins["torchvision"])


def interpreters(given: Sequence[Path]) -> dict[str, Path]:
    """A working interpreter for each of :data:`PYTHONS` that has one.

    Looks at `given`, then in PATH, then where pyenv and uv keep theirs.
    """
    home = Path.home()
    pyenv = Path(os.environ.get("PYENV_ROOT", home / ".pyenv")) / "versions"
    candidates = list(given)
    for version in reversed(PYTHONS):
        on_path = shutil.which(f"python{version}")
        candidates += [Path(on_path)] if on_path else []
        candidates += sorted(pyenv.glob(f"{version}.*/bin/python{version}"), reverse=True)
        kept = home / ".local" / "share" / "uv" / "python"
        candidates += sorted(kept.glob(f"cpython-{version}.*/bin/python{version}"), reverse=True)
    found: dict[str, Path] = {}
    ask = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates:
        done = subprocess.run([candidate, "-c", ask], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found.setdefault(done.stdout.strip(), candidate)
    return found


def try_combination(
    args: argparse.Namespace, combination: Combination, found: Mapping[str, Path], bar: Any
) -> dict[str, Any]:
    """Make a combination, test it, and tell what came of it.

    Args:
        args: the command line.
        combination: what to try.
        found: interpreters by minor release.
        bar: progress.

    Returns:
        A record.
    """
    log = args.cache / "logs" / f"{combination.name}.txt"
    os.makedirs(log.parent, exist_ok=True)
    log.write_text("")
    record = empty_record(args, combination)
    try:
        bar.set_description(f"{combination.name}: packages")
        base = make_base(combination, found, args.cache, log)
        bar.set_description(f"{combination.name}: Detectron2")
        source = get_source(args, combination, base, log)
        record["detectron2_from"] = source.label
        layer = make_layer(combination, base, source, args.cache, log)
        record["versions"] = probe(layer, log)
    except NotMade as reason:
        return {**record, "status": "not made", "reason": str(reason)}
    bar.set_description(f"{combination.name}: tests")
    record |= run_tests(args, layer, log)
    advice = doctor(layer)
    for breakage in record["known"]:
        breakage["doctor"] = breakage["cure"] in advice
    return record


def empty_record(args: argparse.Namespace, combination: Combination) -> dict[str, Any]:
    """A record of what has not run yet."""
    commit = records.commit()
    return {
        "schema": SCHEMA,
        **asdict(combination),
        "status": "not made",
        "reason": None,
        "detectron2_from": None,
        "versions": None,
        "selection": "quick" if args.quick else "full",
        **dict.fromkeys(("passed", "failed", "skipped", "seconds")),
        "failures": [],
        "known": [],
        "commit": commit.removesuffix("-dirty") if commit else None,
        "dirty": bool(commit and commit.endswith("-dirty")),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def make_base(
    combination: Combination, found: Mapping[str, Path], cache: Path, log: Path
) -> Environment:
    """The environment with everything but Detectron2.

    Raises:
        NotMade: no interpreter, or pip fails.
    """
    newest = newest_torch()
    torch = newest if combination.torch == newest.torch else OLD_TORCH
    here = f"{sys.version_info.major}.{sys.version_info.minor}", release("torch")
    if here == (combination.python, torch.torch):
        return Environment(Path(sys.executable), Path(sysconfig.get_path("purelib")))
    if combination.python not in found:
        raise NotMade(f"there is no Python {combination.python} on this machine")
    wanted = [f"torch=={torch.torch}", f"torchvision=={torch.torchvision}", *torch.pins]
    wanted += [*dependencies(combination.python), *TEST_TOOLS]
    folder = cache / combination.pair / "base"
    with making(folder, wanted) as needed:
        if needed:
            call([found[combination.python], "-m", "venv", folder], log)
            environment = at(folder)
            if torch == newest:
                link_cuda(environment.site)
            call([environment.python, "-m", "pip", "install", *wanted], log)
    return at(folder)


@contextlib.contextmanager
def making(folder: Path, recipe: Sequence[str]) -> Iterator[bool]:
    """Make a folder unless a finished one of the same recipe is there.

    Args:
        folder: emptied first where it has to be made.
        recipe: what it is made of.

    Yields:
        Whether it has to be made.
    """
    stamp = folder / ".recipe"
    text = "\n".join(recipe)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == text:
        yield False
        return
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder.parent, exist_ok=True)
    yield True
    stamp.write_text(text, encoding="utf-8")  # last: a half-made folder has none


def at(folder: Path) -> Environment:
    """The environment in a folder."""
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = folder / scripts / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Environment(
        python, Path(subprocess.check_output([python, "-c", ask], text=True).strip())
    )


def release(distribution: str) -> str:
    """Installed version here, without the part that names a build."""
    return importlib.metadata.version(distribution).split("+")[0]


def dependencies(python: str) -> list[str]:
    """What focal_det and Detectron2 need, as focal_det's metadata say it, without PyTorch."""
    wanted = []
    for text in importlib.metadata.requires("focal_det") or ():
        requirement = Requirement(text)
        marker, requirement.marker = requirement.marker, None
        chosen = [
            marker is None or marker.evaluate({"extra": extra, "python_version": python})
            for extra in EXTRAS
        ]
        if any(chosen) and requirement.name not in ("torch", "torchvision"):
            wanted.append(str(requirement))
    return wanted


def link_cuda(site: Path) -> None:
    """Link the CUDA libraries of this environment's torch into another environment.

    They are several gigabytes and the same for every Python. Where this torch has none, nothing is
    linked.
    """
    for distribution in importlib.metadata.distributions():
        if not distribution.metadata["Name"].startswith("nvidia-"):
            continue
        for top in {Path(file).parts[0] for file in distribution.files or ()}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))


def get_source(
    args: argparse.Namespace, combination: Combination, base: Environment, log: Path
) -> Source:
    """Where the Detectron2 of a combination is installed from.

    Raises:
        NotMade: it cannot be had.
    """
    kind = DETECTRON2[combination.detectron2].source
    if kind == "wheel":
        name = re.search(r"^([\w-]+)==(\S+)", WHEEL.read_text(encoding="utf-8"), re.M)
        assert name is not None
        return Source(None, f"PyPI wheel {name.group(1)} {name.group(2)}")
    folder = args.cache / "sources" / kind
    if kind == "sdist":
        get_sdist(folder, base, log)
        return Source(folder, "PyPI sdist " + SDIST.split(" ")[0].replace("==", " "))
    if not (Path(args.detectron2_source) / "detectron2" / "__init__.py").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        call(["git", "clone", "--depth", "1", args.detectron2_source, folder], log)
    else:
        folder = Path(args.detectron2_source)
    commit = subprocess.run(
        ["git", "-C", folder, "log", "-1", "--format=%h of %cs"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return Source(folder, f"git {commit or 'without a commit'}")


def get_sdist(folder: Path, base: Environment, log: Path) -> None:
    """Download and unpack the sdist.

    Raises:
        NotMade: pip fails.
    """
    with making(folder, [SDIST]) as needed:
        if not needed:
            return
        os.makedirs(folder)
        pinned = folder / "requirements.txt"
        pinned.write_text(SDIST + "\n", encoding="utf-8")
        # Its setup.py, which pip asks for the metadata, imports torch.
        options = ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "--require-hashes"]
        command = [base.python, "-m", "pip", "download", *options, "-r", pinned, "-d", folder]
        call(command, log)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (unpacked,) = folder.glob("*/setup.py")
        for path in list(unpacked.parent.iterdir()):
            path.rename(folder / path.name)


def make_layer(
    combination: Combination, base: Environment, source: Source, cache: Path, log: Path
) -> Environment:
    """The environment with Detectron2, which finds everything else in the larger one.

    Raises:
        NotMade: pip fails.
    """
    kind = DETECTRON2[combination.detectron2]
    folder = cache / combination.pair / f"detectron2-{combination.detectron2}"
    recipe = [source.label, str(source.folder), *kind.pins, str(base.site), str(ROOT)]
    with making(folder, recipe) as needed:
        if needed:
            call([base.python, "-m", "venv", "--without-pip", folder], log)
            layer = at(folder)
            pip = [base.python, "-m", "pip", "install", "--target", layer.site]
            if source.folder is None:
                options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.10"]
                call([*pip, *options, "--require-hashes", "-r", WHEEL], log)
            elif kind.compiled:
                copy = folder / "source"  # a build leaves files behind
                shutil.copytree(source.folder, copy, symlinks=True)
                call([*pip, "--no-deps", "--no-build-isolation", copy], log)
            else:
                copy_python(source.folder, layer.site)
            if kind.pins:
                call([*pip, "--only-binary=:all:", *kind.pins], log)
            # The checkout first: an installed focal_det must not be tested in its place.
            lines = f"{ROOT}\n{base.site}\n"
            (layer.site / "focal_det_matrix.pth").write_text(lines, encoding="utf-8")
    return at(folder)


def copy_python(checkout: Path, site: Path) -> None:
    """Install a Detectron2 from its files, without its compiled part."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "csrc")
    package = site / "detectron2"
    shutil.copytree(checkout / "detectron2", package, ignore=ignore)
    shutil.copytree(checkout / "tools", site / "tools", ignore=ignore)
    if (checkout / "configs").is_dir():
        zoo = package / "model_zoo" / "configs"
        shutil.copytree(checkout / "configs", zoo, ignore=ignore, dirs_exist_ok=True)
    for path in package.glob("layers/*.py"):
        text = path.read_text(encoding="utf-8")
        if UNGUARDED in text:
            path.write_text(text.replace(UNGUARDED, GUARDED), encoding="utf-8")
    evaluation = (package / "evaluation" / "coco_evaluation.py").read_text(encoding="utf-8")
    if "COCOeval_opt = COCOeval" not in evaluation:
        fast = "from pycocotools.cocoeval import COCOeval as COCOeval_opt\n"
        (package / "evaluation" / "fast_eval_api.py").write_text(fast, encoding="utf-8")


def call(command: Sequence[Any], log: Path) -> None:
    """Run a command, its output going to the end of a file.

    Raises:
        NotMade: it fails.
    """
    words = [str(word) for word in command]
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    try:
        done = subprocess.run(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
    except FileNotFoundError:
        raise NotMade(f"{words[0]} is not installed") from None
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {shlex.join(words)}\n{done.stdout}\n")
    if done.returncode:
        raise NotMade(why(words, done.stdout))


def why(words: Sequence[str], output: str) -> str:
    """What to say of a command that failed; names neither folders nor hosts."""
    missing = re.findall(r"No matching distribution found for (.+)", output)
    if missing:
        return f"pip finds no {missing[-1].split(' (')[0]} for this Python and platform"
    if "No space left" in output:
        return "the disk is full"
    if words[0] == "git":
        return "Detectron2's repository cannot be reached"
    if "venv" in words:
        return "this Python cannot make a virtual environment"
    return "pip fails, see the log"


def probe(layer: Environment, log: Path) -> dict[str, str]:
    """Versions of what a process of an environment imports.

    Raises:
        NotMade: something cannot be imported.
        RuntimeError: Detectron2 or focal_det come from elsewhere.
    """
    done = subprocess.run(
        [layer.python, "-c", PROBE], cwd=ROOT, env=clean(), capture_output=True, text=True
    )
    if done.returncode:
        log.write_text(log.read_text("utf-8") + done.stdout + done.stderr, encoding="utf-8")
        raise NotMade(f"an import fails: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    expected = {"detectron2": layer.site, "focal_det": ROOT}
    for name, folder in expected.items():
        if not Path(found["paths"][name]).is_relative_to(folder):
            raise RuntimeError(f"{name} was imported from {found['paths'][name]}, not {folder}")
    versions: dict[str, str] = found["versions"]
    return versions


def clean() -> dict[str, str]:
    """The environment variables of this process but those that change what is imported."""
    unwanted = ("PYTHONPATH", "PYTHONHOME", "DETECTRON2_ENV_MODULE", "FOCAL_DET_PLUGINS")
    return {name: value for name, value in os.environ.items() if name not in unwanted}


def run_tests(args: argparse.Namespace, layer: Environment, log: Path) -> dict[str, Any]:
    """Run the chosen tests in an environment.

    Returns:
        The fields of a record that tell how they went.
    """
    report = log.with_suffix(".xml")
    report.unlink(missing_ok=True)
    options = ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    options += ["--numprocesses", args.workers]
    command: list[Any] = [layer.python, "-m", "pytest", *options, f"--junitxml={report}"]
    command += QUICK if args.quick else SELECTION
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
    return {**conclude(counts), "seconds": round(time.monotonic() - begin, 1)}


class Counts(NamedTuple):
    """How tests went; `failures` are names and what was printed."""

    passed: int
    skipped: int
    failures: tuple[tuple[str, str], ...]


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


def conclude(counts: Counts) -> dict[str, Any]:
    """The fields of a record from how tests went."""
    found = [
        [known for known in KNOWN if re.search(known.pattern, text)] for _, text in counts.failures
    ]
    known = [breakage for breakage in KNOWN if any(breakage in some for some in found)]
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


def save(record: dict[str, Any], folder: Path) -> Path:
    """Write a record in the place of an earlier one of its combination.

    Returns:
        The file.
    """
    combination = Combination(*(record[name] for name in ("python", "torch", "detectron2")))
    path = folder / combination.pair / f"detectron2-{combination.detectron2}.json"
    os.makedirs(path.parent, exist_ok=True)
    records.save(record, path)
    return path


def load_all(folder: Path) -> list[dict[str, Any]]:
    """All records below a folder.

    Raises:
        ValueError: one is of another schema; the file is named.
    """
    found = []
    for path in sorted(folder.glob("*/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("schema") != SCHEMA:
            raise ValueError(f"{path}: schema {record.get('schema')}, known is {SCHEMA}")
        found.append(record)
    return found


def render(found: Iterable[dict[str, Any]]) -> str:
    """A Markdown table of records, and a line that says when and on what they were made."""
    order = list(DETECTRON2)
    rows = sorted(
        found,
        key=lambda record: (
            numbers(record["python"]), numbers(record["torch"]), order.index(record["detectron2"]),
        ),
    )  # fmt: skip
    lines = [
        "| Python | PyTorch | Detectron2 | NumPy | Pillow | tests |",
        "|---|---|---|---|---|---|",
    ]
    for record in rows:
        versions = record["versions"] or {}
        cells = [
            versions.get("python", record["python"]),
            versions.get("torch", record["torch"]),
            detectron2_cell(record),
            *(versions.get(name, "") for name in ("numpy", "PIL")),
            result(record),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if not rows:
        return "Nothing has been run yet.\n"
    machines = sorted({record["machine"] for record in rows})
    dates = sorted({record["date"] for record in rows})
    commits = sorted({str(record["commit"]) for record in rows})
    changed = " with changes" if any(record["dirty"] for record in rows) else ""
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    where = f"{', '.join(machines)} at commit {', '.join(commits)}{changed}"
    return "\n".join([*lines, "", f"Run {when} on {where}."]) + "\n"


def numbers(version: str) -> tuple[int, ...]:
    """A version as numbers, for sorting."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def detectron2_cell(record: dict[str, Any]) -> str:
    """Which Detectron2, and where it is from."""
    label = DETECTRON2[record["detectron2"]].label
    source = record["detectron2_from"] or ""
    return f"{label}, {source}" if source.startswith("git") else label


def result(record: dict[str, Any]) -> str:
    """What came of a combination, in a few words."""
    if record["status"] == "not made":
        return f"not made: {record['reason']}"
    skipped = f", {record['skipped']} skipped" if record["skipped"] else ""
    if record["status"] == "passed":
        return f"{record['passed']} passed{skipped}"
    counts = f"{record['failed']} failed, {record['passed']} passed{skipped}"
    text = f"**{counts}**"
    causes = [f"{known['cause']}: {quoted(known['cure'])}" for known in record["known"]]
    return "; ".join([text, *causes])


def quoted(cure: str) -> str:
    """A command as code, words as they are."""
    return f"`{cure}`" if cure.startswith("pip ") else cure


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ends the program with a message where it cannot be carried out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the combinations' names")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of names")
    parser.add_argument("--quick", action="store_true", help="a handful of tests")
    parser.add_argument(
        "--python", nargs="+", type=Path, default=[], metavar="PATH", help="further interpreters"
    )
    parser.add_argument("--detectron2-source", default=DETECTRON2_URL, metavar="PATH_OR_GIT_URL")
    parser.add_argument("--workers", default="auto", help="processes of pytest; 0 for none")
    parser.add_argument(
        "--prune", action="store_true", help="remove each environment after its last combination"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / ".matrix", help="default .matrix")
    parser.add_argument("--output", type=Path, help="folder; default tools/results/matrix")
    args = parser.parse_args(argv)
    # A quick run must not replace a record of a full one.
    quick = ROOT / "output" / "matrix"
    args.output = args.output or (quick if args.quick else ROOT / "tools" / "results" / "matrix")
    args.cache = args.cache.resolve()
    args.chosen = [
        combination
        for combination in combinations()
        if any(fnmatch.fnmatch(combination.name, pattern) for pattern in args.only)
    ]
    if not args.chosen:
        parser.error(f"--only {' '.join(args.only)}: no combination is of this name; see --list")
    return args


if __name__ == "__main__":
    sys.exit(main())
