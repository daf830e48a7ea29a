"""The demo: its command line, its fairness between losses, and one run from end to end."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

import focal_det
from focal_det.analysis import records, report
from focal_det.data import DigitsClutterSpec, generate, register_from_env

TINY_CONFIG = """
MODEL:
  META_ARCHITECTURE: FocalRetinaNet
  WEIGHTS: ""
  DEVICE: cpu
  BACKBONE: {NAME: build_retinanet_resnet_fpn_backbone, FREEZE_AT: 0}
  RESNETS:
    DEPTH: 50
    STEM_OUT_CHANNELS: 8
    RES2_OUT_CHANNELS: 16
    WIDTH_PER_GROUP: 4
    OUT_FEATURES: [res3, res4, res5]
    NORM: BN
  FPN: {IN_FEATURES: [res3, res4, res5], OUT_CHANNELS: 16}
  ANCHOR_GENERATOR: {SIZES: [[16], [32], [64], [128], [256]], ASPECT_RATIOS: [[1.0]]}
  RETINANET: {NUM_CLASSES: 10, NUM_CONVS: 1, IOU_THRESHOLDS: [0.4, 0.5], IOU_LABELS: [0, -1, 1]}
DATASETS: {TRAIN: [tiny_train], TEST: [tiny_val]}
INPUT: {MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64}
DATALOADER: {NUM_WORKERS: 0, FILTER_EMPTY_ANNOTATIONS: False}
SOLVER: {IMS_PER_BATCH: 2, BASE_LR: 0.01, STEPS: [60, 80], MAX_ITER: 100, WARMUP_ITERS: 10}
SEED: 3
VERSION: 2
"""
LOSSES = ["CrossEntropyLoss", "BalancedCrossEntropyLoss", "OHEMLoss", "FocalLoss"]


@pytest.fixture(scope="module")
def demo(load_tool):
    """tools/demo.py as a module."""
    return load_tool("demo")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny data set and config, and the value of FOCAL_DET_DATASETS for it."""
    folder = tmp_path_factory.mktemp("tiny")
    spec = DigitsClutterSpec(
        train_images=6, val_images=4, image_size=64, max_digit_size=40, empty_fraction=0.0
    )
    data = generate(spec, folder / "data")
    (folder / "tiny.yaml").write_text(TINY_CONFIG)
    entries = ",".join(f"tiny_{s}:{data}/{s}.json:{data}/images/{s}" for s in ("train", "val"))
    return folder, entries


@pytest.fixture
def registered(tiny, monkeypatch):
    """The tiny data set in this process; its config's path."""
    folder, entries = tiny
    register_from_env(entries)
    monkeypatch.delenv("DEMO_ITERS", raising=False)
    yield str(folder / "tiny.yaml")
    for name in ("tiny_train", "tiny_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def run(root, tiny, *arguments, **variables):
    environment = {**os.environ, "FOCAL_DET_DATASETS": tiny[1], "OMP_NUM_THREADS": "1", **variables}
    environment["PYTHONPATH"] = str(root)
    return subprocess.run(
        [sys.executable, str(root / "tools" / "demo.py"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tiny[0],
        check=False,
    )


def test_end_to_end(root, tiny, demo):
    folder = tiny[0]
    arguments = ("--config-file", "tiny.yaml", "--output", "out", "--losses", *LOSSES[::3])
    done = run(root, tiny, *arguments, DEMO_ITERS="3")
    assert done.returncode == 0, done.stderr

    out = folder / "out"
    results = records.load(out / "results.json")
    assert [run["loss"] for run in results["records"]] == LOSSES[::3]
    assert results["settings"]["seed"] == 3
    assert results["settings"]["iterations"] == 3
    assert len(results["pictures"]) == 4
    for record in results["records"]:
        assert record["error"] is None
        assert record["overrides"] == ["MODEL.FOCAL_DET.LOSS.NAME", record["loss"]]
        # Levels of 8x8, 4x4, 2x2, 1x1 and 1x1 with one anchor each.
        assert record["anchors_per_image"] == 64 + 16 + 4 + 1 + 1
        assert record["curves"]["iteration"] == [3]
        assert record["curves"]["background"][0] > 0
        assert record["seconds"]["training"] > 0
        assert record["seconds"]["evaluation"] > 0
        assert len(record["pictures"]) == 4
        run_folder = out / record["loss"]
        log = (run_folder / "log.txt").read_text()
        assert record["description"].split("(")[0] in log
        assert "Evaluation results for tiny_val" in log
        assert (run_folder / "model_final.pth").is_file()
        cfg = get_cfg()
        focal_det.add_config(cfg)
        cfg.merge_from_file(str(run_folder / "config.yaml"))
        assert record["loss"] == cfg.MODEL.FOCAL_DET.LOSS.NAME

    # The console has bars, the table and the place of the page, and nothing of Detectron2's.
    assert "[1/2] CrossEntropyLoss" in done.stderr
    assert "[2/2] FocalLoss" in done.stderr
    assert "all runs done in" in done.stderr
    assert "evaluating" in done.stderr
    assert "Warning" not in done.stderr
    assert re.search(r"^FocalLoss +", done.stdout, flags=re.MULTILINE)
    assert f"Report: {Path('out') / 'report.html'}" in done.stdout
    assert "Average Precision" not in done.stdout
    assert "[" not in done.stdout

    # The page is drawn from the records alone.
    page = out / "report.html"
    before = page.read_bytes()
    page.unlink()
    results["settings"]["test"] = "a name that only the records know"
    records.save(results, out / "results.json")
    redrawn = run(root, tiny, "--report-only", "--output", "out", FOCAL_DET_DATASETS="")
    assert redrawn.returncode == 0, redrawn.stderr
    changed = page.read_text(encoding="utf-8")
    assert "a name that only the records know" in changed
    assert changed.replace("a name that only the records know", "tiny_val").encode() == before


def test_report_only_without_records(root, tiny):
    done = run(root, tiny, "--report-only", "--output", "nowhere")
    assert done.returncode == 2
    assert "nothing to draw in nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_losses_start_from_the_same_weights_and_see_the_same_images(demo, registered, tmp_path):
    states, orders, images = [], [], []
    for loss in LOSSES:
        args = demo.parse(["--config-file", registered, "--output", str(tmp_path)])
        trainer = demo.build_trainer(demo.make_config(args, loss))
        states.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
        batches = iter(trainer.data_loader)
        items = [x for _ in range(4) for x in next(batches)]
        orders.append([x["file_name"] for x in items])
        images.append(torch.stack([x["image"] for x in items]))
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)
    assert all(order == orders[0] for order in orders[1:])
    assert all(torch.equal(batch, images[0]) for batch in images[1:])  # flipped alike, too
    assert len(set(orders[0])) > 1


def test_seed_changes_the_weights(demo, registered, tmp_path):
    weights = []
    for seed in ("0", "0", "1"):
        args = demo.parse(["--config-file", registered, "--output", str(tmp_path), "--seed", seed])
        trainer = demo.build_trainer(demo.make_config(args, "FocalLoss"))
        weights.append(trainer.model.head.cls_score.weight.clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("value", ["0", "-5", "abc", "1.5"])
def test_unusable_number_of_steps(demo, registered, monkeypatch, capsys, value):
    monkeypatch.setenv("DEMO_ITERS", value)
    with pytest.raises(SystemExit):
        demo.parse(["--config-file", registered])
    message = capsys.readouterr().err
    assert f"DEMO_ITERS must be a whole number of steps, 1 or more, got '{value}'" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iters=-5"], "--iters must be a whole number of steps, 1 or more, got '-5'"),
        (["--seed=-1"], "--seed must be in"),
        (["--losses", "FocalLoss", "NoLoss"], "'NoLoss', which is not one of: "),
        (["--losses", "FocalLoss", "FocalLoss"], "names a loss twice"),
        (["MODEL.NO_SUCH_KEY", "1"], "MODEL.NO_SUCH_KEY"),
        (["MODEL.RETINANET.FOCAL_LOSS_ALPHA", "2.0"], "alpha must be in [0, 1]"),
    ],
)
def test_unusable_arguments_are_told_before_the_first_run(
    demo, registered, capsys, arguments, message
):
    with pytest.raises(SystemExit):
        demo.parse(["--config-file", registered, *arguments])
    assert message in capsys.readouterr().err


def test_absent_config_file(demo, capsys):
    with pytest.raises(SystemExit):
        demo.parse(["--config-file", "absent.yaml"])
    assert "--config-file must name a YAML file, got 'absent.yaml'" in capsys.readouterr().err


def test_steps_on_the_command_line_come_first(demo, registered, monkeypatch):
    monkeypatch.setenv("DEMO_ITERS", "7")
    assert demo.parse(["--config-file", registered]).iters == 7
    assert demo.parse(["--config-file", registered, "--iters", "9"]).iters == 9
    monkeypatch.setenv("DEMO_ITERS", "")
    assert demo.parse(["--config-file", registered]).iters is None


@pytest.mark.parametrize(
    ("iterations", "steps", "warmup", "checkpoints", "evaluations"),
    [
        (1000, (600, 800), 100, 500, 250),
        (2000, (1200, 1600), 200, 1000, 500),
        (10, (6, 8), 1, 5, 2),
        (2, (1,), 0, 1, 1),  # the second step would be at 2, the end
        (1, (), 0, 1, 1),
    ],
)
def test_the_schedule_is_scaled(demo, iterations, steps, warmup, checkpoints, evaluations):
    cfg = get_cfg()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = 1000, (600, 800), 100
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD = 500, 250
    demo.scale_schedule(cfg, iterations)
    assert iterations == cfg.SOLVER.MAX_ITER
    assert steps == cfg.SOLVER.STEPS
    assert warmup == cfg.SOLVER.WARMUP_ITERS
    assert checkpoints == cfg.SOLVER.CHECKPOINT_PERIOD
    assert evaluations == cfg.TEST.EVAL_PERIOD


def test_no_evaluation_in_between_stays_none(demo):
    cfg = get_cfg()
    demo.scale_schedule(cfg, 10)
    assert cfg.TEST.EVAL_PERIOD == 0


@pytest.mark.parametrize(
    ("elapsed", "share", "expected"), [(60, 0.25, "3:00"), (10, 1.0, "0:00"), (100, 0.6, "1:07")]
)
def test_time_left(demo, elapsed, share, expected):
    assert demo.remaining(elapsed, share) == expected


def stop(kind, at):
    """A loss that raises `kind` at its step `at`."""

    def raise_later(self, *args, **kwargs):
        raise_later.calls += 1
        if raise_later.calls == at:
            raise kind("Loss became infinite or NaN at iteration=1!\nloss_dict = {}")
        return raise_later.original(self, *args, **kwargs)

    raise_later.calls = 0
    return raise_later


def run_with_failure(demo, registered, tmp_path, monkeypatch, kind, at):
    failing = stop(kind, at)
    failing.original = demo.DemoTrainer.run_step
    monkeypatch.setattr(demo.DemoTrainer, "run_step", failing)
    monkeypatch.setattr(
        sys,
        "argv",
        ["demo.py", "--config-file", registered, "--output", str(tmp_path), "--iters", "2",
         "--losses", "CrossEntropyLoss", "FocalLoss"],
    )  # fmt: skip
    return demo.main()


def test_an_interrupt_keeps_the_finished_runs(demo, registered, tmp_path, monkeypatch, capsys):
    (tmp_path / "report.html").write_text("of an earlier comparison")
    status = run_with_failure(demo, registered, tmp_path, monkeypatch, KeyboardInterrupt, 4)
    assert status == 130
    assert "The finished runs are in" in capsys.readouterr().out
    finished = records.load(tmp_path / "results.json")["records"]
    assert [record["loss"] for record in finished] == ["CrossEntropyLoss"]
    assert "One detector, one classification loss" in (tmp_path / "report.html").read_text()


def test_an_interrupt_of_the_first_run_leaves_no_page_of_an_earlier_one(
    demo, registered, tmp_path, monkeypatch, capsys
):
    (tmp_path / "report.html").write_text("of an earlier comparison")
    status = run_with_failure(demo, registered, tmp_path, monkeypatch, KeyboardInterrupt, 1)
    assert status == 130
    assert "before the first run" in capsys.readouterr().out
    assert not (tmp_path / "report.html").exists()


def test_a_loss_that_diverges_does_not_stop_the_others(
    demo, registered, tmp_path, monkeypatch, capsys
):
    status = run_with_failure(demo, registered, tmp_path, monkeypatch, FloatingPointError, 2)
    assert status == 0
    first, second = records.load(tmp_path / "results.json")["records"]
    assert first["error"] == "Loss became infinite or NaN at iteration=1!"
    assert first["metrics"]["AP"] is None
    assert second["error"] is None
    assert "CrossEntropyLoss was given up" in capsys.readouterr().out


def test_commands_on_the_page_are_understood(demo, registered, root, monkeypatch):
    monkeypatch.chdir(root)
    config = "configs/demo/focal_retinanet_digits.yaml"
    settings = {"python": "python", "config_file": config, "output": "output/demo"}
    commands = [
        shlex.split(line)
        for _, text in report.next_commands(settings)
        for line in text.replace("\\\n", " ").splitlines()
    ]
    tools = [words[1:] for words in commands if words[0] == "python"]
    assert [words[0] for words in tools] == [
        "tools/train_net.py", "tools/demo.py", "tools/train_net.py", "tools/demo.py",
    ]  # fmt: skip
    for tool, *words in tools:
        assert (root / tool).is_file()
        if tool == "tools/demo.py":
            demo.parse(words)
            continue
        assert words[:2] == ["--config-file", config]
        cfg = get_cfg()
        focal_det.add_config(cfg)
        cfg.merge_from_file(config)
        cfg.merge_from_list(words[2:])
        assert cfg.OUTPUT_DIR.startswith("output/")
