"""The page that compares classification losses, drawn from their records alone.

``results`` is what ``tools/demo.py`` keeps in ``results.json``: ``settings`` that all runs share,
``pictures`` with their objects, and one of ``records`` a loss.
"""

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import drawing, figures, page, records

DATA_SETS = {
    "digits_clutter_val": "handwritten digits among torn pieces of digits and strokes of a pen"
}
EXPLANATIONS = {
    "CrossEntropyLoss": (
        "Counts every anchor alike. An easy background anchor costs next to nothing, but there are "
        "so many that together they can outweigh the few anchors on objects."
    ),
    "BalancedCrossEntropyLoss": (
        "Gives foreground and background one fixed weight each. That makes up for how many there "
        "are, not for how easy they are."
    ),
    "OHEMLoss": (
        "Picks the anchors of each image with the highest loss and learns from these alone; all "
        "others count nothing, however many they are."
    ),
    "FocalLoss": (
        "Uses all anchors but turns each one's loss down the surer the detector already is of it: "
        "by (1 - p)^gamma, where p is the probability it gives to the truth."
    ),
    "FocalLossStar": (
        "A relative of the focal loss: cross entropy of a steeper, shifted logit, which fades just "
        "as fast for anchors that are already clear."
    ),
    "HingeLoss": "Stops caring about an anchor once the truth is likely enough.",
}


def write_report(results: dict[str, Any], folder: Path) -> Path:
    """Write ``report.html``.

    Args:
        results: see above.
        folder: where the page goes and the files of ``pictures`` are.

    Returns:
        The page's path.
    """
    path = folder / "report.html"
    path.write_text(render(results, folder), encoding="utf-8")
    return path


def render(results: dict[str, Any], folder: Path) -> str:
    """The page as a string; arguments as for :func:`write_report`."""
    name = title(results)
    header = f"<h1>{escape(name)}</h1>\n" + introduction(results)
    main = [*sections(results, folder), _next_steps(results["settings"])]
    return page.page(name, header, "\n".join(main), _footer(results))


def title(results: dict[str, Any]) -> str:
    """What was compared, as plain text."""
    count = page.count(len(results["records"]), "classification loss", "classification losses")
    return f"One detector, {count}"


def sections(results: dict[str, Any], folder: Path, place: page.Place = figures.TOP) -> list[str]:
    """What came of the comparison: table, losses, curves and pictures, some maybe empty.

    Args:
        results: see above.
        folder: where the files of ``pictures`` are.
        place: of the sections.
    """
    settings, runs = results["settings"], results["records"]
    return [
        _results(runs, settings, place),
        _losses(runs, place),
        figures.charts(runs, place),
        figures.pictures(results, folder, place),
    ]


def introduction(results: dict[str, Any]) -> str:
    """What was done, and how rare foreground was."""
    settings, runs = results["settings"], results["records"]
    iterations, batch, data = (settings[k] for k in ("iterations", "images_per_step", "test"))
    wanted = DATA_SETS.get(data, f"the objects of {data}")
    return (
        f'<p class="lead">A dense detector learned to find {escape(wanted)}, once with each loss: '
        "from the same initial weights, on the same images in the same order, for "
        f"{iterations:,} steps of {page.count(batch, 'image', 'images')}. "
        "Only the classification loss differs.</p>\n" + _imbalance(runs)
    )


def _imbalance(runs: Sequence[dict[str, Any]]) -> str:
    """How rare foreground is, in three numbers; nothing if no run got that far."""
    for run in runs:
        anchors, positives = run["anchors_per_image"], records.mean(run["curves"]["positives"])
        if anchors and positives:
            facts = (
                (f"{anchors:,}", "anchors judged in each image"),
                (f"{positives:.1f}", "of them lie on an object, on average"),
                (f"1 : {(anchors - positives) / positives:,.0f}", "foreground to the rest"),
            )
            items = "".join(f"<li><strong>{n}</strong> {text}</li>\n" for n, text in facts)
            return (
                f'<ul class="facts">\n{items}</ul>\n'
                "<p>This imbalance is what dense detectors have to cope with, and what the losses "
                "below deal with in different ways (Lin et al., Focal Loss for Dense Object "
                "Detection, arXiv 1708.02002).</p>"
            )
    return ""


def _results(runs: Sequence[dict[str, Any]], settings: dict[str, Any], place: page.Place) -> str:
    best = records.best(runs)
    highest = max((run["metrics"]["AP"] or 0.0 for run in runs), default=0.0)
    rows = [
        _result_row(run, drawing.STYLES[i % len(drawing.STYLES)].color, i == best, highest)
        for i, run in enumerate(runs)
    ]
    head = ("Loss", *records.METRICS, "Training", "Evaluation")
    caption = (
        f"Box AP in percent on {settings['test']} ({settings['test_images']:,} images, "
        f"{settings['test_objects']:,} objects)"
    )
    return place.section(
        "Result",
        f"<p>{_verdict(runs)}</p>\n"
        + place.table(caption, head, rows)
        + '\n<p class="soft">AP is the mean of the average precision at the overlaps .50, .55, … '
        ".95, AP50 and AP75 that at a single one; s, m and l stand for objects below 32², up to "
        "96² and above 96² pixels, as COCO counts. A dash means that there was nothing to score: "
        "no object of that size, or no detection that reached "
        "<code>MODEL.RETINANET.SCORE_THRESH_TEST</code>.</p>\n" + _per_class(runs, settings, place),
    )


def _verdict(runs: Sequence[dict[str, Any]]) -> str:
    """One sentence on the outcome, in HTML."""
    best = records.best(runs)
    if best is None:
        return (
            "No loss has led to an AP above 0 yet. After so few steps that is to be expected; "
            "let it run for longer."
        )
    # Rounded before they are subtracted, so that the gap is the one that the table shows.
    ranked = sorted(
        ((round(run["metrics"]["AP"] or 0.0, 1), run["loss"]) for run in runs),
        key=lambda pair: -pair[0],
    )
    text = f"<b>{escape(runs[best]['loss'])}</b> has the highest AP, {ranked[0][0]:.1f}"
    if len(ranked) > 1:
        text += f", {ranked[0][0] - ranked[1][0]:.1f} above {escape(ranked[1][1])}, the next"
    return (
        text + ". This is one run for each loss with one seed, so a small gap may be chance: "
        'another <code class="nowrap">--seed</code> shows how far the numbers move.'
    )


def _result_row(run: dict[str, Any], color: str, is_best: bool, highest: float) -> str:
    name = f"<code>{escape(run['loss'])}</code>"
    if run["error"]:
        return (
            f'<tr><th scope="row">{name}</th><td class="failed" '
            f'colspan="{len(records.METRICS) + 2}">{escape(run["error"])}</td></tr>'
        )
    metrics = run["metrics"]
    share = 100 * (metrics["AP"] or 0.0) / highest if highest else 0.0
    bar = f'<span class="bar"><i style="width:{share:.1f}%;background:{color}"></i></span>'
    cells = [f"<b>{page.number(metrics['AP'])}</b>{bar}"]
    cells += [page.number(metrics[key]) for key in records.METRICS[1:]]
    cells += [f"{page.number(run['seconds'][part], 0)} s" for part in ("training", "evaluation")]
    badge = '<span class="badge">best AP</span>' if is_best else ""
    return page.row(name + badge, cells, css_class="best" if is_best else "")


def _per_class(runs: Sequence[dict[str, Any]], settings: dict[str, Any], place: page.Place) -> str:
    names = list(settings["objects_per_class"])
    if not any(run["per_class"] for run in runs):
        return ""
    counts = page.row("objects", [str(n) for n in settings["objects_per_class"].values()])
    rows = [
        page.row(
            f"<code>{escape(run['loss'])}</code>",
            [page.number(run["per_class"].get(name)) for name in names],
        )
        for run in runs
    ]
    return (
        "<details>\n<summary>AP of each class</summary>\n"
        + place.table("AP in percent by class", ("Loss", *names), [counts, *rows])
        + "\n</details>"
    )


def _losses(runs: Sequence[dict[str, Any]], place: page.Place) -> str:
    items = []
    for i, run in enumerate(runs):
        color = drawing.STYLES[i % len(drawing.STYLES)].color
        text = EXPLANATIONS.get(run["loss"], run["summary"])
        items.append(
            f'<div style="border-color:{color}"><dt>{escape(run["loss"])}</dt>'
            f"<dd>{escape(text)}</dd>"
            f'<dd class="soft"><code>{escape(run["description"])}</code></dd></div>'
        )
    return place.section(
        "What the losses do", '<dl class="losses">\n' + "\n".join(items) + "\n</dl>"
    )


def _next_steps(settings: dict[str, Any]) -> str:
    blocks = "".join(
        f"<h3>{escape(what)}</h3>\n"
        # Long lines scroll by themselves: whoever has no mouse must get there.
        f'<pre tabindex="0" role="region" aria-label="{escape(what)}: command"><code>'
        f"{escape(command)}</code></pre>\n"
        for what, command in next_commands(settings)
    )
    return figures.TOP.section("Go on from here", blocks)


def next_commands(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """What to type next: titles and shell commands, to be run where the demo was started."""
    python, config = settings["python"], shlex.quote(settings["config_file"])
    train = f"{python} tools/train_net.py --config-file {config}"
    demo = f"{python} tools/demo.py"
    return [
        (
            "Train with another loss, or other settings of it",
            f"{train} \\\n    OUTPUT_DIR output/focal_star \\\n"
            "    MODEL.FOCAL_DET.LOSS.NAME FocalLossStar MODEL.FOCAL_DET.FL_STAR.GAMMA 4.0",
        ),
        (
            "Compare losses of your choice, with another seed",
            f"{demo} --config-file {config} \\\n    --losses FocalLoss FocalLossStar HingeLoss "
            "--seed 1 --output output/comparison",
        ),
        (
            "Train on your own data (COCO format; NUM_CLASSES without background)",
            "export FOCAL_DET_DATASETS="
            "my_train:my/train.json:my/images,my_val:my/val.json:my/images\n"
            f"{train} \\\n    OUTPUT_DIR output/my_data \\\n"
            "    DATASETS.TRAIN \"('my_train',)\" DATASETS.TEST \"('my_val',)\" \\\n"
            "    MODEL.RETINANET.NUM_CLASSES 3",
        ),
        (
            "Draw this page again from its records",
            f"{demo} --report-only --output {shlex.quote(settings['output'])}",
        ),
    ]


def _footer(results: dict[str, Any]) -> str:
    settings, runs = results["settings"], results["records"]
    pairs = [
        ("command", settings["command"]),
        ("config", settings["config_file"]),
        ("seed", str(settings["seed"])),
        ("data", f"{', '.join(settings['train'])} / {settings['test']}"),
    ]
    if runs:
        environment = runs[-1]["environment"]
        pairs += [(key, str(value or "unknown")) for key, value in environment.items()]
        pairs.append(("finished", runs[-1]["finished"]))
    return (
        "<h2>How this page came about</h2>\n"
        + page.definitions(pairs)
        + '\n<p class="soft">Numbers, curves, settings and boxes are in <code>results.json</code> '
        "beside this page; each loss has a folder with its log, its config and its weights.</p>"
    )
