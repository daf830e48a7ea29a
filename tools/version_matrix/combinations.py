"""What is tested with what: releases of Python and PyTorch, and Detectron2 from several places."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


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
