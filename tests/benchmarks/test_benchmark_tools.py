"""Both benchmark tools run from end to end, at sizes that say nothing about speed."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from focal_det.benchmarks import losses, markdown, measure, parts
from focal_det.losses import LOSS_REGISTRY

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def quick_run(tool, folder):
    """The record of a quick run of a tool, and the page that is made of it."""
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), "--quick"]
    result = subprocess.run(
        [*command, "--output", str(folder)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob(f"*/{tool}.json")
    assert f"Written: {path}" in result.stdout
    record = json.loads(path.read_text(), parse_constant=pytest.fail)
    measure.validate(record)
    assert str(folder) not in path.read_text()
    page = markdown.render([record])
    assert not any("None" in line for line in page.splitlines() if line.startswith("|"))
    return record, page


def allocators(record):
    """Without glibc there is no warm pass."""
    return {row["allocator"] for row in record["rows"] if "allocator" in row}


def test_every_registered_loss_has_a_setting():
    ours = {name for name, loss in LOSS_REGISTRY if loss.__module__.startswith("focal_det.")}
    assert {name for name, _ in losses.SETTINGS.values()} == ours


def test_every_loss_and_peer_is_timed_in_every_case(tmp_path):
    record, page = quick_run("benchmark_losses", tmp_path)
    assert "cold" in allocators(record)
    variants = [(loss, impl) for loss in losses.SETTINGS for impl in ("torch", "eager")]
    variants += [(losses.FOCAL, x) for x in ("detectron2", "torchvision", "fvcore")]
    variants += [("", floor) for floor in ("copy", "exp")]
    modes = ("forward+backward", "forward")
    for case in itertools.product(allocators(record), ("float32", "bfloat16", "float16"), modes):
        timed = [
            (row["loss"], row["variant"])
            for row in record["rows"]
            if (row["allocator"], row["dtype"], row["mode"]) == case
        ]
        assert sorted(timed) == sorted(variants), case
    assert all(row["error"] is None for row in record["rows"])
    assert all(row["ratio"] > 0 and row["floor_ratio"] > 0 for row in record["rows"])
    assert "### Classification losses" in page


def test_every_model_and_part_is_timed(tmp_path):
    record, page = quick_run("benchmark_model", tmp_path)
    by_part = {}
    for row in record["rows"]:
        assert row["error"] is None, row
        by_part.setdefault(row["part"], []).append(row)
    expected = {"step", "shares", "diagnostics", "inference", "assignment", "postprocessing"}
    assert by_part.keys() == expected
    models = {
        "FocalRetinaNet",
        "Detectron2 RetinaNet",
        "Detectron2 FCOS",
        "Detectron2 Faster R-CNN",
        "torchvision RetinaNet",
    }
    for part in ("step", "shares", "inference"):
        assert {row["model"] for row in by_part[part]} == models
    number = 2 * len(allocators(record))
    assert len(by_part["assignment"]) == 2 * number
    assert len(by_part["postprocessing"]) == len(parts.STATES) * number
    for row in by_part["shares"]:
        assert sum(row["parts_ms"].values()) == pytest.approx(row["step_ms"], rel=1e-6)
    for row in by_part["diagnostics"]:
        mean = (row["look_ms"] + 19 * row["ordinary_ms"]) / 20
        assert row["share"] == pytest.approx(mean / row["step_ms"])
        assert row["ordinary_ms"] > 0
    (ours,) = [row for row in by_part["shares"] if row["model"] == "FocalRetinaNet"]
    expected = {"backbone", "head", "assignment", "loss", "backward", "optimizer", "rest"}
    assert ours["parts_ms"].keys() == expected
    for heading in ("Training step", "Where a training step goes", "Anchor assignment"):
        assert f"### {heading}" in page


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("benchmark_losses", ["--shapes", "800x1216"], "--shapes must be HEIGHTxWIDTHxCLASSES"),
        ("benchmark_losses", ["--losses", "nope"], "--losses must be among"),
        ("benchmark_model", ["--sizes", "800"], "--sizes must be HEIGHTxWIDTH"),
        ("benchmark_model", ["--losses", "Nope"], "is not in LOSS_REGISTRY"),
    ],
)
def test_a_command_line_that_cannot_be_carried_out(tool, arguments, message):
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *arguments]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert message in result.stderr
