"""The doctor: a clean bill here, and remedies where something is missing."""

import builtins
import subprocess
import sys

import pytest

from focal_det import doctor


def test_this_installation_is_ready(capsys):
    assert doctor.main() == 0
    output = capsys.readouterr().out
    assert "Ready to train." in output
    assert "MEND" not in output


@pytest.fixture
def without(monkeypatch):
    """A function that makes the import of a module fail as if it were not installed."""

    def remove(*names):
        real = builtins.__import__

        def fake(name, *args, **kwargs):
            if name.split(".")[0] in names:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", fake)
        monkeypatch.setattr(
            doctor.importlib, "import_module", lambda name: fake(name) and sys.modules[name]
        )

    return remove


@pytest.mark.parametrize("variable", ["FOCAL_DET_DATASETS", "FOCAL_DET_PLUGINS"])
def test_a_wrong_environment_variable_is_named(monkeypatch, capsys, variable):
    monkeypatch.setenv(variable, "nowhere:a.json:b" if "DATA" in variable else "nowhere.py")
    assert doctor.main() == 1
    output = capsys.readouterr().out
    assert f"mend or unset {variable}" in output
    assert "nowhere" in output


@pytest.mark.parametrize(
    ("module", "remedy"),
    [
        ("torch", "pip install torch==2.14.1 torchvision==0.29.1"),
        ("detectron2", "--require-hashes -r requirements/detectron2.txt"),
        ("yacs", "pip install yacs"),
        ("hydra", "pip install hydra-core"),
    ],
)
def test_what_is_missing_comes_with_its_command(without, capsys, module, remedy):
    without(module)
    assert doctor.main() == 1
    output = capsys.readouterr().out
    assert remedy in output
    assert "Mend first: " in output


def test_a_torchvision_for_another_torch_is_found(monkeypatch, capsys):
    import torchvision

    def broken(*args):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(torchvision.ops, "nms", broken)
    assert doctor.main() == 1
    assert "does not fit torch" in capsys.readouterr().out


def test_optional_parts_do_not_stop(without, capsys):
    without("pkg_resources")
    assert doctor.main() == 0
    assert "'setuptools<82'" in capsys.readouterr().out


def test_runs_and_explains_without_detectron2(tmp_path):
    """Where Detectron2 cannot be found, the package imports and add_config explains."""
    code = """
import sys
sys.modules["detectron2"] = None
import focal_det, focal_det.doctor
from focal_det.losses import FocalLoss
FocalLoss()
print("doctor", focal_det.doctor.main())
try:
    focal_det.add_config(None)
except ImportError as error:
    print("add_config", error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert "doctor 1" in result.stdout
    assert "`python -m focal_det.doctor` says what is missing" in result.stdout
