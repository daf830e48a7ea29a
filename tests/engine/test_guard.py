"""What is not finite is named before a weight changes, kept, and seen again by tools/replay.py."""

import copy
import gc
import json
import logging
import math
import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.config import LazyCall as L
from detectron2.engine import SimpleTrainer, hooks
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from omegaconf import OmegaConf
from torch import nn

import focal_det
from focal_det.compat import grad_scaler
from focal_det.engine import diagnosis, failure_text
from focal_det.engine.guard import NonFiniteGuard
from focal_det.engine.plain_batch import from_plain, to_plain
from focal_det.engine.trainer import _as_yaml

NAN, INF = float("nan"), float("inf")


def cpu_scaler(**options):
    """A loss scale that works on a CPU."""
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("before 2.3, PyTorch scales losses on GPUs only")
    return torch.amp.GradScaler("cpu", **options)


@pytest.fixture
def cfg(root) -> CfgNode:
    """The demo's detector: levels p3 to p5, batch normalization everywhere, K = 10."""
    cfg = get_cfg()
    focal_det.add_config(cfg)
    cfg.merge_from_file(str(root / "configs" / "demo" / "focal_retinanet_digits.yaml"))
    return cfg


@pytest.fixture
def model(cfg):
    torch.manual_seed(0)
    return build_model(cfg)


@pytest.fixture
def batches(make_batch):
    """A function from a number to that many batches of two images, 0.png and 1.png."""

    def make(count):
        made = [make_batch((3, 2), seed) for seed in range(count)]
        for batch in made:
            for index, entry in enumerate(batch):
                entry["image_id"] = 70 + index
                entry["image"] = entry["image"][:, :64, :96]
        return made

    return make


@pytest.fixture(scope="module")
def replay(load_tool):
    """tools/replay.py as a module."""
    return load_tool("replay")


class MixedTrainer(SimpleTrainer):
    """Detectron2's AMPTrainer on a CPU, which its own refuses."""

    def __init__(self, *args, precision=torch.float32, scaler=None):
        super().__init__(*args)
        self.precision = precision
        self.scaler = scaler or grad_scaler("cpu", enabled=False)

    def run_step(self):
        enabled = self.precision != torch.float32
        with torch.autocast("cpu", self.precision if enabled else None, enabled=enabled):
            losses = self.model(next(self._data_loader_iter))
        self.optimizer.zero_grad()
        self.scaler.scale(sum(losses.values())).backward()
        self._write_metrics(losses, 0.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()


class Training:
    """Training steps under a guard; remembers the state at the start of each.

    Attributes:
        states: the model's at the start of each step that was begun.
        error: what stopped it, None if nothing did.
    """

    def __init__(self, model, batches, folder, *, lr=0.01, cfg=None, guarded=True, extra=(), **amp):
        self.states, self.error = [], None
        folder.mkdir(exist_ok=True)
        self.model, self.folder = model, folder
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        self.trainer = MixedTrainer(model, self._note(batches), optimizer, **amp)
        yaml = "" if cfg is None else cfg.dump()
        watch = NonFiniteGuard(
            model, optimizer, folder, grad_scaler=amp.get("scaler"), config_yaml=yaml
        )
        self.trainer.register_hooks([watch if guarded else None, *extra])
        try:
            self.trainer.train(0, len(batches))
        except FloatingPointError as error:
            self.error = str(error)

    def _note(self, batches):
        for batch in batches:
            self.states.append(state_of(self.model))
            yield batch

    def report(self, iteration):
        path = self.folder / "non_finite" / f"iter_{iteration}_rank_0"
        assert str(path) in self.error
        return json.loads((path / "report.json").read_text(), parse_constant=pytest.fail)

    def check_nothing_changed(self):
        """The whole state, batch normalization and the normalizer too, is that of before."""
        assert_same(state_of(self.model), self.states[-1])


def state_of(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, x in state.items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=0, equal_nan=True)


def shares(report, kind):
    """By level."""
    return {x["level"]: x[kind]["non_finite_share"] for x in report["levels"]}


def fill(parameter, index, value):
    with torch.no_grad():
        parameter[index] = value


class Poison(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * NAN


class Tiny(nn.Module):
    """No detector: a weight times the images' mean."""

    def __init__(self, size=3):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, batch):
        means = torch.stack([entry["image"].mean(dim=(1, 2)) for entry in batch])
        return {"loss_a": (self.weight * means).sum(), "loss_b": self.weight.sum() * 0}


def test_healthy_training_is_neither_disturbed_nor_reported(model, batches, tmp_path, caplog):
    other, data = copy.deepcopy(model), batches(20)
    caplog.set_level(logging.WARNING, logger="detectron2.focal_det.engine.guard")
    torch.manual_seed(1)
    watched = Training(model, data, tmp_path / "a")
    torch.manual_seed(1)
    alone = Training(other, data, tmp_path / "b", guarded=False)
    assert watched.error is None
    assert alone.error is None
    assert_same(state_of(model), state_of(other))
    assert not (tmp_path / "a" / "non_finite").exists()
    assert not [x for x in caplog.records if x.name == "detectron2.focal_det.engine.guard"]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_an_image_that_is_not_finite_is_named(model, cfg, batches, tmp_path):
    data = batches(3)
    data[2][1]["image"][0, 3, 4] = NAN
    data[2][1]["image"][2, 5, 5] = INF
    run = Training(model, data, tmp_path, cfg=cfg)
    assert "loss_cls is nan at iteration 2; first image: 1.png (image_id 71), whose" in run.error
    assert "pixels are not finite" in run.error
    assert "No weight was changed" in run.error
    run.check_nothing_changed()
    report = run.report(2)
    assert report["term"] == "loss_cls"
    assert report["losses"] == {"loss_cls": "nan", "loss_box_reg": "nan"}
    assert (report["iteration"], report["rank"], report["world_size"]) == (2, 0, 1)
    assert report["learning_rates"] == [0.01]
    assert (report["loss_scale"], report["precision"]) == (1.0, "float32")
    assert report["image"] == {
        "index": 1, "image_id": 71, "file_name": "1.png", "others": 0,
        "reason": "whose pixels are not finite",
    }  # fmt: skip
    assert [x["non_finite_pixels"] for x in report["images"]] == [0, 2]
    # Batch normalization carries it into the other image, which by itself is finite.
    assert [x["predictions_finite"] for x in report["images"]] == [False, False]
    assert math.isfinite(report["images"][0]["losses"]["loss_cls"])
    assert report["images"][1]["losses"]["loss_cls"] == "nan"
    assert shares(report, "logits") == {"p3": 1, "p4": 1, "p5": 1}
    assert report["module"] is None  # the input was not finite to begin with
    assert report["non_finite_parameters"] == []
    assert report["non_finite_buffers"] == []
    assert report["gradient_norm"] == "nan"


def test_the_last_checkpoint_is_that_of_the_last_good_step(model, batches, tmp_path):
    data = batches(3)
    data[2][0]["image"][0, 0, 0] = NAN
    checkpointer = DetectionCheckpointer(model, str(tmp_path))
    run = Training(model, data, tmp_path, extra=[hooks.PeriodicCheckpointer(checkpointer, 1)])
    assert run.error
    assert sorted(x.name for x in tmp_path.glob("*.pth")) == [
        "model_0000000.pth", "model_0000001.pth",
    ]  # fmt: skip
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")
    saved = torch.load(tmp_path / "model_0000001.pth", weights_only=False)["model"]
    assert_same(saved, state_of(model))
    # What is kept beside the report is no checkpoint to go on from, and the same state.
    kept = tmp_path / "non_finite" / "iter_2_rank_0" / "model.pth"
    assert_same(torch.load(kept, weights_only=True)["model"], state_of(model))


def test_numbers_of_the_step_are_those_that_the_model_used(model, batches, tmp_path):
    data = batches(2)
    fill(model.head.cls_score.bias, 4, NAN)
    expected = copy.deepcopy(model)
    counts = []
    expected.normalizer.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0]))
    with diagnosis.undisturbed(expected):
        expected(data[0])
        divisor = expected.normalizer.value.item()
    run = Training(model, data, tmp_path)
    report = run.report(0)
    assert report["positives"] == int(counts[0].sum()) > 0
    assert [x["positives"] for x in report["images"]] == counts[0].tolist()
    assert report["normalizer"] == divisor != model.normalizer.value.item() == 100
    assert report["seed"] == torch.initial_seed()


def test_a_head_parameter_that_is_not_finite_is_named(model, batches, tmp_path):
    fill(model.head.cls_score.bias, 4, NAN)
    run = Training(model, batches(1), tmp_path)
    report = run.report(0)
    run.check_nothing_changed()
    assert (report["term"], report["level"]) == ("loss_cls", "p3")
    assert math.isfinite(report["losses"]["loss_box_reg"])
    assert report["module"] == "head.cls_score"
    assert report["non_finite_parameters"] == ["head.cls_score.bias"]
    per_anchor = 1 / len(model.head.cls_score.bias)
    assert shares(report, "logits") == pytest.approx(dict.fromkeys(("p3", "p4", "p5"), per_anchor))
    assert shares(report, "deltas") == {"p3": 0, "p4": 0, "p5": 0}
    assert report["image"]["others"] == 1  # both are to blame alike


def test_the_level_and_the_module_are_named(model, batches, tmp_path):
    fill(model.backbone.fpn_output4.weight, (0, 0, 0, 0), INF)
    report = Training(model, batches(1), tmp_path).report(0)
    assert report["level"] == "p4"
    assert shares(report, "logits") == {"p3": 0, "p4": 1, "p5": 0}
    assert report["module"] == "backbone.fpn_output4"
    healthy = report["levels"][0]["logits"]
    assert healthy["largest"] > 3
    assert healthy["sum"] < 0


def test_the_level_is_that_of_the_terms_own_predictions():
    bad, good = {"non_finite_share": 0.5}, {"non_finite_share": 0.0}
    levels = [
        {"level": "p3", "logits": good, "deltas": bad},
        {"level": "p4", "logits": bad, "deltas": good},
    ]
    assert diagnosis._first_level(levels, "loss_cls") == "p4"
    assert diagnosis._first_level(levels, "loss_box_reg") == "p3"
    assert diagnosis._first_level(levels, "loss_of_another") == "p3"
    assert diagnosis._first_level(levels[1:], "loss_box_reg") is None


def test_statistics_of_a_level_leave_out_what_is_not_finite():
    found = diagnosis._statistics(torch.tensor([[1.0, -4.0, NAN], [INF, 2.0, -INF]]))
    assert found == {"non_finite_share": 0.5, "largest": 4.0, "sum": -1.0}


@pytest.mark.parametrize("kind", ["smooth_l1", "giou"])
def test_boxes_that_are_not_finite_are_named(cfg, batches, tmp_path, kind):
    cfg.MODEL.RETINANET.BBOX_REG_LOSS_TYPE = kind
    data = batches(1)
    data[0][1]["instances"].gt_boxes.tensor[0, 2] = INF
    run = Training(build_model(cfg), data, tmp_path)
    run.check_nothing_changed()
    report = run.report(0)
    assert report["term"] == "loss_box_reg"
    assert report["image"]["reason"] == "whose boxes are not finite"
    assert report["image"]["file_name"] == "1.png"
    assert [x["non_finite_boxes"] for x in report["images"]] == [0, 1]
    assert report["level"] is None
    assert shares(report, "logits") == {"p3": 0, "p4": 0, "p5": 0}


def test_a_gradient_alone_is_named_by_where_the_backward_pass_met_it(model, batches, tmp_path):
    stage = model.backbone.bottom_up.res4
    stage.register_forward_hook(lambda _, __, output: Poison.apply(output))
    run = Training(model, batches(1), tmp_path)
    run.check_nothing_changed()
    report = run.report(0)
    assert all(math.isfinite(x) for x in report["losses"].values())
    last = list(stage.named_modules())[-1][0]
    bad = report["non_finite_gradients"]
    assert bad[0].startswith("backbone.bottom_up.res4.1."), last
    assert report["term"] == f"gradient of {bad[0]}"
    assert not [x for x in bad if x.startswith(("head", "backbone.fpn", "backbone.bottom_up.res5"))]
    # Later in the backward pass is nearer the image.
    stages = [name.split(".")[2] for name in bad]
    assert list(dict.fromkeys(stages)) == ["res4", "res3", "res2", "stem"]
    assert report["image"] is None
    assert "no image by itself is to blame" in run.error


def test_a_learning_rate_that_explodes_is_stopped_a_step_later(model, batches, tmp_path):
    run = Training(model, batches(5), tmp_path, lr=1e30)
    assert len(run.states) == 2
    run.check_nothing_changed()
    report = run.report(1)
    assert report["learning_rates"] == [1e30]
    assert next(iter(report["largest_parameter"].values())) > 1e20
    assert report["term"] == "loss_cls"


class Distance(Tiny):
    """Its loss can be infinite where its gradient is not."""

    def forward(self, batch):
        means = torch.stack([entry["image"].mean() for entry in batch])
        return {"loss_l1": (self.weight[0] - means).abs().sum()}


def test_a_loss_alone_is_an_alarm(batches, tmp_path):
    data = batches(2)
    data[1][0]["image"][0] = INF
    distance = Distance()
    run = Training(distance, data, tmp_path)
    run.check_nothing_changed()
    report = run.report(1)
    assert (report["term"], report["value"]) == ("loss_l1", "inf")
    assert report["non_finite_gradients"] == []
    assert report["gradient_norm"] == distance.weight.grad.norm().item() == 2.0


def test_a_gradient_norm_too_large_for_its_type_is_no_alarm(batches, tmp_path):
    tiny = Tiny()
    tiny.weight.register_hook(lambda gradient: torch.full_like(gradient, 1e30))
    run = Training(tiny, batches(3), tmp_path, lr=0.0)
    assert run.error is None
    assert len(run.states) == 3


def test_a_model_that_is_no_detector_is_reported_without_levels(batches, tmp_path):
    data = batches(2)
    data[1][0]["image"][0] = INF
    run = Training(Tiny(), data, tmp_path)
    run.check_nothing_changed()
    report = run.report(1)
    assert (report["term"], report["value"]) == ("loss_a", "inf")
    assert report["levels"] is None
    assert report["level"] is None
    assert report["positives"] is None
    assert report["image"]["file_name"] == "0.png"


def test_detectron2s_own_detector_is_reported_with_levels(cfg, batches, tmp_path):
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    model = build_model(cfg)
    fill(model.backbone.fpn_output4.weight, (0, 0, 0, 0), NAN)
    report = Training(model, batches(1), tmp_path).report(0)
    assert report["level"] == "p4"
    assert report["normalizer"] is None


class NoSecondPass(Tiny):
    """Fails without a graph, as a model does for which no memory is left."""

    def forward(self, batch):
        if not torch.is_grad_enabled():
            raise RuntimeError("no memory left")
        return {"loss_a": (self.weight * NAN).sum()}


def test_without_a_second_pass_the_report_says_why(batches, tmp_path):
    run = Training(NoSecondPass(), batches(1), tmp_path)
    run.check_nothing_changed()
    report = run.report(0)
    assert report["not_examined"] == "RuntimeError: no memory left"
    assert report["term"] == "loss_a"
    assert [x["file_name"] for x in report["images"]] == ["0.png", "1.png"]


def test_a_report_that_cannot_be_kept_is_printed_all_the_same(batches, tmp_path, caplog):
    (tmp_path / "non_finite").write_text("a file where the folder should be")
    data = batches(1)
    data[0][0]["image"][0] = NAN
    run = Training(Tiny(), data, tmp_path)
    assert "Not all of it could be kept in" in run.error
    assert "batch.pt: NotADirectoryError" in run.error
    assert "loss_a is nan at iteration 0" in caplog.text


def test_the_second_pass_leaves_the_model_and_the_random_numbers_as_they_were(model, batches):
    (batch,) = batches(1)
    torch.manual_seed(5)
    before, random = state_of(model), torch.get_rng_state()
    losses = {"loss_cls": torch.tensor(NAN)}
    report = diagnosis.describe_failure(model, diagnosis.Step(batch, losses, torch.float32), {})
    assert_same(state_of(model), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(part.training for part in model.modules())
    assert not any(part._forward_hooks for part in model.modules())
    assert all(x["predictions_finite"] for x in report["images"])


class Noisy(Tiny):
    def forward(self, batch):
        return {"loss_a": (self.weight * torch.rand(3)).sum()}


def test_the_second_pass_of_a_random_model_draws_no_number_of_the_training(batches):
    (batch,) = batches(1)
    random = torch.get_rng_state()
    step = diagnosis.Step(batch, {"loss_a": torch.tensor(NAN)}, torch.float32)
    diagnosis.describe_failure(Noisy(), step, {})
    assert torch.equal(torch.get_rng_state(), random)


def test_an_image_by_itself_may_be_too_small_for_batch_statistics(
    model, cfg, batches, tmp_path, replay
):
    data = batches(1)
    for entry in data[0]:
        entry["image"] = entry["image"][:, :32, :32]  # p5 has one cell
    fill(model.head.cls_score.bias, 4, NAN)
    report = Training(model, data, tmp_path, cfg=cfg).report(0)
    assert report["not_examined"] is None
    assert [x["losses"]["loss_cls"] for x in report["images"]] == ["nan", "nan"]
    assert run_tool(replay, tmp_path / "non_finite" / "iter_0_rank_0") == 1


def test_evaluation_and_other_passes_without_gradients_are_let_be(model, batches, tmp_path):
    data = batches(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = SimpleTrainer(model, data, optimizer)
    trainer.register_hooks([NonFiniteGuard(model, optimizer, tmp_path)])
    broken = copy.deepcopy(data[0])
    broken[0]["image"][0] = NAN

    def evaluate():
        with torch.no_grad(), diagnosis.undisturbed(model):
            model(broken)  # a validation loss
            model.eval()
            model(broken)
        model.train()

    trainer.register_hooks([hooks.EvalHook(1, lambda: evaluate() or {})])
    trainer.train(0, 2)
    assert not (tmp_path / "non_finite").exists()


def test_a_pass_without_gradients_before_the_backward_pass_is_let_be(batches, tmp_path):
    (good,), (broken,) = batches(1), batches(1)
    broken[0]["image"][0] = NAN
    tiny = Tiny()
    watch = NonFiniteGuard(tiny, torch.optim.SGD(tiny.parameters(), lr=0.01), tmp_path)
    watch.before_train()
    watch.before_step()
    losses = tiny(good)
    with torch.no_grad():
        tiny(broken)
    sum(losses.values()).backward()  # would raise
    watch.after_train()


def test_ids_and_names_of_any_kind_are_reported(batches, tmp_path):
    data = batches(1)
    data[0][0].update(image_id=np.int64(12), file_name=tmp_path / "x.png")
    data[0][1].update(image_id=(3, "b"), file_name=None)
    data[0][1]["image"][0] = NAN
    run = Training(Tiny(), data, tmp_path)
    images = run.report(0)["images"]
    assert [x["image_id"] for x in images] == [12, [3, "b"]]
    assert images[0]["file_name"] == str(tmp_path / "x.png")
    assert "first image: number 1 of the batch (image_id [3, 'b'])" in run.error


def test_a_healthy_step_reads_once_from_the_device(batches, tmp_path, monkeypatch):
    (batch,) = batches(1)
    tiny, reads = Tiny(), []
    optimizer = torch.optim.SGD(tiny.parameters(), lr=0.01)
    watch = NonFiniteGuard(tiny, optimizer, tmp_path)
    watch.before_train()
    watch.before_step()
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        method = getattr(torch.Tensor, name)

        def counted(self, *args, name=name, method=method):
            reads.append(name)
            return method(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    sum(tiny(batch).values()).backward()
    assert reads == ["tolist"]


def test_losses_differentiated_one_by_one_are_watched(batches, tmp_path):
    class OneByOne(MixedTrainer):
        def run_step(self):
            losses = self.model(next(self._data_loader_iter))
            for loss in losses.values():
                loss.backward(retain_graph=True)

    (batch,) = batches(1)
    tiny = Tiny()
    calls = []
    tiny.weight.register_hook(lambda g: calls.append(1) or (g * NAN if len(calls) == 2 else g))
    optimizer = torch.optim.SGD(tiny.parameters(), lr=0.01)
    trainer = OneByOne(tiny, [batch], optimizer)
    trainer.register_hooks([NonFiniteGuard(tiny, optimizer, tmp_path)])
    with pytest.raises(FloatingPointError, match="gradient of weight is nan at iteration 0"):
        trainer.train(0, 1)


class Accumulating(SimpleTrainer):
    """Three forward passes a step, with a backward pass of each or of their sum."""

    def __init__(self, *args, of_each, scaler=None):
        super().__init__(*args)
        self.of_each = of_each
        self.scaler = scaler or grad_scaler("cpu", enabled=False)

    def run_step(self):
        self.optimizer.zero_grad()
        total = 0
        for _ in range(3):
            loss = sum(self.model(next(self._data_loader_iter)).values()) / 3
            if self.of_each:
                self.scaler.scale(loss).backward()
            else:
                total = total + loss
        if not self.of_each:
            self.scaler.scale(total).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def accumulate(model, data, folder, of_each, extra=(), **options):
    """Train; the message of what stopped it, None if nothing did."""
    folder.mkdir(exist_ok=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    scaler = options.get("grad_scaler")
    trainer = Accumulating(model, data, optimizer, of_each=of_each, scaler=scaler)
    trainer.register_hooks([NonFiniteGuard(model, optimizer, folder, **options), *extra])
    try:
        trainer.train(0, len(data) // 3)
    except FloatingPointError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("of_each", "number"), [(True, "2 of 2"), (False, "2 of 3")])
def test_of_several_forward_passes_the_one_with_the_bad_loss_is_kept(
    model, cfg, batches, tmp_path, replay, of_each, number
):
    data = batches(6)
    for index, batch in enumerate(data):
        batch[0]["file_name"] = f"{index}.png"
    data[4][0]["image"][0, 3, 4] = NAN
    states = []

    class Note(hooks.HookBase):
        def before_step(self):
            states.append(state_of(model))

    error = accumulate(model, data, tmp_path, of_each, [Note()], config_yaml=cfg.dump())
    assert "loss_cls is nan at iteration 1; first image: 4.png (image_id 70), whose" in error
    assert f"Forward pass: number {number} in this step. No weight was changed" in error
    # Buffers too are those of before the step, and not of before the last forward pass.
    assert_same(state_of(model), states[1])
    folder = tmp_path / "non_finite" / "iter_1_rank_0"
    assert torch.load(folder / "batch.pt", weights_only=True)[0]["file_name"] == "4.png"
    assert run_tool(replay, folder) == 1


@pytest.mark.parametrize("of_each", [True, False])
def test_of_several_forward_passes_a_gradient_blames_what_is_known(batches, tmp_path, of_each):
    data, calls, tiny = batches(3), [], Tiny()
    tiny.weight.register_hook(
        lambda g: calls.append(1) or (g * NAN if len(calls) == 2 or not of_each else g)
    )
    error = accumulate(tiny, data, tmp_path, of_each)
    doubt = "; which of them gave the gradient is not known"
    number = "number 2 of 2 in this step" if of_each else f"number 3 of 3 in this step{doubt}"
    assert f"Forward pass: {number}. No weight was changed" in error
    kept = torch.load(tmp_path / "non_finite/iter_0_rank_0/batch.pt", weights_only=True)
    assert torch.equal(kept[0]["image"], data[1 if of_each else 2][0]["image"])


def test_a_step_that_overflows_counts_once_whichever_backward_pass_does(batches, tmp_path):
    tiny, calls = Tiny(), []
    # The last backward pass of each step overflows, the others are finite.
    tiny.weight.register_hook(lambda g: calls.append(1) or (g if len(calls) % 3 else g * NAN))
    scaler = cpu_scaler(init_scale=1.0)
    error = accumulate(tiny, batches(30), tmp_path, True, grad_scaler=scaler)
    assert error is not None
    assert len(calls) == 15  # patience is 5 steps
    calls.clear()
    always = Tiny()
    always.weight.register_hook(lambda g: calls.append(1) or g * NAN)
    scaler = cpu_scaler(init_scale=1.0)
    error = accumulate(always, batches(30), tmp_path / "b", True, grad_scaler=scaler)
    assert error is not None
    assert len(calls) == 13  # the first of the fifth step


def test_batches_are_held_for_their_step_alone(batches, tmp_path):
    class Entry(dict):
        """What a weak reference can be made to."""

    kept, alive, seen = [], [], []

    class Keep(Tiny):
        def forward(self, batch):
            losses = super().forward(batch)
            kept.append(losses)  # as who adds them up for a log, and forgets to detach them
            return losses

    def data():
        for entry, *_ in batches(6):
            entry = Entry(entry)
            seen.append(weakref.ref(entry))
            yield [entry]

    class Count(hooks.HookBase):
        def before_step(self):
            gc.collect()
            alive.append(sum(x() is not None for x in seen))

    tiny = Keep()
    optimizer = torch.optim.SGD(tiny.parameters(), lr=1e-4)
    trainer = Accumulating(tiny, data(), optimizer, of_each=True)
    trainer.register_hooks([NonFiniteGuard(tiny, optimizer, tmp_path), Count()])
    trainer.train(0, 2)
    assert alive == [0, 1]  # the generator holds the last


def test_a_forward_pass_that_is_no_part_of_the_step_is_let_be(batches, tmp_path):
    (broken,) = batches(1)
    broken[0]["image"][0] = NAN
    tiny = Tiny()

    class Probe(hooks.HookBase):
        def before_step(self):
            tiny(broken)  # without a backward pass

        def after_step(self):
            torch.autograd.grad(sum(tiny(broken).values()), list(tiny.parameters()))

    error = accumulate(tiny, batches(6), tmp_path, True, [Probe()])
    assert error is None


class OfTensors(Tiny):
    """Takes a tensor for a batch."""

    def forward(self, images):
        return {"loss_a": (self.weight * images.mean(dim=(0, 2, 3))).sum()}


def test_a_batch_of_another_form_is_reported_and_kept(tmp_path):
    run = Training(OfTensors(), [torch.full((2, 3, 4, 4), NAN)], tmp_path)
    run.check_nothing_changed()
    report = run.report(0)
    assert (report["term"], report["images"]) == ("loss_a", [])
    assert report["not_examined"].startswith("the batch is no list of dictionaries: ")
    kept = torch.load(tmp_path / "non_finite/iter_0_rank_0/batch.pt", weights_only=True)
    assert kept.shape == (2, 3, 4, 4)


class ByName(Tiny):
    def forward(self, *, batch):
        return super().forward(batch)


def test_a_batch_that_is_given_by_name_does_not_disturb(batches, tmp_path):
    (batch,) = batches(1)
    tiny = ByName()
    watch = NonFiniteGuard(tiny, torch.optim.SGD(tiny.parameters(), lr=0.01), tmp_path)
    watch.before_train()
    watch.before_step()
    sum(tiny(batch=batch).values()).backward()


@pytest.mark.parametrize(("key", "value"), [("scale_floor", 0.0), ("patience", 0)])
def test_arguments_out_of_range_are_named(tmp_path, key, value):
    tiny = Tiny()
    optimizer = torch.optim.SGD(tiny.parameters(), lr=1.0)
    with pytest.raises(ValueError, match=f"{key} must be .* got {value}"):
        NonFiniteGuard(tiny, optimizer, tmp_path, **{key: value})


# Mixed precision


def test_overflows_at_the_start_are_the_scalers_affair(batches, tmp_path):
    tiny = Tiny()
    tiny.weight.register_hook(lambda gradient: gradient.half().float())  # inf beyond 65504
    scaler = cpu_scaler(init_scale=2.0**16)
    run = Training(tiny, batches(12), tmp_path, scaler=scaler)
    assert run.error is None
    # The two images' mean pixels add up to some 255.
    assert scaler.get_scale() in (128.0, 256.0)
    assert_same(run.states[8], run.states[0])
    assert not torch.equal(tiny.weight, run.states[0]["weight"])
    assert not (tmp_path / "non_finite").exists()


def test_gradients_that_overflow_without_a_scale_to_blame_are_an_alarm(batches, tmp_path):
    tiny = Tiny()
    tiny.weight.register_hook(lambda gradient: gradient * NAN)
    scaler = cpu_scaler(init_scale=4.0)
    run = Training(tiny, batches(12), tmp_path, scaler=scaler)
    # 4, 2 | 1, 1/2, 1/4, 1/8 are skipped, the fifth at or below 1 stops.
    report = run.report(6)
    assert report["loss_scale"] == 1 / 16
    assert report["term"] == "gradient of weight"
    assert_same(state_of(tiny), run.states[0])


def test_a_good_step_ends_a_row_of_overflows(batches, tmp_path):
    tiny, steps = Tiny(), []
    tiny.weight.register_hook(lambda g: steps.append(1) or (g if len(steps) % 5 == 0 else g * NAN))
    scaler = cpu_scaler(init_scale=1.0)
    run = Training(tiny, batches(15), tmp_path, scaler=scaler)
    assert run.error is None
    assert scaler.get_scale() == 2.0**-12


def test_a_loss_that_is_not_finite_is_an_alarm_at_any_scale(batches, tmp_path):
    data = batches(2)
    data[1][0]["image"][0] = NAN
    scaler = cpu_scaler(init_scale=2.0**16)
    run = Training(Tiny(), data, tmp_path, scaler=scaler)
    run.check_nothing_changed()
    assert run.report(1)["loss_scale"] == 2.0**16


def test_the_gradient_norm_is_that_of_the_loss_without_its_scale(batches, tmp_path):
    (data,) = batches(1)
    tiny = Tiny()
    step = diagnosis.Step(data, {"loss_a": torch.tensor(NAN)}, torch.float32, loss_scale=8.0)
    report = diagnosis.describe_failure(tiny, step, {"weight": torch.tensor([24.0, 0, 32.0])})
    assert report["gradient_norm"] == 5.0


def test_bfloat16_is_watched_and_replayed_as_bfloat16(
    model, cfg, batches, tmp_path, replay, capsys
):
    data = batches(3)
    data[2][0]["image"][1, 2, 3] = NAN
    run = Training(model, data, tmp_path, cfg=cfg, precision=torch.bfloat16)
    run.check_nothing_changed()
    assert run.report(2)["precision"] == "bfloat16"
    assert run_tool(replay, tmp_path / "non_finite" / "iter_2_rank_0") == 1
    assert "precision of autocast: bfloat16" in capsys.readouterr().out


def test_float16_overflows_forward_and_only_float16_shows_it_again(
    model, cfg, batches, tmp_path, replay
):
    with torch.no_grad():  # features beyond 65504, that float32 holds
        model.backbone.fpn_output4.norm.weight.mul_(1e7)
    scaler = cpu_scaler(init_scale=2.0)
    data = batches(1)
    run = Training(model, data, tmp_path, cfg=cfg, precision=torch.float16, scaler=scaler)
    run.check_nothing_changed()
    report = run.report(0)
    assert (report["precision"], report["level"]) == ("float16", "p4")
    assert report["module"].startswith(("head", "backbone.fpn_output4"))
    assert [x["losses"]["loss_cls"] for x in report["images"]] == ["nan", "nan"]
    folder = tmp_path / "non_finite" / "iter_0_rank_0"
    assert run_tool(replay, folder) == 1
    (folder / "report.json").write_text(json.dumps({**report, "precision": "float32"}))
    assert run_tool(replay, folder) == 0


# The batch, kept and brought back


def test_a_batch_is_kept_without_classes_of_anyone(tmp_path, batches):
    (batch,) = batches(1)
    instances = batch[0]["instances"]
    instances.gt_masks = PolygonMasks([[[0, 0, 4, 0, 4, 4]]] * 3)
    instances.gt_bitmasks = BitMasks(torch.ones(3, 5, 5, dtype=torch.bool))
    whole = torch.zeros(1000, 3, 8, 8)
    batch[1]["image"] = whole[3]
    batch[1]["file_name"] = tmp_path / "1.png"
    torch.save(to_plain(batch), tmp_path / "batch.pt")
    assert (tmp_path / "batch.pt").stat().st_size < 400_000  # not the storage of all 1000
    again = from_plain(torch.load(tmp_path / "batch.pt", weights_only=True))
    assert len(again) == 2
    assert again[1]["file_name"] == str(tmp_path / "1.png")
    assert again[0]["image_id"] == 70
    assert torch.equal(again[0]["image"], batch[0]["image"])
    found = again[0]["instances"]
    assert isinstance(found, Instances)
    assert found.image_size == instances.image_size
    assert isinstance(found.gt_boxes, Boxes)
    assert torch.equal(found.gt_boxes.tensor, instances.gt_boxes.tensor)
    assert torch.equal(found.gt_classes, instances.gt_classes)
    assert torch.equal(found.gt_bitmasks.tensor, instances.gt_bitmasks.tensor)
    assert not found.has("gt_masks")


def test_odd_arrays_are_left_out_and_lose_nothing_else(tmp_path, batches):
    data = batches(1)
    data[0][0]["image"][0] = NAN
    data[0][0].update(
        names=np.array(["cat", "dog"]),
        objects=np.array([None, 1], dtype=object),
        dates=np.array(["2020-01-01"], dtype="datetime64[D]"),
        day=np.datetime64("2020-01-01"),
        wide=np.ones(2, dtype=np.longdouble),
        big_endian=np.array([[1, 2]], dtype=">f4"),
        mask=np.ones((2, 2), bool)[:, ::-1],
        mode=BoxMode.XYWH_ABS,
    )
    data[0][0][np.int64(7)] = "seven"
    Training(Tiny(), data, tmp_path)
    folder = tmp_path / "non_finite" / "iter_0_rank_0"
    kept = torch.load(folder / "batch.pt", weights_only=True)[0]
    assert not kept.keys() & {"names", "objects", "dates"}
    assert kept["big_endian"].tolist() == [[1, 2]]
    assert kept["mask"].all()
    assert (kept["mode"], kept["day"], kept["7"]) == (1, "2020-01-01", "seven")


def test_what_fails_to_be_kept_loses_nothing_else(tmp_path, batches, monkeypatch):
    def fail(batch):
        raise TypeError("an odd batch")

    monkeypatch.setattr("focal_det.engine.guard.to_plain", fail)
    data = batches(1)
    data[0][0]["image"][0] = NAN
    run = Training(Tiny(), data, tmp_path)
    assert "iter_0_rank_0: batch.pt: TypeError: an odd batch" in run.error
    kept = sorted(x.name for x in (tmp_path / "non_finite" / "iter_0_rank_0").iterdir())
    assert kept == ["config.yaml", "model.pth", "report.json"]


# tools/replay.py


def run_tool(replay, folder, *options):
    """Its exit status, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["replay.py", str(folder), *options])
        try:
            return replay.main()
        except SystemExit as stopped:
            return stopped.code


@pytest.fixture
def stopped(model, cfg, batches, tmp_path):
    """The folder of a training that a pixel stopped."""
    data = batches(2)
    data[1][1]["image"][0, 3, 4] = NAN
    Training(model, data, tmp_path, cfg=cfg)
    return tmp_path / "non_finite" / "iter_1_rank_0"


def test_replay_shows_it_again_in_a_process_of_its_own(stopped, root):
    result = subprocess.run(
        [sys.executable, str(root / "tools" / "replay.py"), str(stopped)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 1, result.stderr[-3000:]
    text = result.stdout
    assert "Reproduced: loss_cls is nan at iteration 1; first image: 1.png (image_id 71)" in text
    images = text.split("gradient of each image by itself")[1].split("gradient of each par")[0]
    rows = [line.split() for line in images.splitlines() if ".png" in line]
    assert "nan" not in rows[0]
    assert rows[0][-1] == "0"
    assert rows[1].count("nan") == 3
    terms = text.split("gradient of each loss")[1].split("gradient of each image")[0]
    assert [line.split()[1] for line in terms.splitlines() if "loss_" in line] == ["nan", "nan"]


def test_replay_says_that_a_mended_batch_is_finite(stopped, replay, capsys):
    batch = torch.load(stopped / "batch.pt", weights_only=True)
    batch[1]["image"].nan_to_num_(0)
    torch.save(batch, stopped / "batch.pt")
    assert run_tool(replay, stopped) == 0
    assert "Not reproduced: every loss and gradient is finite here" in capsys.readouterr().out


def test_replay_gives_the_very_losses_of_the_step(model, cfg, batches, tmp_path, replay):
    fill(model.head.cls_score.bias, 4, NAN)
    run = Training(model, batches(1), tmp_path, cfg=cfg)
    report = run.report(0)
    folder = tmp_path / "non_finite" / "iter_0_rank_0"
    again = replay.build(folder / "config.yaml", None)
    again.load_state_dict(torch.load(folder / "model.pth", weights_only=True)["model"])
    again.train()
    batch = from_plain(torch.load(folder / "batch.pt", weights_only=True))
    with diagnosis.undisturbed(again):
        losses = replay.forward(again, batch, torch.float32)
    assert losses["loss_cls"].isnan()
    assert losses["loss_box_reg"].item() == report["losses"]["loss_box_reg"]


def test_replay_of_a_gradient_that_the_models_own_code_did_not_spoil(
    model, cfg, batches, tmp_path, replay, capsys
):
    model.backbone.bottom_up.res4.register_forward_hook(lambda _, __, x: Poison.apply(x))
    Training(model, batches(1), tmp_path, cfg=cfg)
    assert run_tool(replay, tmp_path / "non_finite" / "iter_0_rank_0") == 0
    assert "What may differ: another device" in capsys.readouterr().out


def test_replay_builds_the_model_of_a_lazy_config(batches, tmp_path, replay):
    config = {"model": L(LazyTiny)(size=3), "train": {"device": "cpu"}}
    LazyConfig.save(OmegaConf.create(config, flags={"allow_objects": True}), str(tmp_path / "c"))
    data = batches(1)
    data[0][0]["image"][0] = NAN
    tiny = LazyTiny(size=3)
    optimizer = torch.optim.SGD(tiny.parameters(), lr=0.01)
    text = (tmp_path / "c").read_text()
    trainer = SimpleTrainer(tiny, data, optimizer)
    trainer.register_hooks([NonFiniteGuard(tiny, optimizer, tmp_path, config_yaml=text)])
    with pytest.raises(FloatingPointError):
        trainer.train(0, 1)
    assert run_tool(replay, tmp_path / "non_finite" / "iter_0_rank_0") == 1


class LazyTiny(Tiny):
    """By a name that a config can find."""


class HalfGradient(torch.autograd.Function):
    """The identity, whose gradient passes through float16."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.half().float()


class LazyHalf(Tiny):
    def forward(self, batch):
        means = torch.stack([entry["image"].mean(dim=(1, 2)) for entry in batch])
        return {"loss_a": (HalfGradient.apply(self.weight) * means).sum()}


def test_replay_scales_the_loss_as_in_training(batches, tmp_path, replay):
    config = {"model": L(LazyHalf)(size=3), "train": {"device": "cpu"}}
    LazyConfig.save(OmegaConf.create(config, flags={"allow_objects": True}), str(tmp_path / "c"))
    half, (data,) = LazyHalf(), batches(1)
    optimizer = torch.optim.SGD(half.parameters(), lr=0.01)
    scaler = cpu_scaler(init_scale=2.0**16)
    text = (tmp_path / "c").read_text()
    trainer = MixedTrainer(half, [data], optimizer, scaler=scaler)
    options = {"grad_scaler": scaler, "scale_floor": 2.0**16, "patience": 1}
    trainer.register_hooks([NonFiniteGuard(half, optimizer, tmp_path, config_yaml=text, **options)])
    with pytest.raises(FloatingPointError, match="gradient of weight is inf"):
        trainer.train(0, 1)
    folder = tmp_path / "non_finite" / "iter_0_rank_0"
    assert run_tool(replay, folder) == 1
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({**report, "loss_scale": 1.0}))
    assert run_tool(replay, folder) == 0


class LazyActing(Tiny):
    """Takes a class, which a config that is kept cannot hold as plain data."""

    def __init__(self, act, size=3):
        super().__init__(size)
        self.act = act()


LAZY_ACTING = """
from detectron2.config import LazyCall as L
from torch import nn
from {module} import LazyActing
model = L(LazyActing)(act=nn.Identity, size=5)
train = dict(device="cpu")
"""


@pytest.mark.parametrize("empty", [False, True])
def test_replay_takes_the_config_that_cannot_be_kept(batches, tmp_path, replay, capsys, empty):
    file = tmp_path / "my.py"
    file.write_text(LAZY_ACTING.format(module=__name__))
    overrides = ["model.size=3"]
    config = LazyConfig.apply_overrides(LazyConfig.load(str(file)), overrides)
    data = batches(1)
    data[0][0]["image"][0] = NAN
    model = instantiate(config.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = SimpleTrainer(model, data, optimizer)
    text = "" if empty else _as_yaml(config)
    trainer.register_hooks([NonFiniteGuard(model, optimizer, tmp_path, config_yaml=text)])
    with pytest.raises(FloatingPointError) as error:
        trainer.train(0, 1)
    why = "it is empty" if empty else "line 1 has the tag '!!python/name:torch.nn.modules.linear.I"
    assert "cannot be replayed as it is (" in str(error.value)
    assert why in str(error.value)
    folder = tmp_path / "non_finite" / "iter_0_rank_0"
    assert f"`python tools/replay.py {folder} --config-file FILE`" in str(error.value)
    assert run_tool(replay, folder) == 2
    assert "config.yaml " + ("is empty" if empty else "cannot be used") in capsys.readouterr().err
    assert run_tool(replay, folder, "--config-file", str(file), *overrides) == 1
    assert run_tool(replay, folder, *overrides, "--config-file", str(file), "--device", "cpu") == 1
    capsys.readouterr()
    assert run_tool(replay, folder, "--config-file", str(file)) == 2
    assert f"{folder / 'model.pth'} cannot be used: RuntimeError: Err" in capsys.readouterr().err


def test_replay_takes_a_yaml_config_in_place_of_the_kept_one(stopped, replay, root):
    config = root / "configs" / "demo" / "focal_retinanet_digits.yaml"
    (stopped / "config.yaml").unlink()
    assert run_tool(replay, stopped, "--config-file", str(config)) == 1


def cut(folder, name):
    """Keep the first half of a file."""
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])


def unregister(folder):
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("NAME: FocalLoss\n", "NAME: MyLoss\n"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "batch.pt").unlink(), "has no batch.pt: name a folder of non_"),
        (lambda folder: (folder / "config.yaml").write_text(""), "config.yaml is empty: name the"),
        (lambda folder: (folder / "report.json").write_text("{}"), "report.json cannot be used: K"),
        (lambda folder: cut(folder, "report.json"), "report.json cannot be used: JSONDecodeError"),
        (lambda folder: cut(folder, "batch.pt"), "batch.pt cannot be used: ValueError: '"),
        (lambda folder: cut(folder, "model.pth"), "model.pth cannot be used: ValueError: '"),
        (
            lambda folder: torch.save({"x": np.ones(1)}, folder / "batch.pt"),
            "batch.pt cannot be used: UnsafeFileError",
        ),
        (
            lambda folder: torch.save([torch.nn.Linear(1, 1)], folder / "model.pth"),
            "model.pth cannot be used: UnsafeFileError",
        ),
        (
            lambda folder: (folder / "config.yaml").write_text("MODEL: {A: ["),
            "config.yaml cannot be used: ParserError",
        ),
        (unregister, "'MyLoss', which is not one of"),
        (unregister, "Parts of your own must be named by FOCAL_DET_PLUGINS"),
    ],
)
def test_replay_names_what_is_missing_or_damaged(stopped, replay, capsys, spoil, message):
    spoil(stopped)
    assert run_tool(replay, stopped) == 2
    error = capsys.readouterr().err
    assert str(stopped) in error
    assert message in error


def test_replay_refuses_a_device_that_is_not_there(stopped, replay, capsys):
    for device in ("cuda:99", "no_such"):
        assert run_tool(replay, stopped, "--device", device) == 2
        assert f"--device {device} is not on this machine" in capsys.readouterr().err


def test_replay_that_fails_does_not_say_that_it_is_not_finite_again(stopped, replay, capsys):
    batch = torch.load(stopped / "batch.pt", weights_only=True)
    del batch[0]["image"]
    torch.save(batch, stopped / "batch.pt")
    assert run_tool(replay, stopped) == 2
    assert "KeyError" in capsys.readouterr().err


# Several processes


def entry_of(rank, losses, reason=None):
    image = None if reason is None else {"reason": reason}
    return {"rank": rank, "losses": losses, "image": image}


def test_the_rank_with_the_surest_reason_is_blamed():
    bad = ["loss_cls"]
    vague = entry_of(0, bad, "whose predictions are not finite")
    sure = entry_of(1, bad, "whose pixels are not finite")
    sound, unknown = entry_of(2, []), entry_of(3, bad)
    assert failure_text.cause({"rank": 0, "ranks": [vague, sure, sound]}) is sure
    assert failure_text.cause({"rank": 2, "ranks": [sound, vague, unknown]}) is vague
    assert failure_text.cause({"rank": 2, "ranks": [sound, unknown]}) is unknown
    # Where all losses are finite, a rank can only speak of itself.
    other = entry_of(1, [], "whose pixels are not finite")
    assert failure_text.cause({"rank": 2, "ranks": [other, sound]}) is sound


WORKER = """
import json
import sys
from pathlib import Path

import torch
from detectron2.engine import SimpleTrainer, defaults, launch
from detectron2.utils import comm
from torch import nn

from focal_det.compat import allow_ddp_on_cpu
from focal_det.engine.guard import NonFiniteGuard


class Distances(nn.Module):
    def __init__(self, power):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.power = power

    def forward(self, batch):
        targets = torch.stack([entry["target"] for entry in batch])
        return {"distance": (self.weight - targets).abs().pow(self.power).sum()}


def train(folder, power):
    rank = comm.get_rank()
    batches = [[{"target": torch.zeros(3), "file_name": f"{rank}_{i}.png"}] for i in range(4)]
    if rank == 1:
        batches[2][0]["target"][1] = float("inf")
    model = defaults.create_ddp_model(Distances(power))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleTrainer(model, batches, optimizer)
    trainer.register_hooks([NonFiniteGuard(model, optimizer, folder)])
    try:
        trainer.train(0, 4)
    except FloatingPointError as error:
        weight = model.module.weight
        result = {"error": str(error), "weight": weight.tolist(), "gradient": weight.grad.tolist()}
        Path(folder, f"{rank}.json").write_text(json.dumps(result))


def main(folder):
    allow_ddp_on_cpu()
    for power in (1, 2):
        train(f"{folder}/{power}", power)


if __name__ == "__main__":
    launch(main, 2, dist_url="auto", args=(sys.argv[1],))
"""


def test_two_processes_stop_together(tmp_path, root):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    # The loss of one process is infinite. The gradient of a distance, on all, is finite for all
    # that; the gradient of its square is not.
    for power, weight, spoiled in ((1, 0.8, 0.0), (2, 0.64, -INF)):
        folder = tmp_path / str(power)
        for rank in range(2):
            found = json.loads((folder / f"{rank}.json").read_text())
            assert found["weight"] == pytest.approx([weight] * 3)  # of after two steps
            expected = [power * weight ** (power - 1), spoiled, power * weight ** (power - 1)]
            assert found["gradient"] == pytest.approx(expected)
            path = folder / "non_finite" / f"iter_2_rank_{rank}"
            where = "distance is inf at iteration 2 on rank 1; first image: 1_2.png"
            assert found["error"].startswith(where)
            assert str(path) in found["error"]
            report = json.loads((path / "report.json").read_text(), parse_constant=pytest.fail)
            assert (report["rank"], report["world_size"]) == (rank, 2)
            assert [x["losses"] for x in report["ranks"]] == [[], ["distance"]]
            assert report["images"][0]["file_name"] == f"{rank}_2.png"
            finite = pytest.approx(3 * weight**power)
            assert report["losses"] == {"distance": "inf" if rank else finite}
