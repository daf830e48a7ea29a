"""Bad inputs give what docs/bad_inputs.json says: a clear error or a documented handling."""

import json
import re
import sys
from importlib import metadata

import pytest
from bad_inputs import CASES, OUTCOMES, ROOT, outcome, render

COMMITTED = json.loads(OUTCOMES.read_text(encoding="utf-8"))


def versions_are_the_pinned_ones():
    """Whether messages of other packages are those that the table was made with."""
    pins = re.findall(
        r"^([\w-]+)==([\w.]+)",
        "\n".join(path.read_text() for path in sorted((ROOT / "requirements").glob("*.txt"))),
        re.M,
    )
    installed = {x.metadata["Name"].lower(): x.version for x in metadata.distributions()}
    pinned = {"torch", "pillow", "numpy", "sal-detectron2", "yacs", "fvcore"}
    here = {name: installed.get(name, "").split("+")[0] for name in pinned}
    return sys.version_info[:2] == (3, 11) and here == {k: v for k, v in pins if k in pinned}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.area}: {case.input}")
def test_a_bad_input_gives_what_the_table_says(case, tmp_path):
    text = outcome(case, tmp_path)
    (stated,) = [
        each["outcome"]
        for each in COMMITTED
        if (each["area"], each["input"]) == (case.area, case.input)
    ]
    if text != stated and not versions_are_the_pinned_ones():
        pytest.skip("messages of other versions of Detectron2 or PyTorch differ")
    assert text == stated, "python tests/bad_inputs.py makes docs/bad_inputs.json anew"


def test_the_table_has_each_case_once_and_nothing_else():
    cases = [(case.area, case.input) for case in CASES]
    assert len(set(cases)) == len(cases) >= 45
    assert [(each["area"], each["input"]) for each in COMMITTED] == cases


def test_every_case_asks_for_something():
    """Not only for an exception: for what is wrong, by name or value."""
    for case in CASES:
        assert case.says, case.input
        assert all(len(part) >= 4 for part in case.says), case.input


def test_nothing_of_a_machine_is_in_the_table():
    text = OUTCOMES.read_text(encoding="utf-8")
    for part in (str(ROOT), "/tmp", "/home", "/root", "site-packages", "0x"):
        assert part not in text, part


def test_an_outcome_that_is_not_asked_for_is_an_error(tmp_path):
    case = next(each for each in CASES if each.raises is ValueError)
    for changed in (
        case._replace(raises=None),
        case._replace(raises=TypeError),
        case._replace(says=("what it does not say",)),
        case._replace(attempt=lambda folder: "nothing happens"),
    ):
        with pytest.raises(AssertionError, match=re.escape(case.input)):
            outcome(changed, tmp_path)


def test_the_markdown_has_a_table_for_each_area():
    page = render(COMMITTED)
    areas = list(dict.fromkeys(each["area"] for each in COMMITTED))
    assert re.findall(r"^### (.+)$", page, re.M) == areas
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == len(COMMITTED) + len(areas)
    for row in rows:  # two cells, and no bar that would make a third
        assert len(re.findall(r"(?<!\\)\|", row)) == 3
    tricky = {"area": "A", "input": "a | `c`", "outcome": "<b> | *x*\n[y] _z_ `t` \\ $q$"}
    assert render([tricky]) == (
        "### A\n\n| input | what it gives |\n|---|---|\n"
        "| a \\| `c` | \\<b\\> \\| \\*x\\* \\[y\\] \\_z\\_ \\`t\\` \\\\ \\$q\\$ |\n"
    )
