"""The cumulative loss against a plain sort of all terms, with scalar losses that share no code."""

import hashlib
import json
import re

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K

import focal_det
from focal_det.lab.loss_cdf import GAMMAS, LossCDF
from focal_det.losses import reference


def sorted_shares(x_t, gamma, points):
    """Share of the loss of the easiest fraction of the terms, at evenly spaced fractions."""
    losses = sorted(reference.focal(x, 1, alpha=None, gamma=gamma)[0] for x in x_t)
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    shares = []
    for index in range(points):
        position = index * len(losses) / (points - 1)
        whole = min(int(position), len(losses) - 1)
        between = sums[whole] + (position - whole) * (sums[whole + 1] - sums[whole])
        shares.append(between / sums[-1])
    return shares


@pytest.fixture
def scene():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(300, 3, generator=generator) - 2
    labels = torch.randint(-1, 4, (300,), generator=generator)
    return logits, labels


def test_the_curves_are_those_of_a_plain_sort(scene):
    logits, labels = scene
    sides = {"foreground": [], "background": []}
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        if label < 0:
            continue
        for index, x in enumerate(row):
            sides["foreground" if index == label else "background"].append(
                x if index == label else -x
            )
    cdf = LossCDF()
    for part in torch.arange(300).split(70):  # it streams
        cdf.add(logits[part], labels[part])
    made = cdf.curves(points=21)
    assert made["counts"] == {side: len(x_t) for side, x_t in sides.items()}
    assert made["fraction"] == pytest.approx([index / 20 for index in range(21)])
    for side, x_t in sides.items():
        for gamma in GAMMAS:
            expected = sorted_shares(x_t, gamma, 21)
            # A bin is .005 wide: within it the order is not kept.
            assert made[side][f"{gamma:g}"] == pytest.approx(expected, abs=2e-3)


def test_focusing_moves_the_loss_to_the_hardest_background(scene):
    cdf = LossCDF()
    cdf.add(*scene)
    background = cdf.curves()["background"]
    middle = [background[f"{gamma:g}"][150] for gamma in GAMMAS]  # of the easiest 3/4
    assert middle == sorted(middle, reverse=True)
    assert middle[-1] < middle[0] / 2


def test_logits_beyond_the_bins_count_too():
    cdf = LossCDF()
    cdf.add(torch.tensor([[1e4], [-1e4]]), torch.tensor([0, 1]))  # both right beyond doubt
    cdf.add(torch.tensor([[-1e4], [1e4]]), torch.tensor([0, 1]))  # both wrong
    made = cdf.curves(points=3)
    assert made["counts"] == {"foreground": 2, "background": 2}
    assert made["foreground"]["2"] == pytest.approx([0, 0, 1])


def test_images_without_objects_alone_have_no_foreground_curve():
    cdf = LossCDF()
    cdf.add(torch.zeros(4, 2), torch.full((4,), 2))
    with pytest.raises(ValueError, match="no foreground example"):
        cdf.curves()


@pytest.mark.parametrize("logit", [float("nan"), 1e4])
def test_losses_that_have_no_shares_are_named(logit):
    """Not a number, or all 0."""
    cdf = LossCDF()
    cdf.add(torch.tensor([[logit, -logit]]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"the foreground losses of gamma 0 sum up to (nan|0\.0)"):
        cdf.curves()


@pytest.fixture
def analyze(load_tool):
    """The script as a module."""
    return load_tool("analyze")


@pytest.fixture
def words(root, few, tmp_path):
    """A command line for an untrained detector that is saved in a file."""
    config = str(root / "configs" / "demo" / "focal_retinanet_digits.yaml")
    cfg = get_cfg()
    focal_det.add_config(cfg)
    cfg.merge_from_file(config)
    torch.manual_seed(0)
    DetectionCheckpointer(build_model(cfg), str(tmp_path)).save("model")
    return [
        *("loss-cdf", "--config-file", config, "--output", str(tmp_path / "cdf.json")),
        *("MODEL.WEIGHTS", str(tmp_path / "model.pth"), "DATASETS.TEST", f"('{few}_val',)"),
    ]


def test_examples_are_in_the_order_of_the_anchors(analyze, words, few):
    model = build_model(analyze.parse(words).cfg).eval()
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="RGB")
    sample = mapper(DatasetCatalog.get(f"{few}_val")[0])
    logits, labels = analyze.examples(model, sample)
    features = model.backbone(model.preprocess_image([sample]).tensor)
    features = [features[name] for name in model.head_in_features]
    expected = [permute_to_N_HWA_K(x, 10)[0] for x in model.head(features)[0]]
    torch.testing.assert_close(logits, torch.cat(expected))
    anchors = model.anchor_generator(features)
    assert labels.shape == (sum(map(len, anchors)),)
    torch.testing.assert_close(labels, model.label_anchors(anchors, [sample["instances"]])[0][0])


def test_the_command_counts_all_terms_of_all_images(analyze, words, few, tmp_path, capsys):
    assert analyze.main(words) == 0
    made = json.loads((tmp_path / "cdf.json").read_text())
    # 336 locations, 12 anchors, 10 classes, 4 images; what is ignored is missing.
    assert 0.95 * 161_280 < sum(made["counts"].values()) <= 161_280
    assert (made["images"], made["data"], made["loss"]) == (4, [f"{few}_val"], "FocalLoss")
    # Which model on which data it was, without a path of this machine.
    weights = hashlib.sha256((tmp_path / "model.pth").read_bytes()).hexdigest()
    assert made["weights"] == weights[:12]
    assert set(made["annotations"]) == {f"{few}_val"}
    assert made["settings"]["MODEL.META_ARCHITECTURE"] == "'FocalRetinaNet'"
    assert str(tmp_path) not in json.dumps(made)
    assert f"{made['counts']['foreground']:,} foreground" in capsys.readouterr().out
    for images, status in ((3, 0), (1, 2)):  # the first one holds no digit
        assert analyze.main([*words[:1], "--images", str(images), *words[1:]]) == status
        assert json.loads((tmp_path / "cdf.json").read_text())["images"] == 3
    assert "few_val: the images hold no foreground example" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("few_val", "no_val", r"DATASETS.TEST must name registered data sets, got \('no_val',\)"),
        ("model.pth", "none.pth", "MODEL.WEIGHTS: there is no file"),
    ],
)
def test_what_cannot_be_looked_at_ends_with_2(analyze, words, old, new, says, capsys):
    with pytest.raises(SystemExit) as stop:
        analyze.main([word.replace(old, new) for word in words])
    assert stop.value.code == 2
    assert re.search(says, capsys.readouterr().err)


def test_weights_that_are_none_end_with_2(analyze, words, tmp_path, capsys):
    (tmp_path / "model.pth").write_bytes(b"nothing")
    assert analyze.main(words) == 2
    assert "model.pth" in capsys.readouterr().err
