"""The version matrix: what it chooses, makes, counts and says; not the tests that it runs."""

import importlib.metadata
import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tqdm import tqdm

import test_matrix as tool
from focal_det.benchmarks import measure
from version_matrix import environments, layers, outcomes, table
from version_matrix.combinations import OLD_TORCH, PYTHONS, Combination, combinations, newest_torch

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def base():
    """The environment that runs these tests, as the larger one of a combination."""
    return environments.Environment(Path(sys.executable), Path(sysconfig.get_path("purelib")))


@pytest.fixture
def checkout(tmp_path):
    """A Detectron2 of three files that imports its compiled part as 0.6 does."""
    folder = tmp_path / "checkout"
    package = folder / "detectron2"
    for name in ("detectron2", "detectron2/layers", "detectron2/evaluation", "tools", "configs"):
        (folder / name).mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "9.9"\n')
    (package / "layers" / "__init__.py").write_text("from .deform_conv import _C\n")
    (package / "layers" / "deform_conv.py").write_text("import math\n\nfrom detectron2 import _C\n")
    (package / "evaluation" / "__init__.py").write_text("from .coco_evaluation import fast\n")
    (package / "evaluation" / "coco_evaluation.py").write_text(
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt as fast\n"
    )
    (package / "evaluation" / "fast_eval_api.py").write_text("from detectron2 import _C\n")
    (package / "_C.so").write_text("compiled for something else")
    (package / "model_zoo").mkdir()
    (folder / "configs" / "a.yaml").write_text("VERSION: 2\n")
    (folder / "tools" / "train_net.py").write_text("")
    return folder


@pytest.fixture
def record():
    """A function that makes a record of a combination, as if it had run."""

    def make(python="3.11", torch="2.14.1", detectron2="main", **fields):
        empty = table.empty_record(Combination(python, torch, detectron2), quick=True)
        return {**empty, **fields}

    return make


def test_every_python_meets_every_detectron2_and_an_old_torch_is_among_them():
    made = combinations()
    newest = newest_torch().torch
    assert len({combination.name for combination in made}) == len(made)
    for python in PYTHONS:
        for detectron2 in ("0.6", "0.7.2", "main"):
            assert Combination(python, newest, detectron2) in made
    old = [combination for combination in made if combination.torch != newest]
    assert {combination.torch for combination in old} == {OLD_TORCH.torch}
    pairs = [combination.pair for combination in made]
    # Those that share an environment follow one another: it may be removed after the last.
    assert sum(a != b for a, b in itertools.pairwise(pairs)) == len(set(pairs)) - 1


def test_the_newest_torch_is_the_pinned_one(root):
    pinned = (root / "requirements" / "torch.txt").read_text().split()
    newest = newest_torch()
    assert f"torch=={newest.torch}" in pinned
    assert f"torchvision=={newest.torchvision}" in pinned


def test_only_chooses_by_name():
    chosen = tool.parse(["--only", "py3.12-*", "*-0.6-unpinned"]).chosen
    assert {c.python for c in chosen if c.detectron2 != "0.6-unpinned"} == {"3.12"}
    assert len(chosen) == 4


def test_a_pattern_without_a_combination_ends_the_program(capsys):
    with pytest.raises(SystemExit, match="2"):
        tool.parse(["--only", "py2.7-*"])
    assert "--only py2.7-*: no combination is of this name; see --list" in capsys.readouterr().err


def test_a_quick_run_replaces_no_record_of_a_full_one(root):
    assert tool.parse([]).output == root / "tools" / "results" / "matrix"
    assert tool.parse(["--quick"]).output == root / "output" / "matrix"


def test_list_prints_names_and_makes_nothing(monkeypatch, capsys, tmp_path):
    cache = tmp_path / "cache"
    command = ["test_matrix.py", "--list", "--only", "*-main", "--cache", str(cache)]
    monkeypatch.setattr(sys, "argv", command)
    assert tool.main() == 0
    lines = capsys.readouterr().out.split()
    assert len(lines) == len(PYTHONS) + 1
    assert not cache.exists()


def test_dependencies_are_those_of_focal_det_and_detectron2_without_torch():
    names = {Requirement(text).name for text in environments.dependencies("3.12")}
    assert {"numpy", "fvcore", "yacs", "hydra-core", "opencv-python-headless"} <= names
    assert not {"torch", "torchvision", "ruff", "mlxtend"} & names
    assert all(Requirement(text).marker is None for text in environments.dependencies("3.12"))
    assert "setuptools<82" in environments.dependencies("3.12")


def test_an_interpreter_that_does_not_run_is_passed_over(monkeypatch, tmp_path):
    broken, working = tmp_path / "broken", tmp_path / "working"
    for folder, text in ((broken, "exit 127"), (working, f'exec "{sys.executable}" "$@"')):
        folder.mkdir()
        (folder / f"python{HERE}").write_text(f"#!/bin/sh\n{text}\n")
        (folder / f"python{HERE}").chmod(0o755)
    monkeypatch.setenv("PATH", str(broken))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert HERE not in environments.interpreters([])
    given = working / f"python{HERE}"
    assert environments.interpreters([given]) == {HERE: given}
    assert environments.interpreters([given, Path(sys.executable)]) == {HERE: given}
    versions = tmp_path / "none" / "versions" / f"{HERE}.9" / "bin"
    versions.parent.mkdir(parents=True)
    working.rename(versions)
    assert environments.interpreters([]) == {HERE: versions / f"python{HERE}"}


def test_without_an_interpreter_the_record_says_so(tmp_path, monkeypatch, capsys):
    output, cache = tmp_path / "records", tmp_path / "cache"
    name = "py3.12-torch*-detectron2-main"
    words = ["--only", name, "--output", str(output), "--cache", str(cache)]
    monkeypatch.setattr(sys, "argv", ["test_matrix.py", *words])
    monkeypatch.setattr(environments, "interpreters", lambda given: {})
    assert tool.main() == 0
    (written,) = table.load_all(output)
    assert written["status"] == "not made"
    assert written["reason"] == "there is no Python 3.12 on this machine"
    assert (written["python"], written["detectron2"]) == ("3.12", "main")
    assert "not made: there is no Python 3.12 on this machine |" in capsys.readouterr().out
    assert str(tmp_path) not in json.dumps(written)
    # What ran on a machine that has one stays.
    table.save({**written, "status": "passed"}, output)
    assert tool.main() == 0
    assert [record["status"] for record in table.load_all(output)] == ["passed"]


def test_a_failure_that_is_not_known_is_the_exit_status(record, monkeypatch, tmp_path):
    words = ["--only", "py3.12-*-main", "--output", str(tmp_path), "--cache", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["test_matrix.py", *words])
    monkeypatch.setattr(environments, "interpreters", lambda given: {})
    counted = {"passed": 3, "failed": 1, "skipped": 0}
    for status, expected in (("failed", 1), ("known", 0), ("passed", 0)):
        made = record(status=status, **counted)
        monkeypatch.setattr(tool, "try_combination", lambda *args, made=made: made)
        assert tool.main() == expected


def test_an_environment_is_removed_after_its_last_combination(record, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    words = ["--only", "py3.12-*", "py3.13-*", "--output", str(tmp_path), "--cache", str(cache)]
    monkeypatch.setattr(sys, "argv", ["test_matrix.py", "--prune", *words])
    monkeypatch.setattr(environments, "interpreters", lambda given: {})
    there = []

    def make(args, combination, found, bar):
        there.append(sorted(path.name for path in cache.glob("*")))
        (cache / combination.pair).mkdir(parents=True, exist_ok=True)
        return record(combination.python, combination.torch, combination.detectron2)

    monkeypatch.setattr(tool, "try_combination", make)
    assert tool.main() == 0
    twelve, thirteen = (f"py3.{minor}-torch{newest_torch().torch}" for minor in (12, 13))
    assert there == [[], [twelve], [twelve], [], [thirteen], [thirteen]]
    assert list(cache.glob("*")) == []


@pytest.mark.parametrize("advice", ["-> python -m pip install 'pillow<10'", "-> nothing"])
def test_a_record_says_whether_the_doctor_names_the_cure(monkeypatch, tmp_path, advice):
    source = layers.Source(None, "PyPI wheel a 1")
    known = {"cause": "Pillow dropped it", "cure": "pip install 'pillow<10'"}
    tests = {"status": "known", "passed": 1, "failed": 1, "known": [known]}
    for module, name, value in (
        (environments, "make_base", None),
        (layers, "get_source", source),
        (layers, "make_layer", None),
        (layers, "probe", {"torch": "2.14.1"}),
        (outcomes, "run_tests", tests),
        (outcomes, "doctor", advice),
    ):
        monkeypatch.setattr(module, name, lambda *args, value=value: value)
    args = tool.parse(["--cache", str(tmp_path)])
    with tqdm(disable=True) as bar:
        made = tool.try_combination(args, args.chosen[0], {}, bar)
    assert made["known"] == [{**known, "doctor": "pillow<10" in advice}]
    assert (made["status"], made["passed"], made["failed"]) == ("known", 1, 1)
    assert (made["detectron2_from"], made["versions"]) == (source.label, {"torch": "2.14.1"})


def test_what_was_half_made_or_made_otherwise_is_made_anew(tmp_path):
    folder = tmp_path / "made"

    def make(*recipe, fail=False):
        with environments.making(folder, recipe) as needed:
            if needed:
                folder.mkdir()
                (folder / "content").write_text(recipe[0])
            if fail:
                raise environments.NotMade("pip fails")
        return needed

    with pytest.raises(environments.NotMade):
        make("a", fail=True)
    assert make("a")
    assert not make("a")
    assert make("b")
    assert (folder / "content").read_text() == "b"


def test_a_combination_imports_its_own_detectron2_and_the_rest_from_below(
    base, checkout, monkeypatch, tmp_path, root
):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"))
    shutil.copytree(checkout, tmp_path / "elsewhere")
    combination = Combination(HERE, "2.14.1", "main")
    source = layers.Source(checkout, "a checkout")
    log = tmp_path / "log.txt"
    log.touch()
    layer = layers.make_layer(combination, base, source, tmp_path, log)
    paths = (layer.site / "focal_det_matrix.pth").read_text().splitlines()
    assert paths == [str(root), str(base.site)]
    versions = layers.probe(layer, log)
    assert versions["detectron2"] == "9.9"
    assert versions["numpy"] == importlib.import_module("numpy").__version__
    package = layer.site / "detectron2"
    assert (package / "model_zoo" / "configs" / "a.yaml").is_file()
    assert (layer.site / "tools" / "train_net.py").is_file()
    assert not (package / "_C.so").exists()
    # What 0.6 imports without asking is asked for, in a process that sees no other PYTHONPATH.
    code = """
import detectron2.evaluation as e, detectron2.layers as l, focal_det
print(l._C, e.fast.__module__, focal_det.__file__)
"""
    found = subprocess.check_output([layer.python, "-c", code], env=environments.clean(), text=True)
    assert found.split()[:2] == ["None", "pycocotools.cocoeval"]
    assert Path(found.split()[2]).parent.parent == root


def test_a_build_leaves_the_checkout_as_it_was(base, checkout, tmp_path):
    (checkout / "setup.py").write_text(
        "from setuptools import find_packages, setup\n"
        "setup(name='detectron2', version='9.9', packages=find_packages())\n"
    )
    before = sorted(checkout.rglob("*"))
    combination = Combination(HERE, "2.14.1", "main-built")
    log = tmp_path / "log.txt"
    log.touch()
    source = layers.Source(checkout, "a checkout")
    layer = layers.make_layer(combination, base, source, tmp_path, log)
    assert (layer.site / "detectron2" / "layers" / "deform_conv.py").is_file()
    assert list(layer.site.glob("detectron2-9.9.dist-info"))
    assert sorted(checkout.rglob("*")) == before


def test_a_detectron2_of_another_environment_is_an_error(base, tmp_path, root):
    folder = tmp_path / "layer"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    layer = environments.at(folder)
    (layer.site / "below.pth").write_text(f"{root}\n{base.site}\n")
    with pytest.raises(RuntimeError, match=r"detectron2 was imported from .*, not .*layer"):
        layers.probe(layer, tmp_path / "log.txt")


def test_an_import_that_fails_is_the_reason(tmp_path):
    folder = tmp_path / "layer"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    log = tmp_path / "log.txt"
    log.touch()
    with pytest.raises(environments.NotMade, match=r"^an import fails: .*No module named 'torch'$"):
        layers.probe(environments.at(folder), log)
    assert "Traceback" in log.read_text()


def test_cuda_libraries_are_linked_and_nothing_else(tmp_path):
    environments.link_cuda(tmp_path)
    linked = {path.name.split("_")[0] for path in tmp_path.iterdir()}
    assert linked <= {"nvidia"}
    names = [d.metadata["Name"] for d in importlib.metadata.distributions()]
    assert bool(linked) == any(name.startswith("nvidia-") for name in names)
    assert all(path.is_symlink() and path.exists() for path in tmp_path.iterdir())


TESTS = """
import pytest

def test_passes(): pass
@pytest.mark.parametrize("x", [1, 2])
def test_fails(x): raise AttributeError("module 'PIL.Image' has no attribute 'LINEAR'")
def test_skipped(): pytest.skip("not today")
@pytest.fixture
def broken(): raise AttributeError("module 'numpy' has no attribute 'int'.")
def test_error(broken): pass
"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs a file of tests as the tool does; fields of a record."""

    def tests(text, detectron2="0.6"):
        (tmp_path / "test_some.py").write_text(text)
        monkeypatch.setattr(outcomes, "ROOT", tmp_path)
        monkeypatch.setattr(outcomes, "SELECTION", ("test_some.py",))
        log = tmp_path / "log.txt"
        log.touch()
        layer = environments.Environment(Path(sys.executable), tmp_path)
        combination = Combination("3.11", "2.14.1", detectron2)
        return outcomes.run_tests(combination, layer, quick=False, workers="0", log=log)

    return tests


def test_tests_are_counted_and_known_breakages_told(run):
    found = run(TESTS)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 3, 1)
    assert found["failures"] == [
        "test_some.py::test_fails[1]", "test_some.py::test_fails[2]", "test_some.py::test_error",
    ]  # fmt: skip
    assert found["status"] == "known"
    assert [known["cure"] for known in found["known"]] == [
        "pip install 'pillow<10'",
        "pip install 'numpy<1.24'",
    ]
    assert found["seconds"] > 0


def test_what_breaks_one_version_is_a_failure_of_another(run):
    assert run(TESTS, "0.6-unpinned")["status"] == "known"
    assert run(TESTS, "main")["status"] == "failed"


def test_an_interpreter_that_is_not_there_ends_the_program(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        tool.parse(["--python", str(tmp_path / "python")])
    assert f"--python must name interpreters, got {tmp_path}" in capsys.readouterr().err


def test_one_failure_of_its_own_is_a_failure(run):
    assert run(TESTS + "def test_wrong(): assert 1 == 2\n")["status"] == "failed"


def test_tests_that_pass_pass(run):
    found = run("def test_passes(): pass\n")
    assert found["status"] == "passed"
    assert (found["passed"], found["failed"], found["failures"]) == (1, 0, [])


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("import nothing_of_this_name\n", "test_some"),  # cannot be collected
        ("", "pytest ended with status 5"),  # no tests
    ],
)
def test_a_run_without_tests_has_not_passed(run, text, failure):
    found = run(text)
    assert found["status"] == "failed"
    assert found["failures"] == [failure]


@pytest.mark.parametrize(
    ("words", "output", "reason"),
    [
        (
            ["python", "-m", "pip"],
            "ERROR: No matching distribution found for numpy<1.24 (from versions: 2.0)\n",
            "pip finds no numpy<1.24 for this Python and platform",
        ),
        (["python", "-m", "pip"], "[Errno 28] No space left on device", "the disk is full"),
        (["python", "-m", "pip"], "Could not fetch https://a.host/x", "pip fails, see the log"),
        (["git", "clone"], "https://a.host/", "Detectron2's repository cannot be reached"),
        (["python", "-m", "venv", "x"], "", "this Python cannot make a virtual environment"),
    ],
)
def test_reasons_name_neither_folders_nor_hosts(words, output, reason):
    assert environments.why(words, output) == reason


def git(*words, cwd):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *words], cwd=cwd, check=True, capture_output=True)


def test_main_is_cloned_and_named_by_its_commit(base, checkout, tmp_path):
    git("init", "--quiet", cwd=checkout)
    git("add", ".", cwd=checkout)
    git("commit", "--quiet", "-m", "a", "--date", "2020-02-02T00:00:00", cwd=checkout)
    combination = Combination(HERE, "2.14.1", "main")
    log = tmp_path / "log.txt"
    bare = tmp_path / "bare"
    git("clone", "--quiet", "--bare", checkout, bare, cwd=tmp_path)
    cloned = tmp_path / "sources" / "git"
    for place, folder in ((checkout, checkout), (bare, cloned), (bare, cloned)):
        source = layers.get_source(combination, str(place), base, tmp_path, log)
        assert source.folder == folder
        assert (folder / "detectron2" / "__init__.py").is_file()
        commit, date = source.label.removeprefix("git ").split(" of ")
        assert len(commit) >= 7
        assert len(date.split("-")) == 3
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(environments.NotMade, match=r"^Detectron2's repository cannot be reached$"):
        layers.get_source(combination, nowhere, base, tmp_path, log)


def test_the_table_is_in_order_and_says_what_came_of_each(record):
    versions = {"python": "3.11.7", "torch": "2.14.1+cpu", "numpy": "2.4.6", "PIL": "13.0.0"}
    counted = {"versions": versions, "passed": 9, "failed": 0, "skipped": 0}
    known = {"cause": "Pillow dropped it", "cure": "pip install 'pillow<10'", "doctor": True}
    rows = [
        record(status="passed", detectron2_from="git abc of 2026-06-06", **counted),
        record("3.10", reason="there is no Python 3.10 on this machine"),
        record(detectron2="0.6", status="known", known=[known], **{**counted, "failed": 2}),
        record("3.10", "2.1.2", status="passed", **{**counted, "skipped": 4}),
    ]
    lines = table.render(rows).splitlines()
    assert lines[2].startswith("| 3.11.7 | 2.14.1+cpu | main, Python only |")
    assert lines[2].endswith("| 9 passed, 4 skipped |")
    assert lines[3] == (
        "| 3.10 | 2.14.1 | main, Python only |  |  "
        "| not made: there is no Python 3.10 on this machine |"
    )
    assert lines[4].endswith("| **2 failed, 9 passed** (causes: 1) |")
    assert "1. Pillow dropped it: `pip install 'pillow<10'`" in lines[6:]
    assert table.result(rows[2]) == (
        "2 failed, 9 passed; Pillow dropped it: `pip install 'pillow<10'`"
    )
    assert lines[5].startswith(
        "| 3.11.7 | 2.14.1+cpu | main, Python only, git abc of 2026-06-06 | 2.4.6"
    )
    assert lines[5].endswith("| 9 passed |")
    assert len({line.count("|") for line in lines[:6]}) == 1
    assert "None" not in "\n".join(lines)


def test_each_cause_is_one_note_and_what_has_no_cause_is_said(record):
    pillow, numpy = ({"cause": name, "cure": "a newer one"} for name in ("Pillow", "NumPy"))
    counted = {"passed": 9, "failed": 2, "skipped": 0}
    rows = [
        record("3.10", status="known", known=[pillow], **counted),
        record("3.11", status="failed", known=[numpy, pillow], **counted),
        record("3.12", status="failed", **counted),
    ]
    lines = table.render(rows).splitlines()
    ends = ["(causes: 1)", "(causes: 1, 2, unknown)", "(causes: unknown)"]
    for line, end in zip(lines[2:5], ends, strict=True):
        assert line.endswith(f"| **2 failed, 9 passed** {end} |")
    assert lines[8:11] == ["1. Pillow: a newer one", "2. NumPy: a newer one", ""]


def test_records_are_not_taken_for_measurements(record, root, tmp_path):
    output = tool.parse([]).output
    table.save(record(), tmp_path / output.relative_to(root / "tools" / "results"))
    assert measure.load_all(tmp_path) == []


def test_a_record_of_another_schema_is_named(record, tmp_path):
    path = table.save(record(), tmp_path)
    assert path == tmp_path / "py3.11-torch2.14.1" / "detectron2-main.json"
    assert table.load_all(tmp_path) == [record()]
    path.write_text(json.dumps({**record(), "schema": 0}))
    with pytest.raises(ValueError, match=r"detectron2-main\.json: schema 0, known is 1"):
        table.load_all(tmp_path)


def test_variables_that_change_what_is_imported_are_left_out(monkeypatch):
    for name in ("PYTHONPATH", "DETECTRON2_ENV_MODULE", "FOCAL_DET_PLUGINS"):
        monkeypatch.setenv(name, "something")
    assert environments.clean().keys() == os.environ.keys() - {
        "PYTHONPATH", "PYTHONHOME", "DETECTRON2_ENV_MODULE", "FOCAL_DET_PLUGINS",
    }  # fmt: skip


def test_records_in_the_repository_can_be_shown(root):
    found = table.load_all(root / "tools" / "results" / "matrix")
    assert table.render(found).count("\n| 3.") == len(found)
    for entry in found:
        assert entry["selection"] == "full"
        text = json.dumps(entry)
        assert "/home/" not in text
        assert "/tmp/" not in text
