"""What the figures show, and that the files in docs/figures are those of their data."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from written_records import make_trial

from focal_det.lab import figures
from focal_det.lab.summary import summarise
from focal_det.lab.tables import Row, Table
from focal_det.losses import reference

NUMBER = re.compile(r"(?<![\w#])-?\d+(?:\.\d+)?(?:e-?\d+)?(?!\w)")


@pytest.mark.parametrize(
    ("name", "scalar"),
    [
        ("CE", lambda x: reference.cross_entropy(x, 1)),
        ("FL, gamma 2", lambda x: reference.focal(x, 1, None, 2.0)),
        ("FL*, gamma 2, beta 1", lambda x: reference.focal_star(x, 1, None, 2.0, 1.0)),
        ("FL*, gamma 4, beta 0", lambda x: reference.focal_star(x, 1, None, 4.0, 0.0)),
    ],
)
def test_curves_are_the_losses_and_their_derivatives(name, scalar):
    x_t = torch.linspace(-5, 5, 21, dtype=torch.float64)
    values, slopes = figures.loss_of(figures.FORMS[name], x_t)
    expected = [scalar(x) for x in x_t.tolist()]
    assert values.tolist() == pytest.approx([value for value, _ in expected])
    assert slopes.tolist() == pytest.approx([slope for _, slope in expected])


def lines(figure, panel=0):
    return {line.get_label(): line for line in figure.axes[panel].get_lines()}


def test_figure_1_has_the_papers_gammas():
    drawn = lines(figures.figure_1())
    assert {"gamma 0 (CE)", "gamma 0.5", "gamma 1", "gamma 2", "gamma 5"} <= drawn.keys()
    x, y = drawn["gamma 2"].get_data()
    assert y[200] == pytest.approx(
        reference.focal(torch.logit(torch.tensor(x[200])).item(), 1, None)[0]
    )


def test_figure_6_is_the_derivative_of_figure_5():
    values, slopes = lines(figures.figure_5()), lines(figures.figure_6())
    for name in figures.FORMS:
        x, y = values[name].get_data()
        middle = (y[2:] - y[:-2]) / (x[2:] - x[:-2])
        assert slopes[name].get_data()[1][1:-1] == pytest.approx(middle, abs=1e-3)


@pytest.mark.parametrize(
    ("points", "hull"),
    [
        ([(1, 1)], [(1, 1)]),
        ([(1, 1), (2, 3), (3, 4)], [(1, 1), (2, 3), (3, 4)]),
        ([(1, 1), (2, 1.5), (3, 4)], [(1, 1), (3, 4)]),  # below the line between its neighbours
        ([(3, 4), (1, 1), (5, 3)], [(1, 1), (3, 4)]),  # slower and worse
        ([(1, 2), (1, 5), (2, 6)], [(1, 5), (2, 6)]),  # as fast and better
    ],
)
def test_the_hull_is_above_all_points(points, hull):
    assert figures.upper_hull(points) == hull


def test_figure_7_colours_by_the_ap():
    rows = [{"gamma": 2.0, "beta": 1.0, "AP": 30.0}, {"gamma": 1.0, "beta": 0.0, "AP": 10.0}]
    curves = [
        line for line in figures.figure_7(rows).axes[0].get_lines() if len(line.get_xdata()) > 9
    ]
    assert len({str(line.get_color()) for line in curves}) == 3  # two settings and CE


@pytest.fixture
def plot(root):
    def run(*words, status=0):
        command = [sys.executable, str(root / "tools" / "plot.py"), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done.stderr

    return run


def test_the_committed_figures_are_made_from_the_committed_data(plot, root, tmp_path):
    plot("--output", tmp_path)
    made, kept = tmp_path, root / "docs" / "figures"
    names = sorted(path.name for path in made.iterdir())
    assert names == sorted(path.name for path in kept.iterdir() if path.suffix != ".json")
    assert {"figure_1.svg", "figure_2.svg", "figure_5.png", "figure_6.svg"} <= set(names)
    # On one machine the bytes are the same. Another CPU may round a curve's last bit otherwise.
    for name in names:
        if name.endswith(".png"):
            one, two = (np.asarray(Image.open(x / name), dtype=int) for x in (made, kept))
            assert np.abs(one - two).max() <= 8, name
        else:
            one, two = ((x / name).read_text() for x in (made, kept))
            assert NUMBER.sub("", one) == NUMBER.sub("", two), name
            numbers = [list(map(float, NUMBER.findall(text))) for text in (one, two)]
            assert numbers[0] == pytest.approx(numbers[1], abs=1e-4), name


def test_figure_2_has_the_papers_points(root):
    drawn = json.loads((root / "docs" / "figures" / "figure_2.json").read_text())
    paper = json.loads((root / "tests" / "lab" / "paper_tables.json").read_text())
    (points,) = (group for title, group in drawn.items() if title.startswith("The paper"))
    assert sorted(points, key=str) == sorted(paper["figure_2_points"], key=str)


def test_figure_2_names_each_point_by_a_number_in_the_order_of_ap():
    names = ("FocalRetinaNet, a", "FocalRetinaNet, b", "Detectron2 RetinaNet", "FCOS")
    points = [
        {"method": name, "AP": ap, "time_ms": time}
        for name, ap, time in zip(names, (20.0, 20.1, 30.0, 5.0), (10, 11, 80, 60), strict=True)
    ]
    (axes,) = figures.figure_2({"one $ two": points}).axes
    drawn = {line.get_label(): line for line in axes.get_lines()[1:]}
    assert list(drawn) == [
        "1  Detectron2 RetinaNet: 30.0, 80 ms",
        "2  FocalRetinaNet, b: 20.1, 11 ms",
        "3  FocalRetinaNet, a: 20.0, 10 ms",
        "4  FCOS: 5.0, 60 ms",
    ]
    at = [(line.get_xdata()[0], line.get_ydata()[0]) for line in drawn.values()]
    assert at == [(80, 30.0), (11, 20.1), (10, 20.0), (60, 5.0)]
    assert len({(line.get_color(), line.get_marker()) for line in drawn.values()}) == 3
    assert {text.get_text(): text.xy for text in axes.texts} == {
        "1": (80, 30.0), "2": (11, 20.1), "3": (10, 20.0), "4": (60, 5.0),
    }  # fmt: skip
    assert axes.get_title(loc="left") == r"one \$ two"


def test_numbers_of_figure_2_lie_on_no_point_and_no_other_number():
    random = np.random.default_rng(3)
    points = [
        {"method": f"FCOS {index}", "AP": 20 + 2 * ap, "time_ms": 30 + 3 * time}
        for index, (ap, time) in enumerate(random.random((9, 2)))
    ]
    far = {"method": "FCOS", "AP": 40.0, "time_ms": 60.0}
    figure = figures.figure_2({"a cloud and one far away": [*points, far]})
    (axes,) = figure.axes
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without their lines
    at = np.array([axes.transData.transform(text.xy) for text in axes.texts])
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
        assert not any(box.contains(x, y) for x, y in at)
    alone = axes.texts[0]  # of the highest AP
    assert alone.get_text() == "1"
    assert 0 < boxes[0].x0 - at[0][0] < 12


def test_the_same_data_give_the_same_bytes(plot, tmp_path):
    for name in ("one", "two"):
        plot("figure", "5", "--output", tmp_path / name)
    for kind in ("svg", "png"):
        one, two = ((tmp_path / x / f"figure_5.{kind}").read_bytes() for x in ("one", "two"))
        assert one == two


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("figure",), "figure needs a name, one of 1, 2, 4, 5, 6, 7, imbalance"),
        (("figure", "3"), "invalid choice: '3'"),
        (("figure", "1", "--data", "x.json"), "--data is for figure 2, 4, imbalance, 7, got 1"),
        (("figure", "4", "--data", "x.json"), "x.json"),
        (("figure", "7", "--data", "x", "y"), "figure 7 takes one file, got x, y"),
    ],
)
def test_a_command_line_that_cannot_be_carried_out_ends_with_2(plot, words, says):
    assert says in plot(*words, status=2)


def test_data_of_another_kind_is_named(plot, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a": 1}))
    said = plot("figure", "4", "--data", tmp_path / "x.json", "--output", tmp_path, status=2)
    assert f"{tmp_path}/x.json is not what figure 4 is drawn from: KeyError" in said
    words = ("--data", tmp_path / "x.json", tmp_path / "x.json", "--output", tmp_path)
    for name in ("2", "imbalance"):
        assert "each must be a summary" in plot("figure", name, *words, status=2)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("7", {"rows": []}),
        ("2", {}),
        ("2", {"one": []}),
        ("2", {"rows": []}),
        ("4", []),
        ("imbalance", {"rows": [], "background_per_foreground": 9.0}),
    ],
)
def test_data_without_anything_to_draw_are_named(load_tool, tmp_path, name, content):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"x.json is not what figure {name} is drawn from"):
        load_tool("plot").draw(name, [path], tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]


def test_figures_are_drawn_from_what_sweeps_write(plot, load_tool, tmp_path):
    """Of summaries, beside the first of them unless told otherwise."""
    rows = tuple(Row(label, {}) for label in ("FL", "CE"))
    paths = []
    for number in (1, 2):
        found = [
            make_trial("FL", ap=20.0, background_per_foreground=100.0 * number),
            make_trial("CE", ap=10.0 * number, background_per_foreground=100.0 * number),
        ]
        made = summarise(Table("t", "T", "", rows, speed=True), found)
        made["data"] = [f"set {number}"]
        paths.append(tmp_path / f"{number}" / "t.json")
        paths[-1].parent.mkdir()
        paths[-1].write_text(json.dumps(made))
    plot("figure", "2", "--data", *paths)
    assert sorted(x.name for x in (tmp_path / "1").iterdir()) == [
        "figure_2.png", "figure_2.svg", "t.json",
    ]  # fmt: skip
    plot("figure", "imbalance", "--data", *paths, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "figure_imbalance.svg").is_file()
    tool, contents = load_tool("plot"), [json.loads(path.read_text()) for path in paths]
    panels = tool.speed_groups(*contents)
    titles = [f"set {number}; 40 it.; CPU" for number in (1, 2)]
    assert list(panels)[1:] == titles
    assert [point["AP"] for point in panels[titles[1]]] == [20.0, 20.0]
    with pytest.raises(ValueError, match=r"two sweeps of set 1; 40 it\.; CPU"):
        tool.speed_groups(contents[0], contents[0])
    with pytest.raises(ValueError, match=r"set 1; .*: not a table of times, its trials may have"):
        tool.speed_groups({**contents[0], "speed": False})
    traced = tool.over_ratio(*contents)
    assert [x["AP"]["CE"]["mean"] for x in traced["points"]] == [10.0, 20.0]
