"""AP over the ratio, and the advice drawn from it, against numbers worked out by hand."""

import pytest

from focal_det.lab import figures, imbalance


def metric(*values):
    return {"mean": sum(values) / len(values), "sd": None, "values": list(values)}


def summary(ratio, **rows):
    """A summary of one data set: seeds' APs by label, None for a row that was not run."""
    return {
        "data": [f"set {ratio}"],
        "iterations": [10],
        "commits": ["abc"],
        "devices": ["CPU"],
        "background_per_foreground": ratio,
        "rows": [
            {
                "label": label,
                "overrides": {"MODEL.FOCAL_DET.LOSS.NAME": f"{label}Loss"},
                "metrics": {"AP": metric(*values) if values else {"mean": None, "values": []}},
            }
            for label, values in rows.items()
        ],
    }


@pytest.fixture
def traced():
    return imbalance.trace(
        [
            summary(1000.0, CE=[4.0, 6.0], FL=[9.0, 11.0], OHEM=[8.0, 9.0]),
            summary(50.0, CE=[30.0, 31.0, 32.0], FL=[20.0, 21.0, 22.0], OHEM=None),
            summary(None, CE=[1.0]),
        ],
        clipped=True,
    )


def test_points_rise_and_what_was_not_run_is_left_out(traced):
    assert [point["background_per_foreground"] for point in traced["points"]] == [50.0, 1000.0]
    assert [sorted(point["AP"]) for point in traced["points"]] == [
        ["CE", "FL"],
        ["CE", "FL", "OHEM"],
    ]
    name = "MODEL.FOCAL_DET.LOSS.NAME"
    expected = {label: {name: f"{label}Loss"} for label in ("CE", "FL", "OHEM")}
    assert traced["settings"] == expected


def test_shares_are_of_the_best_at_each_point(traced):
    assert imbalance.relative(traced, "CE") == pytest.approx([100.0, 50.0])
    assert imbalance.relative(traced, "FL") == pytest.approx([100 * 21 / 31, 100.0])
    assert imbalance.relative(traced, "OHEM") == [None, pytest.approx(85.0)]


@pytest.mark.parametrize(
    ("ratio", "nearest", "inside"),
    # The middle of 50 and 1000 on a logarithmic axis is their geometric mean, 223.6.
    [(10.0, 50.0, False), (223.0, 50.0, True), (224.0, 1000.0, True), (1e5, 1000.0, False)],
)
def test_the_nearest_point_is_the_nearest_of_a_logarithmic_axis(traced, ratio, nearest, inside):
    advice = imbalance.advise(ratio, traced)
    assert advice["point"]["background_per_foreground"] == nearest
    assert advice["inside"] is inside


def test_who_cannot_be_told_from_the_best_is_named_with_it(traced):
    advice = imbalance.advise(1000.0, traced)
    assert advice["ranked"] == ["FL", "OHEM", "CE"]
    assert advice["first"] == ["FL", "OHEM"]  # 9, OHEM's best seed, reaches 9, FL's worst
    assert imbalance.advise(50.0, traced)["first"] == ["CE"]


@pytest.mark.parametrize(
    "rows",
    [
        {"CE": [30.0], "FL": [10.0]},
        {"CE": [9.0], "FL": [30.0, 31.0, 32.0]},
        {"CE": [30.0, 31.0], "FL": [9.0]},
        {"CE": [30.0, 31.0], "FL": [9.0, 9.0]},  # a third of all pairs of rows that are alike
        {"CE": [0.0, 0.0], "FL": [0.0, 0.0]},
    ],
)
def test_one_seed_tells_nobody_apart_and_neither_does_no_ap(rows):
    assert imbalance.advise(50.0, imbalance.trace([summary(50.0, **rows)], True))["first"] is None


@pytest.mark.parametrize(("ratio", "says"), [(0.0, "above 0"), (5.0, "nothing|no ratio")])
def test_what_cannot_be_advised_on_is_said(traced, ratio, says):
    with pytest.raises(ValueError, match=says):
        imbalance.advise(ratio, traced if ratio == 0.0 else imbalance.trace([], True))


def test_the_figure_shows_means_and_shares(traced):
    left, right = figures.figure_imbalance(traced).axes
    assert [left.get_xscale(), right.get_xscale()] == ["log", "log"]
    means = {line.get_label(): line.get_data() for line in left.get_lines()}
    assert [list(part) for part in means["CE"]] == [[50.0, 1000.0], [31.0, 5.0]]
    assert [list(part) for part in means["OHEM"]] == [[1000.0], [8.5]]
    assert [list(part) for part in right.get_lines()[0].get_data()] == [[50, 1000], [100, 50]]


@pytest.fixture
def analyze(load_tool):
    return load_tool("analyze")


def test_the_command_says_how_rare_foreground_is(
    analyze, few, monkeypatch, tmp_path, capsys, traced
):
    measured = tmp_path / "measured.json"
    monkeypatch.setattr(analyze, "MEASURED", measured)
    config = str(analyze.ROOT / "configs" / "demo" / "focal_retinanet_digits.yaml")
    words = ["imbalance", "--data", few, "--config-file", config]
    assert analyze.main(words) == 1
    assert "measured.json is missing" in capsys.readouterr().err
    analyze.records.save(traced, measured)
    assert analyze.main(words) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    found = analyze.count_anchors(analyze.parse(words).cfg)
    assert first.startswith(f"few_train: {found['background_per_foreground']:,.0f} background anch")
    assert "(6 images looked at" in first
    assert any(line.startswith("Try first: ") for line in rest)
    # Larger anchors, of a larger image: another ratio.
    assert analyze.main([*words, "INPUT.MIN_SIZE_TEST", "256", "INPUT.MAX_SIZE_TEST", "256"]) == 0
    assert capsys.readouterr().out.splitlines()[0] != first


def test_the_description_says_what_is_a_hint_only(analyze, traced):
    said = analyze.describe(5e4, traced, True)
    assert "lies outside of what was measured" in said
    assert "Try first: FL.\n  MODEL.FOCAL_DET.LOSS.NAME FLLoss\n" in said
    assert "do not tell apart from it: OHEM." in said
    assert "AP  10.0  (by seed: 9.0, 11.0)" in said
    assert "CLIP_GRADIENTS" not in said
    alone = imbalance.trace([summary(50.0, CE=[30.0], FL=[10.0])], True)
    assert "too little to say which to try first" in analyze.describe(50.0, alone, True)
    # Without them focal loss was behind where it is ahead here.
    warned = "Measured with SOLVER.CLIP_GRADIENTS.ENABLED True, and your config says False."
    assert warned in analyze.describe(50.0, alone, False)


@pytest.mark.parametrize("content", ["{", "[]", '{"points": []}', '{"points": [{}]}'])
def test_measurements_that_cannot_be_read_are_named(
    analyze, few, tmp_path, monkeypatch, capsys, content
):
    measured = tmp_path / "measured.json"
    measured.write_text(content)
    monkeypatch.setattr(analyze, "MEASURED", measured)
    config = str(analyze.ROOT / "configs" / "demo" / "focal_retinanet_digits.yaml")
    assert analyze.main(["imbalance", "--data", few, "--config-file", config]) == 2
    assert f"{measured} cannot be read: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("annotations", "says"),
    [
        ("{", "few/train.json cannot be read as COCO annotations: JSONDecodeError: Expecting"),
        (None, "train.json"),
    ],
)
def test_annotations_that_cannot_be_read_end_with_2(
    analyze, few, tmp_path, capsys, annotations, says
):
    path = tmp_path / "few" / "train.json"
    path.write_text(annotations) if annotations else path.unlink()
    assert analyze.main(["imbalance", "--data", few]) == 2
    assert says in capsys.readouterr().err


def test_an_unknown_set_ends_with_2(analyze, capsys):
    with pytest.raises(SystemExit) as stop:
        analyze.main(["imbalance", "--data", "nowhere"])
    assert stop.value.code == 2
    assert "neither 'nowhere_train' nor 'nowhere' is registered" in capsys.readouterr().err
