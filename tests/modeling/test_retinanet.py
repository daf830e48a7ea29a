"""FocalRetinaNet by itself: injection, the steps with each loss, errors with names."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

import focal_det
from focal_det.losses import LOSS_REGISTRY, ElementwiseLoss, FocalLoss, OHEMLoss
from focal_det.losses.contract import ClassificationLoss
from focal_det.modeling import BatchNormalizer, FocalRetinaNet
from focal_det.modeling.retinanet import _view_per_anchor

LOSSES = [name for name, _ in LOSS_REGISTRY]


def train_step(model, batch):
    model.train().zero_grad()
    with EventStorage() as storage:
        losses = model(batch)
        sum(losses.values()).backward()
        return losses, {key: value for key, (value, _) in storage.latest().items()}


@pytest.mark.parametrize("normalizer", ["ema", "batch", "image"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_with_every_normalizer(small_cfg, make_batch, loss, normalizer):
    small_cfg.MODEL.FOCAL_DET.LOSS.NAME = loss
    small_cfg.MODEL.FOCAL_DET.NORMALIZER.NAME = normalizer
    model = build_model(small_cfg)
    assert type(model.cls_loss) is LOSS_REGISTRY.get(loss)
    for counts in ((3, 0), (0, 0)):
        losses, _ = train_step(model, make_batch(counts))
        assert set(losses) == {"loss_cls", "loss_box_reg"}
        assert all(value.isfinite() and value.dim() == 0 for value in losses.values())
        # No parameter may drop out of the graph: DistributedDataParallel would stop.
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("loss", ["FocalLoss", "OHEMLoss"])
def test_loss_dict_equals_the_contract_on_flattened_predictions(small_cfg, make_batch, loss):
    """losses() over views equals one call of the loss on Detectron2's (N, R, K) form."""
    small_cfg.MODEL.FOCAL_DET.LOSS.NAME = loss
    small_cfg.MODEL.FOCAL_DET.NORMALIZER.NAME = "batch"
    model = build_model(small_cfg).train()
    batch = make_batch((3, 5))
    seen = {}
    model.losses = lambda *args: seen.update(args=args) or {}
    with torch.no_grad():
        model(batch)
    del model.losses
    anchors, logits, gt_labels, deltas, gt_boxes = seen["args"]
    with EventStorage():
        losses = model.losses(anchors, logits, gt_labels, deltas, gt_boxes)
    flat = torch.cat([x.reshape(2, -1, 5) for x in logits], dim=1)
    labels = torch.stack(gt_labels)
    tensors = torch.cat([level.tensor for level in anchors])
    flat_deltas = torch.cat([x.reshape(2, -1, 4) for x in deltas], dim=1)
    boxes = torch.stack([model.box2box_transform.apply_deltas(x, tensors) for x in flat_deltas])
    num_foreground = ((labels >= 0) & (labels < 5)).sum()
    assert num_foreground > 0
    expected = model.cls_loss(flat, labels, boxes) / num_foreground
    torch.testing.assert_close(losses["loss_cls"], expected)


def test_view_per_anchor_is_detectron2s_order_without_a_copy():
    from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K

    x = torch.randn(2, 3 * 5, 4, 6)
    view = _view_per_anchor(x, 5)
    assert view.shape == (2, 4, 6, 3, 5)
    assert view.data_ptr() == x.data_ptr()
    assert torch.equal(view.flatten(1, 3), permute_to_N_HWA_K(x, 5))


def test_scalars_split_the_classification_loss(small_cfg, make_batch):
    """With p = .01 everywhere, each of n foreground terms costs .25 x .99^2 x -log(.01)."""
    small_cfg.MODEL.FOCAL_DET.NORMALIZER.NAME = "batch"
    model = build_model(small_cfg)
    nn.init.zeros_(model.head.cls_score.weight)
    losses, scalars = train_step(model, make_batch((3, 2)))
    assert scalars["num_pos_anchors"] > 0
    assert scalars["classification/foreground"] == pytest.approx(0.25 * 0.99**2 * 4.605170)
    split = scalars["classification/foreground"] + scalars["classification/background"]
    assert split == pytest.approx(losses["loss_cls"].item(), rel=1e-6)


def test_any_classification_loss_can_be_injected(small_cfg, make_batch):
    class Doubled(ElementwiseLoss):
        def value(self, x_t, foreground):
            return 2 * nn.functional.softplus(-x_t)

    arguments = FocalRetinaNet.from_config(small_cfg)
    arguments["cls_loss"] = Doubled()
    model = FocalRetinaNet(**arguments)
    doubled, _ = train_step(model, make_batch((3, 2)))
    model.cls_loss = FocalLoss(alpha=None, gamma=0.0)
    model.normalizer.value.fill_(100.0)
    plain, _ = train_step(model, make_batch((3, 2)))
    torch.testing.assert_close(doubled["loss_cls"], 2 * plain["loss_cls"])


def test_a_plain_module_is_a_loss_too(small_cfg, make_batch):
    """Anything called as loss(logits, labels) will do; it sees one image at a time."""

    class Plain(nn.Module):
        def forward(self, logits, labels):
            assert logits.dim() == 2
            return FocalLoss()(logits, labels)

    class PlainWithBoxes(nn.Module):
        needs_boxes = True

        def forward(self, logits, labels, boxes):
            return OHEMLoss()(logits, labels, boxes)

    arguments = {**FocalRetinaNet.from_config(small_cfg), "normalizer": BatchNormalizer()}
    batch = make_batch((3, 2))
    for plain, known in ((Plain(), FocalLoss()), (PlainWithBoxes(), OHEMLoss())):
        results = [
            train_step(FocalRetinaNet(**{**arguments, "cls_loss": loss}), batch)
            for loss in (plain, known)
        ]
        torch.testing.assert_close(results[0][0], results[1][0])
        assert "classification/foreground" not in results[0][1]


def test_a_plain_module_can_be_registered(small_cfg):
    @LOSS_REGISTRY.register()
    class PlainHinge(nn.Module):
        def __init__(self, margin=1.0):
            super().__init__()
            self.margin = margin

        def forward(self, logits, labels):
            return (self.margin - logits).relu().sum()

    try:
        focal_det.add_config(small_cfg)
        small_cfg.MODEL.FOCAL_DET.LOSS.NAME = "PlainHinge"
        small_cfg.MODEL.FOCAL_DET.PLAIN_HINGE.MARGIN = 0.5
        assert build_model(small_cfg).cls_loss.loss.margin == 0.5
    finally:
        LOSS_REGISTRY._obj_map.pop("PlainHinge")


def test_scripted_for_deployment_it_detects_what_the_built_in_does(small_cfg, make_batch):
    from detectron2.export import scripting_with_instances
    from detectron2.structures import Boxes

    fields = {"pred_boxes": Boxes, "scores": torch.Tensor, "pred_classes": torch.Tensor}
    batch = [{"image": make_batch((1,))[0]["image"]}]
    results = []
    for name in ("RetinaNet", "FocalRetinaNet"):
        small_cfg.MODEL.META_ARCHITECTURE = name
        torch.manual_seed(0)
        scripted = scripting_with_instances(build_model(small_cfg).eval(), fields)
        with torch.no_grad():
            results.append(scripted(batch)[0])
    expected, found = results
    assert len(expected.scores) > 0
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_wrong_parts_are_refused(small_cfg):
    arguments = FocalRetinaNet.from_config(small_cfg)
    with pytest.raises(TypeError, match=r"cls_loss must be an nn\.Module, got function"):
        FocalRetinaNet(**{**arguments, "cls_loss": nn.functional.cross_entropy})
    with pytest.raises(TypeError, match=r"normalizer must be .*LossNormalizer, got float"):
        FocalRetinaNet(**{**arguments, "normalizer": 100.0})


@pytest.mark.parametrize("wrong", [5, -1])
def test_class_out_of_range_is_refused(small_cfg, make_batch, wrong):
    batch = make_batch((3, 2))
    batch[1]["instances"].gt_classes[0] = wrong
    model = build_model(small_cfg)
    with pytest.raises(ValueError, match=rf"gt_classes holds {wrong}, allowed is 0\.\.4"):
        train_step(model, batch)


def test_low_precision_autocast_keeps_the_loss_in_float32(small_cfg, make_batch):
    model = build_model(small_cfg)
    batch = make_batch((3, 2))
    full, _ = train_step(model, batch)
    model.normalizer.value.fill_(100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, _ = train_step(model, batch)
    assert low["loss_cls"].dtype == torch.float32
    torch.testing.assert_close(low["loss_cls"], full["loss_cls"], rtol=0.03, atol=0)


def test_only_losses_that_ask_get_boxes(small_cfg, make_batch):
    class Recorder(ClassificationLoss):
        def per_image(self, logits, labels, boxes=None, weights=None):
            self.boxes = boxes
            return FocalLoss().per_image(logits, labels, weights=weights)

    arguments = {**FocalRetinaNet.from_config(small_cfg), "normalizer": BatchNormalizer()}
    for needs_boxes in (False, True):
        loss = type("Asking", (Recorder,), {"needs_boxes": needs_boxes})()
        train_step(FocalRetinaNet(**{**arguments, "cls_loss": loss}), make_batch((1,)))
        if needs_boxes:
            assert [x.shape[-1] for x in loss.boxes] == [4] * 5
            assert not any(x.requires_grad for x in loss.boxes)
        else:
            assert loss.boxes is None


@pytest.mark.parametrize("loss", ["FocalLoss", "OHEMLoss"])
def test_impl_reaches_the_loss_and_changes_nothing_but_the_way(small_cfg, make_batch, loss):
    small_cfg.MODEL.FOCAL_DET.LOSS.NAME = loss
    losses = {}
    for impl in ("torch", "eager"):
        small_cfg.MODEL.FOCAL_DET.IMPL = impl
        torch.manual_seed(0)
        losses[impl], _ = train_step(build_model(small_cfg), make_batch((3, 2)))
    torch.testing.assert_close(losses["torch"], losses["eager"])
    # The signature's way, which a LazyConfig takes.
    arguments = FocalRetinaNet.from_config(small_cfg)
    inner = FocalRetinaNet(**arguments, impl="torch").cls_loss
    assert getattr(inner, "cross_entropy", inner).impl == "torch"
    with pytest.raises(ValueError, match="impl must be one of auto, eager, torch, triton"):
        FocalRetinaNet(**arguments, impl="cuda")
