"""Other detectors on the same backbone, data and schedule."""

import itertools
import math
import os
import pickle
import subprocess
import sys
from collections import Counter

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import get_detection_dataset_dicts
from detectron2.layers import CycleBatchNormList
from detectron2.modeling import Backbone, build_model
from detectron2.modeling.backbone import FPN
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torchvision.models import detection

import focal_det
from focal_det.engine import Trainer
from focal_det.engine.checkpoint import Checkpointer
from focal_det.lab.measuring import background_per_foreground
from focal_det.lab.rivals import DIFFERENCES, choose_detector, differences
from focal_det.lab.running import run_trial
from focal_det.lab.tables import Row, Table, load_table
from focal_det.lab.trials import make_trials

RIVALS = sorted(DIFFERENCES)
TORCHVISION = ["torchvision_fcos", "torchvision_retinanet"]
DEMO = "configs/demo/focal_retinanet_digits.yaml"


@pytest.fixture
def config(root):
    """A function that makes the demo's config for a detector, with further overrides before."""

    def make(name, *options):
        cfg = get_cfg()
        focal_det.add_config(cfg)
        cfg.merge_from_file(str(root / DEMO))
        cfg.merge_from_list(list(options))
        choose_detector(cfg, name)
        return cfg

    return make


@pytest.fixture
def build(config):
    """A function that builds such a detector from seed 0."""

    def make(name, *options):
        seed_all_rng(0)
        return build_model(config(name, *options))

    return make


@pytest.fixture
def randomise():
    """A function that gives all parameters and statistics of a model values of their own."""

    def change(model, seed=7):
        generator = torch.Generator().manual_seed(seed)
        for x in model.state_dict().values():
            if x.is_floating_point():
                x.add_(torch.rand(x.shape, generator=generator) * 0.1 - 0.05)
        return model

    return change


def sample(boxes=((10.0, 10.0, 40.0, 50.0),), height=128, width=128, seed=0):
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
    instances.gt_classes = torch.arange(len(boxes))
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 255
    return {"image": image, "instances": instances, "height": 64, "width": 96}


def run(model, batch):
    with EventStorage() as storage:
        return model(batch), storage.latest()


@pytest.mark.parametrize("name", RIVALS)
def test_the_backbone_starts_from_the_same_weights(build, name):
    ours = build("focal_det").backbone.state_dict()
    theirs = build(name).backbone.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[key]) for key, x in ours.items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", RIVALS)
def test_the_backbone_sees_the_mappers_images_normalised_and_padded(build, name, training):
    model = build(name).train(training)
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = [sample(height=101, width=135), sample(height=140, width=90, seed=1)]
    with torch.no_grad():
        run(model, batch)
    (images,) = seen
    # The smallest multiples of 32, the stride of p5, that hold 140 rows and 135 columns.
    assert images.shape == (2, 3, 160, 160)
    for image, entry in zip(images, batch, strict=True):
        height, width = entry["image"].shape[1:]
        # (x - PIXEL_MEAN) / PIXEL_STD of the demo's config.
        assert torch.equal(image[:, :height, :width], (entry["image"] - 127.5) / 64)
        assert not image[:, height:].any()
        assert not image[:, :, width:].any()


@pytest.mark.skipif(not hasattr(Backbone, "padding_constraints"), reason="Detectron2 0.6")
@pytest.mark.parametrize("name", RIVALS)
def test_a_backbone_that_wants_squares_gets_them(build, monkeypatch, name):
    monkeypatch.setattr(FPN, "padding_constraints", {"square_size": 192})
    model = build(name).eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    with torch.no_grad():
        model([sample()])
    assert seen == [(1, 3, 192, 192)]


@pytest.mark.parametrize("name", RIVALS)
def test_losses_are_finite_with_and_without_objects(build, name):
    model = build(name)
    for boxes in (((10.0, 10.0, 40.0, 50.0), (60.0, 60.0, 90.0, 100.0)), ()):
        losses, _ = run(model, [sample(boxes), sample()])
        assert all(x.isfinite() for x in losses.values())
        sum(losses.values()).backward()
    grads = [x.grad for x in model.backbone.parameters() if x.requires_grad]
    assert any(grad is not None and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("name", RIVALS)
def test_detections_are_at_the_size_of_the_image_on_disk(build, name):
    # Of a detector that has learnt nothing; all scores are near the prior.
    model = build(name, "MODEL.RETINANET.PRIOR_PROB", 0.5).eval()
    with torch.no_grad():
        found = model([sample()])[0]["instances"]
    assert found.image_size == (64, 96)
    assert 0 < len(found) <= 50
    corners = found.pred_boxes.tensor
    assert (corners[:, 0::2] <= 96).all()
    assert (corners[:, 1::2] <= 64).all()
    assert found.pred_classes.max() < 10


def test_torchvisions_own_boxes_and_classes_come_through(build, monkeypatch):
    """A detector that predicts what it is told, behind Detectron2's interface."""
    told = {"boxes": torch.tensor([[10.0, 20.0, 30.0, 40.0]]), "scores": torch.tensor([0.9])}
    result = [{**told, "labels": torch.tensor([7])}]
    monkeypatch.setattr(detection.RetinaNet, "forward", lambda self, images: result)
    found = build("torchvision_retinanet").eval()([sample()])[0]["instances"]
    # 128 x 128 as it was seen, 96 x 64 on disk.
    assert found.pred_boxes.tensor.tolist() == [[7.5, 10.0, 22.5, 20.0]]
    assert found.pred_classes.tolist() == [7]


@pytest.fixture
def first_weights(build, randomise, tmp_path):
    """A checkpoint of a FocalRetinaNet, and what is in it."""
    model = randomise(build("focal_det"))
    Checkpointer(model, str(tmp_path), save_to_disk=True).save("weights")
    return tmp_path / "weights.pth", model.state_dict()


@pytest.fixture
def load(config, few, tmp_path):
    """A function that starts a detector's training from a file, and its state before and after."""

    def start(name, path):
        options = ("MODEL.WEIGHTS", str(path), "OUTPUT_DIR", str(tmp_path / "out"))
        cfg = config(name, *options, "DATASETS.TRAIN", (f"{few}_train",), "DATASETS.TEST", ())
        trainer = Trainer(cfg)
        before = {key: x.clone() for key, x in trainer.model.state_dict().items()}
        trainer.resume_or_load(resume=False)
        return before, trainer.model.state_dict(), cfg

    return start


@pytest.mark.parametrize("name", RIVALS)
def test_a_checkpoints_backbone_reaches_every_detector(first_weights, load, name):
    path, saved = first_weights
    _, state, _ = load(name, path)
    backbone = {key: x for key, x in saved.items() if key.startswith("backbone.")}
    assert len(backbone) > 50
    assert all(torch.equal(x, state[key]) for key, x in backbone.items())


@pytest.mark.parametrize("name", RIVALS)
def test_a_classifiers_weights_reach_every_detector(first_weights, load, tmp_path, name):
    """They come as Detectron2's converters write them: bare names, to be matched by their ends."""
    prefix = "backbone.bottom_up."
    bare = {
        key.removeprefix(prefix): x.numpy()
        for key, x in first_weights[1].items()
        if key.startswith(prefix) and not key.endswith("num_batches_tracked")
    }
    path = tmp_path / "classifier.pkl"
    path.write_bytes(
        pickle.dumps({"model": bare, "__author__": "nobody", "matching_heuristics": True})
    )
    _, state, _ = load(name, path)
    assert all(torch.equal(torch.tensor(x), state[prefix + key]) for key, x in bare.items())


@pytest.mark.parametrize(
    ("name", "told", "taken"),
    [
        ("focal_det", "", {"head", "normalizer"}),
        ("retinanet", "takes the head, but no moving average, of a FocalRetinaNet", {"head"}),
        ("fcos", "takes the subnets' convolutions, not the last ones", {"subnets"}),
        ("faster_rcnn", "takes the backbone, not the head", set()),
        ("torchvision_retinanet", "takes the backbone, not the head", set()),
        ("torchvision_fcos", "takes the backbone, not the head", set()),
    ],
)
def test_who_takes_the_head_of_a_checkpoint_is_told(first_weights, load, name, told, taken):
    path, saved = first_weights
    before, state, cfg = load(name, path)
    changed = {
        key
        for key, x in state.items()
        if not key.startswith("backbone.") and not torch.equal(x, before[key])
    }
    head = {key for key in saved if key.startswith("head.")}
    expected = {
        "head": head,
        "subnets": {key for key in head if "subnet" in key},
        "normalizer": {"normalizer.value"},
    }
    # No step was made: counts of batches are 0 in both.
    expected = set().union(*(expected[part] for part in taken))
    assert changed == {key for key in expected if "num_batches_tracked" not in key}
    text = differences(cfg, name)
    assert (told in text) if told else not text


@pytest.mark.parametrize("name", RIVALS)
def test_a_detectors_own_checkpoint_loads_whole(build, randomise, tmp_path, name):
    saved = randomise(build(name))
    Checkpointer(saved, str(tmp_path), save_to_disk=True).save("own")
    model = build(name)
    Checkpointer(model, "").load(str(tmp_path / "own.pth"))
    state = model.state_dict()
    assert all(torch.equal(x, state[key]) for key, x in saved.state_dict().items())


PARTS = {
    "retinanet": {
        "head.cls_subnet.": "head.classification_head.conv.",
        "head.cls_score.": "head.classification_head.cls_logits.",
        "head.bbox_subnet.": "head.regression_head.conv.",
        "head.bbox_pred.": "head.regression_head.bbox_reg.",
    },
}
PARTS["fcos"] = {**PARTS["retinanet"], "head.ctrness.": "head.regression_head.bbox_ctrness."}


@pytest.fixture
def pair(build, randomise):
    """A function that builds Detectron2's and torchvision's form of a detector, of one state."""

    def make(kind, *options, ours=None):
        ours = randomise(build(ours or kind, *options))
        theirs = build(f"torchvision_{kind}", *options)
        state, own = ours.state_dict(), theirs.state_dict()
        loaded = {key: x for key, x in state.items() if key.startswith("backbone.")}
        for part, name in PARTS[kind].items():
            values = [x for key, x in state.items() if key.startswith(part)]
            keys = [key for key in own if key.startswith(name)]
            loaded.update(zip(keys, values, strict=True))
        theirs.load_state_dict(loaded)  # shapes and number of all tensors agree
        return ours, theirs

    return make


TWO = [
    sample(((10.0, 10.0, 40.0, 50.0), (60.0, 60.0, 90.0, 100.0)), height=101, width=135),
    sample(((30.0, 20.0, 47.0, 44.0),), seed=1),
]
NORMS = ["", "BN", "GN"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("loss", "beta"), [("smooth_l1", 0.0), ("smooth_l1", 1.0), ("giou", 0.0)])
def test_torchvisions_retinanet_has_the_papers_losses(pair, norm, loss, beta):
    """With the same weights, those of a FocalRetinaNet that divides by each image's count."""
    options = (
        "MODEL.RETINANET.NORM", norm,
        "MODEL.RETINANET.NUM_CONVS", 2,
        "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", loss,
        "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", beta,
        "MODEL.RETINANET.BBOX_REG_WEIGHTS", (2.0, 2.0, 1.5, 1.5),
        "MODEL.RETINANET.IOU_THRESHOLDS", (0.3, 0.6),
        "MODEL.ANCHOR_GENERATOR.OFFSET", 0.5,
        "MODEL.FOCAL_DET.NORMALIZER.NAME", "image",
    )  # fmt: skip
    ours, theirs = pair("retinanet", *options, ours="focal_det")
    expected, _ = run(ours, TWO)
    found, _ = run(theirs, TWO)
    torch.testing.assert_close(found["loss_classification"], expected["loss_cls"])
    torch.testing.assert_close(found["loss_bbox_regression"], expected["loss_box_reg"])


@pytest.mark.parametrize("norm", NORMS)
def test_torchvisions_fcos_has_the_losses_of_detectron2s(pair, norm):
    ours, theirs = pair("fcos", "MODEL.RETINANET.NORM", norm, "MODEL.RETINANET.NUM_CONVS", 2)
    _, latest = run(ours, TWO)
    # A moving average that stays where it is divides by this batch's count, as torchvision does.
    ours.loss_normalizer = latest["num_pos_anchors"][0] * len(TWO)
    expected, _ = run(ours, TWO)
    found, _ = run(theirs, TWO)
    assert ours.loss_normalizer > 3
    torch.testing.assert_close(found["loss_classification"], expected["loss_fcos_cls"])
    torch.testing.assert_close(found["loss_bbox_regression"], expected["loss_fcos_loc"])
    torch.testing.assert_close(found["loss_bbox_ctrness"], expected["loss_fcos_ctr"])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["fcos", "retinanet"])
def test_torchvisions_detections_are_detectron2s(pair, kind, norm):
    """With the same weights. None is suppressed, for which it matters where boxes are clipped."""
    ours, theirs = pair(
        kind,
        "MODEL.RETINANET.NORM", norm,
        "MODEL.RETINANET.NUM_CONVS", 2,
        "MODEL.RETINANET.PRIOR_PROB", 0.3,
        "MODEL.RETINANET.BBOX_REG_WEIGHTS", (2.0, 2.0, 1.5, 1.5),
        "MODEL.RETINANET.NMS_THRESH_TEST", 1.0,
    )  # fmt: skip
    run(ours, TWO)
    run(theirs, TWO)  # statistics of each level
    with torch.no_grad():
        for last in (ours.head.bbox_pred, theirs.head.regression_head.bbox_reg):
            last.bias.add_(1)  # an FCOS's boxes are points at first
        expected = ours.eval()([TWO[0]])[0]["instances"]
        found = theirs.eval()([TWO[0]])[0]["instances"]
    assert len(expected) > 5
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.pred_classes, expected.pred_classes)


@pytest.mark.parametrize("name", ["focal_det", "retinanet", "fcos", *TORCHVISION])
def test_dense_detectors_start_at_the_prior(build, name):
    model = build(name, "MODEL.RETINANET.PRIOR_PROB", 0.2, "MODEL.RETINANET.NUM_CONVS", 2)
    head = model.head
    last = head.classification_head.cls_logits if "torch" in name else head.cls_score
    torch.testing.assert_close(last.bias, torch.full_like(last.bias, math.log(0.2 / 0.8)))
    convolutions = [x for x in head.modules() if isinstance(x, torch.nn.Conv2d)]
    assert len(convolutions) == 4 + (2 if "fcos" not in name else 3)
    assert all(x.weight.std().item() == pytest.approx(0.01, rel=0.15) for x in convolutions)


def test_no_detection_is_kept_by_another_threshold(build):
    """What is a detector's own threshold in each library has the config's value in all."""
    options = (
        "MODEL.RETINANET.SCORE_THRESH_TEST", 0.03,
        "MODEL.RETINANET.NMS_THRESH_TEST", 0.45,
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST", 123,
        "TEST.DETECTIONS_PER_IMAGE", 45,
    )  # fmt: skip
    for name in RIVALS:
        model = build(name, *options)
        if name in TORCHVISION:
            found = (model.score_thresh, model.nms_thresh, model.topk_candidates)
            most = model.detections_per_img
        elif name == "faster_rcnn":
            last = model.roi_heads.box_predictor
            topk = model.proposal_generator.pre_nms_topk[False]
            found = (last.test_score_thresh, last.test_nms_thresh, topk)
            most = last.test_topk_per_image
        else:
            found = (model.test_score_thresh, model.test_nms_thresh, model.test_topk_candidates)
            most = model.max_detections_per_image
        assert (*found, most) == (0.03, 0.45, 123, 45), name


@pytest.mark.parametrize(("loss", "beta"), [("smooth_l1", 0.3), ("giou", 0.0)])
def test_both_stages_have_the_dense_detectors_box_loss(build, loss, beta):
    model = build(
        "faster_rcnn",
        "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", loss,
        "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", beta,
        "MODEL.RETINANET.BBOX_REG_WEIGHTS", (2.0, 2.0, 1.5, 1.5),
    )  # fmt: skip
    for part in (model.proposal_generator, model.roi_heads.box_predictor):
        assert (part.box_reg_loss_type, part.smooth_l1_beta) == (loss, beta)
    assert model.proposal_generator.box2box_transform.weights == (2.0, 2.0, 1.5, 1.5)


@pytest.mark.parametrize(("norm", "kind"), [("BN", "BatchNorm2d"), ("GN", "GroupNorm"), ("", None)])
def test_the_second_stage_has_the_norm_of_the_dense_heads(build, config, norm, kind):
    options = ("MODEL.RETINANET.NORM", norm, "MODEL.RETINANET.NUM_CONVS", 3)
    box_head = build("faster_rcnn", *options).roi_heads.box_head
    layers = Counter(type(x).__name__ for x in box_head.modules())
    assert layers["Linear"] == (1 if kind else 2)
    assert layers["Conv2d"] == (3 if kind else 0)
    assert sum(count for name, count in layers.items() if "Norm" in name) == (3 if kind else 0)
    assert kind is None or layers[kind] == 3
    widths = {x.out_channels for x in box_head.modules() if isinstance(x, torch.nn.Conv2d)}
    assert widths == ({64} if kind else set())  # the pyramid's
    text = differences(config("faster_rcnn", *options), "faster_rcnn")
    assert ("none in the RPN" in text) == bool(norm)
    assert ("all levels share" in text) == (norm == "BN")
    assert f"{layers['Conv2d']} x convolution, {layers['Linear']} x fully connected of 256" in text


def test_batch_statistics_are_of_each_level(build):
    for name in ("retinanet", "fcos", *TORCHVISION):
        norms = [x for x in build(name).head.modules() if isinstance(x, CycleBatchNormList)]
        assert [len(x) for x in norms] == [3, 3], name


SAME = ("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu")


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("focal_det", ("MODEL.FOCAL_DET.NORMALIZER.NAME", "batch"), ""),
        ("retinanet", SAME, ""),
        (
            "retinanet",
            ("MODEL.FOCAL_DET.NORMALIZER.NAME", "batch"),
            "the losses' divisor is a moving average of the foreground count, not "
            "MODEL.FOCAL_DET.NORMALIZER's 'batch'",
        ),
        (
            "retinanet",
            ("MODEL.DEVICE", "cuda:1"),
            "of several GPUs, each counts its own foreground alone",
        ),
        ("retinanet", ("MODEL.DEVICE", "cuda", "MODEL.FOCAL_DET.NORMALIZER.SYNC", False), ""),
        ("retinanet", ("MODEL.FOCAL_DET.HEAD.NAME", "Mine"), "without Mine, the head of"),
        ("torchvision_fcos", ("MODEL.FOCAL_DET.HEAD.NAME", "Mine"), "without Mine, the head of"),
        ("fcos", SAME, "starts at 300"),
        ("faster_rcnn", SAME, "256 anchors and 512 proposals an image are drawn, foreground"),
        ("faster_rcnn", SAME, "an overlap of 0.7 and 0.5"),
        (
            "faster_rcnn",
            SAME,
            "up to 600 proposals an image by an RPN of one convolution",
        ),  # 3 x 200
        (
            "faster_rcnn",
            ("MODEL.RETINANET.TOPK_CANDIDATES_TEST", 1000),
            "up to 1000 proposals an image by",
        ),
        ("fcos", SAME, "instead of anchors, none of them ignored, for objects"),
        ("faster_rcnn", SAME, "scaled by 10, 10, 5, 5"),
        (
            "torchvision_retinanet",
            ("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0.11),
            "L1 box loss, not smooth L1 of beta 0.11",
        ),
        ("torchvision_retinanet", SAME, "divisor is each image's own foreground count, not"),
        ("torchvision_fcos", SAME, "divisor is the batch's foreground count, not"),
        (
            "torchvision_fcos",
            ("MODEL.RETINANET.FOCAL_LOSS_GAMMA", 1.5),
            "focal loss of alpha 0.25 and gamma 2, not 0.25 and 1.5",
        ),
        (
            "torchvision_retinanet",
            ("MODEL.RETINANET.FOCAL_LOSS_ALPHA", 0.5),
            "focal loss of alpha 0.25 and gamma 2, not 0.5 and 2",
        ),
    ],
)
def test_what_differs_is_told(config, name, options, told):
    text = differences(config(name, *options), name)
    if told:
        assert told in text
    else:
        assert text == ""


@pytest.mark.parametrize(
    ("name", "options", "untrue"),
    [
        ("torchvision_retinanet", ("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0.0), "box loss"),
        ("torchvision_retinanet", ("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 1.0), "box loss"),
        ("torchvision_retinanet", ("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "giou"), "box loss"),
        ("torchvision_retinanet", ("MODEL.FOCAL_DET.NORMALIZER.NAME", "image"), "divisor"),
        ("torchvision_fcos", ("MODEL.FOCAL_DET.NORMALIZER.NAME", "batch"), "divisor"),
        ("torchvision_retinanet", ("MODEL.DEVICE", "cuda"), "GPUs"),
        *itertools.product(TORCHVISION, [SAME], ["focal loss", "MODEL.WEIGHTS", "GPUs", "None"]),
        *itertools.product(["fcos", "faster_rcnn"], [SAME], ["MODEL.WEIGHTS", "GPUs", "None"]),
    ],
)
def test_what_is_equal_is_not_told(config, name, options, untrue):
    text = differences(config(name, *options), name)
    assert untrue not in text
    assert text.startswith(DIFFERENCES[name])


@pytest.mark.parametrize("name", RIVALS)
def test_every_detector_is_a_trial(root, few, build, tmp_path, name):
    (trial,) = make_trials(
        Table("t", "", "", (Row(name, {}, detector=name),)),
        config_file=str(root / DEMO),
        data=few,
        seeds=1,
        budget=6,
        options=("SOLVER.IMS_PER_BATCH", 2),
    )
    record = run_trial(trial, tmp_path / "out")
    assert record["error"] is None
    assert 0 <= record["metrics"]["AP"] <= 100
    assert record["inference_ms"]["median"] > 0
    assert record["images_per_second"] > 0
    assert record["parameters"] == sum(x.numel() for x in build(name).parameters())
    assert record["gflops"] > 0.1


def test_the_config_of_a_trial_can_be_trained_by_the_script(root, few, tmp_path):
    (trial,) = make_trials(
        Table("t", "", "", (Row("a", {}, detector="torchvision_fcos"),)),
        config_file=str(root / DEMO),
        data=few,
        seeds=1,
        budget=1,
        options=("SOLVER.IMS_PER_BATCH", 2),
    )
    path, out = tmp_path / "config.yaml", tmp_path / "out"
    path.write_text(trial.config)
    result = subprocess.run(
        [sys.executable, root / "tools" / "train_net.py", "--config-file", path, "OUTPUT_DIR", out],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "FOCAL_DET_PLUGINS": "focal_det.lab.rivals"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (out / "model_final.pth").is_file()


def test_the_built_in_retinanet_is_ours_with_focal_loss(build):
    """The fight is fair only if the two rows begin as the same detector."""
    ours, theirs = build("focal_det"), build("retinanet")
    their_state = theirs.state_dict()
    kept = {key: x for key, x in ours.state_dict().items() if key in their_state}
    assert kept.keys() == their_state.keys()
    assert all(torch.equal(x, their_state[key]) for key, x in kept.items())


def test_the_table_of_detectors_has_all_of_them():
    assert {row.detector for row in load_table("detectors").rows} == set(RIVALS)


def test_points_of_fcos_are_counted_by_its_rule(build, config, few):
    """A point is foreground if it lies in a box, near its center and at a level of its size."""
    cfg = config("fcos", "DATASETS.TRAIN", (f"{few}_train",))
    model = build("fcos")
    foreground = points = 0
    levels = [8, 16, 32]  # strides
    for record in get_detection_dataset_dicts([f"{few}_train"], filter_empty=True):
        boxes = []
        for annotation in record["annotations"]:
            x, y, width, height = annotation["bbox"]
            boxes.append((x, y, x + width, y + height))
        for stride in levels:
            least = 0 if stride == levels[0] else 4 * stride
            most = math.inf if stride == levels[-1] else 8 * stride
            for row, column in itertools.product(range(128 // stride), repeat=2):
                x, y = stride * (column + 0.5), stride * (row + 0.5)
                points += 1
                for left, top, right, bottom in boxes:
                    sides = (x - left, y - top, right - x, bottom - y)
                    away = max(abs(x - (left + right) / 2), abs(y - (top + bottom) / 2))
                    if min(sides) > 0 and least < max(sides) < most and away < 1.5 * stride:
                        foreground += 1
                        break
    assert foreground > 5
    found = background_per_foreground(cfg, model)
    assert found == pytest.approx((points - foreground) / foreground)
