"""Trials on Ray: what workers are told, and what becomes of one that fails or is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest

from focal_det.lab import sweep
from focal_det.lab.sweep import Progress, choose_cpus, in_turns, worker_environment
from focal_det.lab.trials import Trial


def test_workers_get_paths_that_hold_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOCAL_DET_DATASETS", " a:x/a.json:x/images , b:/y/b.json:~/images,")
    monkeypatch.setenv("FOCAL_DET_PLUGINS", "mine.py, package.module")
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.delenv("FOCAL_DET_ALLOW_OUTSIDE_IMAGES", raising=False)
    home = os.path.expanduser("~")
    assert worker_environment(3) == {
        "OMP_NUM_THREADS": "3",
        "DETECTRON2_DATASETS": f"{tmp_path}/datasets",
        "FOCAL_DET_DATASETS": (
            f"a:{tmp_path}/x/a.json:{tmp_path}/x/images,b:/y/b.json:{home}/images"
        ),
        "FOCAL_DET_PLUGINS": f"{tmp_path}/mine.py,package.module",
    }
    monkeypatch.setenv("FOCAL_DET_ALLOW_OUTSIDE_IMAGES", "1")
    assert worker_environment(1)["FOCAL_DET_ALLOW_OUTSIDE_IMAGES"] == "1"


def test_what_is_timed_comes_first_and_shares_no_machine():
    one, two = (Trial("t", x, {}, 1, 9, x) for x in ("one", "two"))
    assert in_turns([one, two], {two.key}, None) == [(None, [two]), (1, [one])]
    assert in_turns([one, two], {two.key}, 3) == [(3, [one, two])]
    assert in_turns([one, two], (), None) == [(1, [one, two])]


def test_a_trial_has_a_fresh_process_and_the_cores_it_asks_for(tmp_path):
    """In a process that was used before, the peak of memory would be that of another trial."""
    (trial,) = trials = [Trial("t", "x", {}, 1, 100, "x")]
    ray = mock.Mock()
    ray.exceptions.RayError = RuntimeError
    reference = ray.remote.return_value.return_value.remote.return_value
    ray.wait.side_effect = lambda references, timeout: (references, [])
    results = {reference: {"key": trial.key, "error": None}}
    ray.get.side_effect = lambda asked: results.get(asked, {})
    progress = Progress(trials)
    with progress.bar:
        assert sweep._run(ray, trials, tmp_path, 3, 2, progress) == []
    _, asked = ray.remote.call_args
    assert (asked["num_cpus"], asked["num_gpus"], asked["max_calls"]) == (3, 2, 1)
    assert asked["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "3"
    assert (tmp_path / "records" / f"{trial.key}.json").is_file()


def test_the_bar_counts_what_is_left_and_its_pace_what_was_done_now():
    trials = [Trial("t", x, {}, 1, 100, x) for x in ("resumed", "diverges", "quick")]
    resumed, diverges, quick = trials
    progress = Progress(trials)
    bar = progress.bar
    progress.see(resumed, 60)  # where its checkpoint was
    progress.see(diverges, 0)
    assert (bar.n, bar.initial, bar.total) == (60, 60, 300)
    assert bar.n - bar.last_print_n == 0  # what the smoothed pace is made of
    progress.see(resumed, 70)
    progress.see(diverges, 10)
    assert (bar.n, bar.initial, bar.total) == (80, 60, 300)
    progress.see(resumed, 65)  # its worker died, and another goes on from a checkpoint
    assert bar.n == 80
    progress.end(diverges, complete=False)
    assert (bar.n, bar.total) == (80, 210)  # 90 need not be waited for
    progress.end(quick, complete=True)  # before it was ever looked at
    progress.end(resumed, complete=True)
    assert (bar.n, bar.initial, bar.total) == (210, 60, 210)
    assert bar.desc.startswith("3 of 3 trials")
    bar.close()


def test_a_sweep_needs_no_bar(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    trial = Trial("t", "x", {}, 1, 100, "x")
    progress = Progress([trial])
    progress.see(trial, 60)
    progress.see(trial, 70)
    progress.end(trial, complete=False)
    progress.bar.close()


def test_a_trial_fits_on_one_machine():
    """What all machines of a cluster have together starts no trial."""
    small, large, cards = {"CPU": 4.0}, {"CPU": 16.0, "memory": 9.0}, {"CPU": 8.0, "GPU": 2.0}
    assert choose_cpus([small, large, cards], 3, 0) == 3
    assert choose_cpus([small, large, cards], None, 0) == 16
    assert choose_cpus([small, large, cards], None, 2) == 8
    for cpus, gpus in ((20, 0), (None, 3), (9, 1)):
        asked = f"--cpus {cpus or 1} --gpus {gpus} a trial, but no machine has both"
        with pytest.raises(ValueError, match=asked) as raised:
            choose_cpus([small, large, cards], cpus, gpus)
        assert "Ray has machines of 4 CPU and 0 GPU; 8 CPU and 2 GPU; 16 CPU" in str(raised.value)
    with pytest.raises(ValueError, match="machines of nothing"):
        choose_cpus([], 1, 0)


def test_a_trial_that_fails_is_named_and_the_others_have_records(root, few, tmp_path):
    crop = "{INPUT.CROP.ENABLED: true, INPUT.CROP.TYPE: none}"
    table = f"rows: [{{label: good}}, {{label: bad, overrides: {crop}}}]"
    (tmp_path / "t.yaml").write_text(table)
    words = ["--table", "t.yaml", "--data", few, "--budget", "2", "--output", "out"]
    # Not in this process, which Ray would leave larger than it was.
    done = subprocess.run(
        [sys.executable, str(root / "tools" / "ablate.py"), *words, "SOLVER.IMS_PER_BATCH", "2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed: bad, seed 1 (" in done.stderr
    assert "): AssertionError" in done.stderr  # of Detectron2's cropping
    (path,) = (tmp_path / "out" / "records").iterdir()
    assert json.loads(path.read_text())["label"] == "good"
    assert "No winner yet: no result of bad." in done.stdout


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_sweep_that_is_killed_goes_on_where_it_was(root, few, tmp_path):
    (tmp_path / "t.yaml").write_text("rows: [{label: one}]")
    words = ["--table", "t.yaml", "--data", few, "--budget", "60", "--output", "out"]
    command = [sys.executable, str(root / "tools" / "ablate.py"), *words]
    command += ["SOLVER.IMS_PER_BATCH", "2"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 300
        while not list((tmp_path / "out").glob("trials/*/last_checkpoint")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out" / "records").exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "out" / "records").iterdir()
    record = json.loads(path.read_text())
    assert record["resumed_from"] >= 12  # a fifth of the training
    assert record["curves"]["iteration"][-1] == 60
