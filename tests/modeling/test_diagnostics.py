"""What a training step says of itself, against numbers counted by hand."""

import json
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage, JSONWriter

from focal_det.losses import CrossEntropyLoss, OHEMLoss
from focal_det.modeling import diagnostics as diagnostics_module
from focal_det.modeling.diagnostics import PATIENCE, PERIOD, TrainingDiagnostics, hardest_share


def step(model, batch, iteration=0):
    """Scalars of one training step."""
    with EventStorage(iteration) as storage:
        model(batch)
    return {name: value for name, (value, _) in storage.latest().items()}


def test_positives_of_the_levels_add_up_and_the_normalizer_is_what_was_divided_by(
    small_cfg, make_batch
):
    small_cfg.MODEL.FOCAL_DET.NORMALIZER.NAME = "batch"
    model, batch = build_model(small_cfg), make_batch((3, 2))
    scalars = step(model, batch)
    levels = {name: x for name, x in scalars.items() if name.startswith("positives/")}
    assert set(levels) == {f"positives/p{level}" for level in range(3, 8)}
    assert sum(levels.values()) == pytest.approx(scalars["num_pos_anchors"])
    assert sum(value > 0 for value in levels.values()) > 1
    images = model.preprocess_image(batch)
    anchors = model.anchor_generator(
        [model.backbone(images.tensor)[x] for x in ["p3", "p4", "p5", "p6", "p7"]]
    )
    labels, _ = model.label_anchors(anchors, [x["instances"] for x in batch])
    first = len(anchors[0])
    counted = [int(((x[:first] >= 0) & (x[:first] < 5)).sum()) for x in labels]
    assert levels["positives/p3"] == sum(counted) / 2
    foreground = sum(int(((x >= 0) & (x < 5)).sum()) for x in labels)
    assert scalars["normalizer"] == foreground


def test_the_hardest_share_is_that_of_a_sort():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(2, 1000, generator=generator) ** 8
    background = torch.rand(2, 1000, generator=generator) < 0.9
    hardest = total = 0.0
    for row, flags in zip(losses.tolist(), background.tolist(), strict=True):
        kept = sorted((x for x, flag in zip(row, flags, strict=True) if flag), reverse=True)
        hardest, total = hardest + sum(kept[:10]), total + sum(kept)
    assert float(hardest_share(losses, background)) == pytest.approx(hardest / total)
    assert float(hardest_share(torch.zeros(1, 50), torch.ones(1, 50, dtype=torch.bool))) == 0


def test_focal_loss_has_more_of_it_in_the_hardest(small_cfg, make_batch):
    """At the same logits: what the paper's Figure 4 shows."""
    shares = {}
    for name in ("CrossEntropyLoss", "FocalLoss"):
        torch.manual_seed(0)
        small_cfg.MODEL.FOCAL_DET.LOSS.NAME = name
        model = build_model(small_cfg)
        torch.nn.init.normal_(model.head.cls_score.weight, std=0.5)
        shares[name] = step(model, make_batch((3, 2)))["classification/hardest_percent"]
    assert 1 < shares["CrossEntropyLoss"] < shares["FocalLoss"] <= 100


def test_every_anchor_is_looked_at_now_and_then_only(small_cfg, make_batch):
    model, batch = build_model(small_cfg), make_batch((2,))
    for iteration in (0, 1, PERIOD - 1, PERIOD):
        there = "classification/hardest_percent" in step(model, batch, iteration)
        assert there == (iteration % PERIOD == 0)


def test_a_line_of_metrics_json_has_all_scalars(small_cfg, make_batch, tmp_path):
    """Detectron2's writer makes a line of each iteration that a scalar is from."""
    model, batch = build_model(small_cfg), make_batch((2,))
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    with EventStorage(0) as storage:
        for _ in range(3):
            model(batch)
            storage.step()
        storage.iter = 2
        writer.write()
    writer.close()
    (line,) = (tmp_path / "metrics.json").read_text().splitlines()
    assert {"classification/hardest_percent", "normalizer", "positives/p7"} <= json.loads(
        line
    ).keys()


def test_ohem_says_what_it_keeps(small_cfg, make_batch):
    small_cfg.MODEL.FOCAL_DET.LOSS.NAME = "OHEMLoss"
    small_cfg.MODEL.FOCAL_DET.OHEM.BATCH_SIZE = 8
    small_cfg.MODEL.FOCAL_DET.OHEM.NEG_POS_RATIO = 3.0
    scalars = step(build_model(small_cfg), make_batch((3, 2)))
    assert scalars["ohem/kept_foreground"] == 2
    assert scalars["ohem/kept_background"] == 6
    assert "classification/hardest_percent" not in scalars


def test_what_ohem_keeps_is_counted_by_image():
    logits = torch.tensor([[[3.0], [-3.0], [0.0]], [[3.0], [-3.0], [0.0]]])
    labels = torch.tensor([[0, 1, 1], [1, 1, 1]])
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 20, 29, 29], [40, 40, 49, 49]]).expand(2, 3, 4)
    loss = OHEMLoss(batch_size=3)
    loss.per_image([logits], [labels], [boxes])
    assert {name: float(x) for name, x in loss.report.items()} == {
        "ohem/kept_foreground": 0.5,
        "ohem/kept_background": 2.5,
    }


def test_the_loss_of_each_anchor_is_the_sum_of_its_terms():
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(-1, 6, (2, 3, 4), generator=torch.Generator().manual_seed(1))
    loss = CrossEntropyLoss()
    made = loss.per_anchor([logits, logits], [labels, labels])
    expected = loss.elementwise(logits, labels).sum(-1).flatten(1)
    torch.testing.assert_close(made, torch.cat([expected, expected], dim=1))
    assert OHEMLoss().per_anchor([logits], [labels]) is None


@pytest.mark.parametrize("without", [PATIENCE - 1, PATIENCE, 3 * PATIENCE])
def test_steps_without_positives_are_worth_one_warning(monkeypatch, without):
    diagnostics = TrainingDiagnostics()
    storage = SimpleNamespace(iter=1, put_scalar=lambda name, value: None, latest=dict)
    background = torch.ones(1, 4, dtype=torch.bool)
    warned = []
    monkeypatch.setattr(diagnostics_module.logger, "warning", warned.append)
    for positives in [1.0, *[0.0] * without, 1.0]:
        scalars = {"num_pos_anchors": torch.tensor(positives)}
        diagnostics.report(storage, scalars, {}, lambda: None, background)
    assert len(warned) == (without >= PATIENCE)
    assert all("no anchor has been foreground for 100 steps" in text for text in warned)
