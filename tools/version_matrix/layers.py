"""The environments with one Detectron2 each, on top of those with everything else."""

import json
import os
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from .combinations import DETECTRON2, ROOT, Combination
from .environments import Environment, NotMade, at, call, clean, making

DETECTRON2_URL = "https://github.com/facebookresearch/detectron2"
SDIST = (
    "pb1-detectron2==0.6 "
    "--hash=sha256:5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
)
WHEEL = ROOT / "requirements" / "detectron2.txt"
# How Detectron2 0.6 imports its compiled part, and how its main branch does.
UNGUARDED = "\nfrom detectron2 import _C\n"
GUARDED = "\ntry:\n    from detectron2 import _C\nexcept ImportError:\n    _C = None\n"
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


@dataclass(frozen=True)
class Source:
    """A Detectron2 to install.

    Attributes:
        folder: a checkout, or an unpacked sdist; None for the wheel, which pip installs.
        label: where it is from, for people.
    """

    folder: Path | None
    label: str


def get_source(
    combination: Combination, repository: str, base: Environment, cache: Path, log: Path
) -> Source:
    """Where the Detectron2 of a combination is installed from.

    Args:
        combination: what to test.
        repository: folder or address, for the main branch.
        base: the environment with everything else.
        cache: where downloads are kept.
        log: for the output of commands.

    Raises:
        NotMade: it cannot be had.
    """
    kind = DETECTRON2[combination.detectron2].source
    if kind == "wheel":
        name = re.search(r"^([\w-]+)==(\S+)", WHEEL.read_text(encoding="utf-8"), re.M)
        assert name is not None
        return Source(None, f"PyPI wheel {name.group(1)} {name.group(2)}")
    folder = cache / "sources" / kind
    if kind == "sdist":
        get_sdist(folder, base, log)
        return Source(folder, "PyPI sdist " + SDIST.split(" ")[0].replace("==", " "))
    if not (Path(repository) / "detectron2" / "__init__.py").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        call(["git", "clone", "--depth", "1", repository, folder], log)
    else:
        folder = Path(repository)
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
