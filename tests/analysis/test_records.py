"""Records of runs: numbers from Detectron2's metrics.json."""

import json
import math
import shutil
import subprocess

import pytest

from focal_det.analysis import records

ROWS = [
    {
        "iteration": 19,
        "loss_cls": 2.0,
        "classification/foreground": 0.5,
        "classification/background": 1.5,
        "num_pos_anchors": 12.0,
    },
    {
        "iteration": 39,
        "loss_cls": math.nan,
        "classification/foreground": 0.0,
        "classification/background": 0.0,
        "bbox/AP": 1.0,
    },
    {"iteration": 40, "bbox/AP": 12.5, "bbox/APl": math.nan, "bbox/AP-7": 3.0, "bbox/AP50": 20.0},
]


def test_curves_count_finished_iterations_and_leave_gaps():
    curve = records.curves(ROWS)
    assert curve == {
        "iteration": [20, 40],
        "loss_cls": [2.0, None],
        "foreground": [0.5, 0.0],
        "background": [1.5, 0.0],
        "positives": [12.0, None],
    }


def test_background_share():
    curve = {"foreground": [0.5, 0.0, None, 1.0], "background": [1.5, 0.0, 1.0, -1e-9]}
    assert records.background_share(curve) == [0.75, None, None, 0.0]


def test_average_precision_is_that_of_the_last_evaluation():
    result = records.average_precision(ROWS)
    assert result["metrics"] == {
        "AP": 12.5, "AP50": 20.0, "AP75": None, "APs": None, "APm": None, "APl": None,
    }  # fmt: skip
    assert result["per_class"] == {"7": 3.0}


def test_average_precision_without_an_evaluation():
    result = records.average_precision(ROWS[:1])
    assert set(result["metrics"].values()) == {None}
    assert result["per_class"] == {}


def test_metrics_file_cut_off_by_an_interrupt(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(ROWS[0]) + "\n" + '{"iteration": 3')
    assert records.read_metrics(path) == ROWS[:1]
    assert records.read_metrics(tmp_path / "absent.json") == []


def test_best():
    runs = [{"metrics": {"AP": value}} for value in (None, 3.0, 7.0, 7.0)]
    assert records.best(runs) == 2
    assert records.best(runs[:1]) is None
    assert records.best([{"metrics": {"AP": 0.0}}]) is None
    assert records.best([]) is None


def test_mean_ignores_gaps():
    assert records.mean([1.0, None, 2.0]) == 1.5
    assert records.mean([None]) is None


def test_save_and_load(tmp_path):
    path = tmp_path / "results.json"
    results = {"settings": {"seed": 0}, "pictures": [], "records": []}
    records.save(results, path)
    assert records.load(path) == results
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_save_refuses_what_json_cannot_hold_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    records.save({"settings": {}, "pictures": [], "records": []}, path)
    with pytest.raises(ValueError, match="JSON compliant"):
        records.save({"AP": math.nan}, path)
    assert records.load(path)["records"] == []


@pytest.mark.parametrize("text", ["[]", '{"records": []}', "{"])
def test_load_refuses_other_files(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError):  # noqa: PT011  json's own message for the last
        records.load(path)


def test_environment_names_versions_and_device():
    environment = records.environment("cpu")
    assert environment["device"].startswith("CPU")
    for name in ("focal_det", "detectron2", "torch", "torchvision", "numpy", "python"):
        assert environment[name][0].isdigit(), name


def test_commit_of_the_checkout_and_of_a_copy_in_another_repository(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    package = tmp_path / "focal_det"
    (package / "analysis").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(records, "__file__", str(package / "analysis" / "records.py"))
    assert records.commit() is None

    def git(*arguments):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    (tmp_path / "README").write_text("another project")
    git("init", "-q")
    git("add", "README")
    git("commit", "-q", "-m", "other")
    assert records.commit() is None  # the package is not part of it
    git("add", "focal_det")
    git("commit", "-q", "-m", "package")
    clean = records.commit()
    assert clean is not None
    assert len(clean) >= 12
    (package / "__init__.py").write_text("changed = True")
    assert records.commit() == f"{clean}-dirty"
