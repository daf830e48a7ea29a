"""The benchmarks' measuring, records, targets and page."""

import json
import math

import pytest
import torch

from focal_det.benchmarks import losses, markdown, measure, memory, targets

VERSIONS = dict.fromkeys(measure.VERSIONS, "1.0")
CPU = {"type": "cpu", "name": "AMD EPYC", "threads": 2}
GPU = {"type": "cuda", "name": "NVIDIA H100 80GB HBM3", "threads": None}


class Clock:
    """Time that passes only where a call says so."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def takes(self, name, *seconds):
        left = list(seconds)

        def call():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


WARM = {"allocator": "warm", "peak_mib": None, "peak_s": None, "tensors_s": None}


def loss_row(variant, median, **others):
    row = {
        "part": "loss",
        "loss": targets.FOCAL,
        "variant": variant,
        "dtype": "float32",
        "mode": "forward+backward",
        "shape": targets.SHAPE,
        "images": 1,
        "allocator": "cold",
        "peak_s": 1.0,
        "tensors_s": 1.0,
        "ratio": None,
        "floor_ratio": None,
        "error": None,
    }
    timing = measure.Timing(median, median, median, 3, 55.7)
    return {**row, **timing.fields(), **others}


def make_record(rows, device=CPU, tool="benchmark_losses"):
    return {
        "schema": measure.SCHEMA,
        "tool": tool,
        "command": f"python tools/{tool}.py",
        "commit": "0123456789ab",
        "dirty": False,
        "versions": VERSIONS,
        "device": device,
        "date": "2030-01-02",
        "seed": 0,
        "rows": rows,
    }


def finished(rows):
    """Rows with their ratios, as the tool makes them."""
    keys = ("shape", "dtype", "mode", "allocator")
    measure.add_ratio(rows, keys, lambda row: row["variant"] == "detectron2")
    return rows


def test_variants_take_turns_after_the_warm_up():
    clock = Clock()
    calls = {"a": clock.takes("a", 1.0), "b": clock.takes("b", 2.0)}
    measure.measure(calls, 3, warmup=2, clock=clock, with_peak=False)
    assert clock.calls == ["a", "a", "b", "b"] + ["a", "b"] * 3


def test_median_and_quartiles_of_the_rounds_without_the_warm_up():
    clock = Clock()
    # Sorted, the timed calls take 1, 2, 3, 4, 10 seconds: the quartiles are the 2nd and 4th.
    call = clock.takes("a", 99.0, 10.0, 1.0, 3.0, 2.0, 4.0)
    timing = measure.measure({"a": call}, 5, clock=clock, with_peak=False)["a"]
    assert (timing.median_ms, timing.rounds, timing.peak_mib) == (3e3, 5, None)
    assert (timing.quartile_low_ms, timing.quartile_high_ms) == (2e3, 4e3)


def test_no_further_round_after_the_time_is_up_but_never_too_few():
    clock = Clock()
    timing = measure.measure(
        {"a": clock.takes("a", 1.0)}, 50, seconds=4.5, clock=clock, with_peak=False
    )["a"]
    assert timing.rounds == 5
    timing = measure.measure(
        {"a": clock.takes("a", 60.0)}, 50, seconds=4.5, clock=clock, with_peak=False
    )["a"]
    assert timing.rounds == measure.MIN_ROUNDS


def test_tensors_of_a_call_at_their_most():
    def call():
        x = torch.ones(3 << 20, dtype=torch.uint8)
        y = torch.cat([x, x])  # 9 MiB
        del x
        return y + y  # 12 MiB

    torch.ones(1 << 24)  # before, and so none of it
    assert memory.tensors_mib(call) == pytest.approx(12, abs=0.01)


@pytest.mark.parametrize("setting", losses.SETTINGS)
def test_tensors_of_a_loss_are_the_gradient_and_little_else(setting):
    """At 800x1216 with 80 classes, one image: also OHEM, which looks at boxes."""
    shape = losses.Shape(800, 1216, 80)
    variant = losses.our_variant(losses.Inputs(shape, 1, torch.float32, 0), setting, "torch")
    s_mib = shape.s_bytes(1) / 2**20
    assert 1 <= memory.tensors_mib(variant.call("forward+backward")) / s_mib <= 1.03
    if "OHEM" not in setting:
        assert memory.tensors_mib(variant.call("forward")) / s_mib <= 0.1


def test_one_round_is_its_own_quartiles():
    timing = measure.summarize([7.0], None)
    assert (timing.quartile_low_ms, timing.median_ms, timing.quartile_high_ms) == (7.0, 7.0, 7.0)


def test_peak_of_a_call_counts_what_it_frees_again():
    def call():
        torch.ones(32 << 20, dtype=torch.uint8)  # freed on return

    peak = memory.peak_mib(call)
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 31 <= peak < 48


def test_available_memory_is_a_positive_number():
    assert memory.available_gib() > 0


def test_ratio_is_to_the_baseline_of_the_same_case():
    rows = [
        loss_row("detectron2", 120.0),
        loss_row("torch", 10.0),
        loss_row("torch", 10.0, allocator="warm"),
        loss_row("detectron2", 40.0, allocator="warm"),
        loss_row("torch", 10.0, dtype="float16"),
        loss_row("eager", 1.0, **measure.not_measured("skipped: needs 12.0 GiB")),
    ]
    finished(rows)
    assert [row["ratio"] for row in rows] == [1.0, 10 / 120, 0.25, 1.0, None, None]


@pytest.mark.parametrize(
    ("device", "folder"),
    [
        (CPU, "cpu-amd-epyc-2-threads"),
        (GPU, "nvidia-h100-80gb-hbm3"),
        (
            {"type": "cpu", "name": "Intel(R) Core(TM) i7 @ 2.9GHz", "threads": 1},
            "cpu-intel-core-i7-2-9ghz-1-threads",
        ),
    ],
)
def test_slug(device, folder):
    assert measure.slug(device) == folder


def test_a_record_of_now_is_valid_and_names_no_path(tmp_path):
    typed = measure.without_option(
        ["--quick", "--output", str(tmp_path), "--seed", "3"], "--output"
    )
    record = measure.make_record("benchmark_losses", typed, "cpu", 3, [loss_row("torch", 1.0)])
    measure.validate(record)
    assert record["command"] == "python tools/benchmark_losses.py --quick --seed 3"
    assert record["device"]["threads"] == torch.get_num_threads()
    assert measure.without_option(["--output=x", "--full"], "--output") == ["--full"]


@pytest.mark.parametrize("field", measure.RECORD_FIELDS)
def test_validation_names_a_missing_field(field):
    record = make_record([loss_row("torch", 1.0)])
    measure.validate(record)
    del record[field]
    with pytest.raises(ValueError, match=f"no '{field}'"):
        measure.validate(record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "0"}, "'seed' must not be str"),
        ({"schema": 99}, "schema 99"),
        ({"rows": []}, "no rows"),
        ({"versions": {**VERSIONS, "fvcore": None}}, "versions have no 'fvcore'"),
        ({"device": {"type": "cpu", "name": "x"}}, "device has no 'threads'"),
        ({"rows": [{"part": "other"}]}, "row 0 is of no known part: 'other'"),
        ({"rows": [{"part": "loss"}]}, r"row 0 \(loss\) has no 'loss'"),
        ({"rows": [loss_row("torch", None)]}, "neither a time nor an error"),
    ],
)
def test_validation_names_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        measure.validate({**make_record([loss_row("torch", 1.0)]), **change})


def test_save_writes_strict_json_where_load_finds_it(tmp_path):
    record = make_record([loss_row("torch", 1.0)])
    path = measure.save(record, tmp_path)
    assert path == tmp_path / "cpu-amd-epyc-2-threads" / "benchmark_losses.json"
    assert measure.load_all(tmp_path) == [record]
    with pytest.raises(ValueError, match="JSON compliant"):
        measure.save(make_record([loss_row("torch", math.nan)]), tmp_path)
    path.write_text(json.dumps({**record, "rows": []}))
    with pytest.raises(ValueError, match=r"2-threads/benchmark_losses\.json: .*no rows"):
        measure.load_all(tmp_path)


def test_page_shows_targets_met_and_missed_and_what_is_slower():
    rows = finished(
        [
            loss_row("detectron2", 1000.0, peak_s=13.8),
            loss_row("torch", 80.0, peak_s=1.12, tensors_s=1.02),  # 1/12.5: met
            loss_row("detectron2", 300.0, **WARM),
            loss_row("torch", 75.0, **WARM),  # 1/4: missed
            loss_row("fvcore", 60.0, **WARM),
            loss_row("torchvision", None, **measure.not_measured("skipped: needs 12.0 GiB")),
        ]
    )
    page = markdown.render([make_record(rows)])
    assert f"| focal loss, {targets.SHAPE}, time, cold | <= 1/12 | 1/12.5 | met |" in page
    assert f"| focal loss, {targets.SHAPE}, time, warm | <= 1/5 | 1/4.0 | **missed** |" in page
    memory_of = f"| losses, {targets.SHAPE}, peak memory of"
    assert f"{memory_of} its tensors, the worst of all | <= 1.05 S | 1.02 S | met |" in page
    assert f"{memory_of} the process, the worst of all | <= 1.05 S | 1.12 S | **missed** |" in page
    assert "| assignment, 300 boxes, time, cold | <= 1/4 | not measured |  |" in page
    assert "warm: FL gamma 2 alpha .25 torch takes 1.25x fvcore" in page
    assert "cold: FL gamma 2 alpha .25 torch" not in page
    assert "skipped: needs 12.0 GiB" in page
    cells = "80 (80-80) | 1/12.5 | 75 (75-75) | 1/4.0 | 55.7 | 1.12 | 1.02 | - |"
    assert f"| {targets.FOCAL} | torch | float32 | {cells}" in page
    assert "Not measured on a GPU." in page
    assert "make benchmark" in page
    assert all(line.count("|") == 12 for line in page.splitlines() if "| torch |" in line)


def test_the_worst_loss_decides_on_the_peak():
    rows = [loss_row("torch", 1.0), loss_row("torch", 1.0, loss="OHEM", peak_s=1.4)]
    (peak,) = [x for x in targets.find_targets(rows, "cpu") if "memory of the process" in x.name]
    assert peak.measured.startswith("1.40 S (OHEM")
    assert (peak.met, peak.verdict) == (False, "**missed**")


def test_page_of_a_gpu_has_its_own_targets():
    common = {"images": 16, "allocator": "warm"}
    rows = finished(
        [
            loss_row("detectron2", 30.0, **common),
            loss_row("triton", 0.75, floor_ratio=1.2, **common),
            loss_row("triton", 0.75, dtype="float16", floor_ratio=1.5, **common),
        ]
    )
    sync = {"part": "sync", "model": "FocalRetinaNet", "backbone": "R-50", "size": "512x512"}
    rows.append({**sync, "batch": 16, "passed": False, "error": "called a synchronizing operation"})
    page = markdown.render([make_record(rows, GPU)])
    assert "Not measured on a GPU." not in page
    assert "## NVIDIA H100 80GB HBM3\n" in page
    floor = f"| elementwise losses, {targets.SHAPE}, time over a copy's | <= 1.3x | 1.50x ("
    assert floor in page
    assert "16 images, time | <= 1/25 | 1/40.0 | met |" in page
    assert "| training step, waits for the GPU | none | some | **missed** |" in page
    assert "called a synchronizing operation" in page


def test_page_without_records():
    page = markdown.render([])
    assert "Nothing has been measured yet." in page
    assert "Not measured on a GPU." in page


def test_model_tables():
    timing = measure.Timing(200.0, 190.0, 210.0, 3, 500.0)
    common = {"backbone": "R-50", "size": "256x256", "batch": 2, "amp": "none"}
    step = {"part": "step", **common, "images_per_s": 10.0, **timing.fields()}
    shares = {"part": "shares", **common, "model": targets.OUR_MODEL}
    parts = {"backbone": 50.0, "backward": 150.0}
    cost = {"step_ms": 200.0, "ordinary_ms": 0.5, "look_ms": 30.5, "share": 0.0123}
    rows = [
        {**step, "model": targets.OUR_MODEL, "ratio": 1.02},
        {**step, "model": targets.THEIR_MODEL, "ratio": 1.0},
        {**shares, "step_ms": 200.0, "parts_ms": parts, "error": None},
        {"part": "diagnostics", **common, "model": targets.OUR_MODEL, **cost, "error": None},
    ]
    page = markdown.render([make_record(rows, tool="benchmark_model")])
    assert "| training step, time, worst case | never slower | 1.02x | **missed** |" in page
    assert "| R-50 | 256x256 | 2 | none | 200 (190-210) | 10.00 | 1.02x | 500 |" in page
    assert "| FocalRetinaNet | R-50 | 256x256 | 200 | 25.0% | 75.0% |" in page
    assert "| R-50 | 256x256 | 2 | 200 | 0.50 | 30.50 | 1.23% |" in page
    name = "diagnostics, share of a training step, worst case"
    assert f"| {name} | <= 1% | 1.23% | **missed** |" in page


@pytest.mark.parametrize(("value", "text"), [(0.08, "1/12.5"), (1.3, "1.30x"), (1.0, "1.00x")])
def test_ratio_in_words(value, text):
    assert targets.as_ratio(value) == text
