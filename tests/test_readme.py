"""What the README and docs/results.md tell a reader to type works: it is parsed, run or merged.

`make demo` itself is run by the demo's own test, training by test_entry_points.py.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, get_cfg
from detectron2.modeling import build_model
from written_records import make_trial, write_sweep

import focal_det
from focal_det.data import DigitsClutterSpec, generate

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
RESULTS = (ROOT / "docs" / "results.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README + RESULTS, re.S)).replace("\\\n", " ")
COMMANDS = [line.split("  #")[0].strip() for line in SHELL.splitlines()]
COMMANDS = [line for line in COMMANDS if line and not line.startswith("#")]
TRAININGS = [line for line in COMMANDS if "train_net.py" in line]
REPORTS = [line for line in COMMANDS if "tools/report.py" in line]
ANALYSES = [line for line in COMMANDS if "tools/analyze.py imbalance" in line]
LOSS_CDF = [line for line in COMMANDS if "tools/analyze.py loss-cdf" in line]
DATA = [line for line in COMMANDS if line.startswith("python -m focal_det.data.digits_clutter")]
SWEEPS = [line for line in COMMANDS if re.search(r"tools/(?:ablate|benchmark_detectors)", line)]


def test_every_command_is_of_a_kind_that_is_tested():
    known = ("make demo", "make test", "export FOCAL_DET_DATASETS=")
    tested = [*TRAININGS, *SWEEPS, *REPORTS, *ANALYSES, *LOSS_CDF, *DATA]
    others = [line for line in COMMANDS if line not in tested and not line.startswith(known)]
    assert others == []
    assert len(SWEEPS) == 6
    assert len(ANALYSES) == len(DATA) == 2
    assert len(REPORTS) == len(LOSS_CDF) == 1
    assert len(TRAININGS) >= 8


@pytest.mark.parametrize("command", TRAININGS)
def test_training_command_names_a_config_and_keys_that_exist(command, tmp_path, monkeypatch):
    words = shlex.split(command)
    while "=" in words[0]:  # environment variables
        words.pop(0)
    assert words.pop(0) == "python"
    assert words.pop(0) in ("tools/train_net.py", "$D2/tools/train_net.py")
    if words[0] == "--num-gpus":
        assert int(words[1]) > 0
        words = words[2:]
    assert words.pop(0) == "--config-file"
    config, options = ROOT / words[0], words[1:]
    if config.suffix == ".py":
        LazyConfig.apply_overrides(LazyConfig.load(str(config)), options)
        return
    cfg = get_cfg()
    focal_det.add_config(cfg)
    cfg.merge_from_file(str(config))
    cfg.merge_from_list([word for word in options if not is_plugin_key(options, word)])


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """The data sets of the reader, for processes that are started."""
    folder = tmp_path / "cells"
    generate(DigitsClutterSpec(train_images=1, val_images=1), folder)
    entries = [
        f"{name}_{x}:{folder}/{x}.json:{folder}/images/{x}"
        for name in ("cells", "bccd")
        for x in ("train", "val")
    ]
    monkeypatch.setenv("FOCAL_DET_DATASETS", ",".join(entries))


@pytest.mark.parametrize("command", SWEEPS)
def test_a_sweep_is_understood_up_to_its_last_trial(command, cells, tmp_path):
    """What a trial does is tested in tests/lab."""
    words = shlex.split(command)
    assert words.pop(0) == "python"
    done = subprocess.run(
        [sys.executable, *words, "--dry-run", "--output", tmp_path / "nothing_is_done"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seeds = int(words[words.index("--seeds") + 1])
    assert len(re.findall(r"^[0-9a-f]{12}  table ", done.stdout, re.M)) % seeds == 0
    assert f"seed {seeds}: " in done.stdout


@pytest.mark.parametrize("command", REPORTS)
def test_a_page_is_made_of_what_the_sweeps_write(command, tmp_path):
    words = shlex.split(command)
    assert words == ["python", "tools/report.py", "output/ablate"]  # where tools/ablate.py writes
    assert 'else "output/ablate"' in (ROOT / "tools" / "ablate.py").read_text()
    write_sweep(tmp_path / words[2], [make_trial()])
    done = subprocess.run(
        [sys.executable, ROOT / words[1], words[2]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / words[2] / "summary.html").is_file()


@pytest.mark.parametrize("command", ANALYSES)
def test_data_are_put_beside_what_was_measured(command, cells):
    words = shlex.split(command)
    assert words.pop(0) == "python"
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[:2]
    assert re.match(
        r"(cells|digits_clutter)_train: [\d,]+ background anchors to each foreground one ", first
    )
    assert re.match(r"Measured nearest to it: [\d,]+ to one \(digits_[\w /]+\), ", second)


def test_figure_4_is_made_as_docs_say(tmp_path):
    """With two scenes instead of thousands, and weights that have learnt nothing."""
    words = shlex.split(DATA[-1].replace("datasets/many", str(tmp_path / "many")))
    words[words.index("--val-images") + 1] = "2"
    words[words.index("--empty-fraction") + 1] = "0"  # both hold a digit
    made = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    cfg = get_cfg()
    focal_det.add_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "demo" / "focal_retinanet_digits.yaml"))
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "config.yaml").write_text(cfg.dump())
    weights = build_model(cfg).state_dict()
    torch.save({"model": weights}, tmp_path / "RUN" / "model_final.pth")
    line = LOSS_CDF[0].replace("datasets/many", str(tmp_path / "many"))
    line = line.replace("RUN/", f"{tmp_path}/RUN/").replace("docs/figures", str(tmp_path))
    words = shlex.split(line)
    name, value = words.pop(0).split("=", 1)
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=ROOT,
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "figure_4.json").read_text())["images"] == 2


def is_plugin_key(options, word):
    """The README's own loss is registered in a process of its own, by test_entry_points.py."""
    key = "MODEL.FOCAL_DET.POLY_FOCAL_LOSS.EPSILON"
    return key in options and word in (key, options[options.index(key) + 1])


def test_library_block_runs(monkeypatch):
    (block,) = [block for block in PYTHON if "# 3. a library" in block]
    monkeypatch.chdir(ROOT)
    scope = {}
    exec(block, scope)
    assert type(scope["model"]).__name__ == "FocalRetinaNet"
    assert type(scope["model"].cls_loss).__name__ == "OHEMLoss"


def test_a_loss_of_your_own_takes_at_most_15_lines():
    (block,) = [block for block in PYTHON if "class " in block]
    (loss,) = [node for node in ast.parse(block).body if isinstance(node, ast.ClassDef)]
    assert loss.end_lineno - loss.decorator_list[0].lineno + 1 <= 15


@pytest.mark.parametrize("module", ["focal_det.data.digits_clutter", "focal_det.doctor"])
def test_modules_that_are_named_run(module):
    assert f"python -m {module}" in README
    arguments = ["--help"] if "data" in module else []
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_table_of_losses_is_up_to_date():
    result = subprocess.run(
        [sys.executable, ROOT / "tools" / "docs.py", "--check"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_make_targets_exist():
    for target in re.findall(r"make (\w+)", README):
        result = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    for link in links:
        path, _, part = link.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), link
        if part:
            assert part in anchors(there.read_text()), link
    for path in re.findall(r"`((?:configs|tools|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def anchors(text):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
