"""Training steps in automatic mixed precision."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

needs_scaler = pytest.mark.skipif(
    not hasattr(torch.amp, "GradScaler"), reason="this PyTorch scales losses on CUDA only"
)


def gradients(model, batch, dtype=None, scaler=None):
    """Losses, and the gradients as one vector, of a step from the same state."""
    model.train().zero_grad()
    model.normalizer.value.fill_(100.0)
    enabled = dtype is not None
    with EventStorage(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=enabled):
        losses = model(batch)
    total = sum(losses.values())
    (total if scaler is None else scaler.scale(total)).backward()
    return losses, flat_gradient(model)


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(("loss", "box_loss"), [("FocalLoss", "giou"), ("OHEMLoss", "smooth_l1")])
def test_bfloat16_losses_and_gradients_are_near_those_of_float32(
    small_cfg, make_batch, loss, box_loss
):
    small_cfg.MODEL.FOCAL_DET.LOSS.NAME = loss
    small_cfg.MODEL.RETINANET.BBOX_REG_LOSS_TYPE = box_loss
    torch.manual_seed(0)
    model, batch = build_model(small_cfg), make_batch((3, 2))
    full, full_grad = gradients(model, batch)
    low, low_grad = gradients(model, batch, torch.bfloat16)
    for name, value in low.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, full[name], rtol=0.03, atol=1e-3)
    assert low_grad.isfinite().all()
    # A hard example fewer or more is another gradient: OHEM's minibatch is not exactly the same.
    similarity = torch.cosine_similarity(low_grad, full_grad, dim=0)
    assert similarity > (0.9 if loss == "OHEMLoss" else 0.99)
    assert 0.9 < low_grad.norm() / full_grad.norm() < 1.1


@needs_scaler
def test_a_loss_scale_multiplies_every_gradient(small_cfg, make_batch):
    torch.manual_seed(0)
    model, batch = build_model(small_cfg), make_batch((3, 0))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    _, expected = gradients(model, batch)
    _, scaled = gradients(model, batch, scaler=scaler)
    assert torch.equal(scaled, expected * 2.0**12)


@needs_scaler
def test_a_step_with_a_loss_scale_is_the_step_without(small_cfg, make_batch):
    batch, states = make_batch((3, 2)), []
    for enabled in (True, False):
        torch.manual_seed(0)
        model = build_model(small_cfg)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=enabled)
        before = flat_state(model)
        for _ in range(2):
            gradients(model, batch, scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == (2.0**12 if enabled else 1)
        states.append(flat_state(model))
        assert not torch.equal(states[-1], before)
    torch.testing.assert_close(*states, rtol=0, atol=1e-7)


def flat_state(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@needs_scaler
def test_gradients_that_overflow_skip_a_step(small_cfg, make_batch):
    model = build_model(small_cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = flat_state(model)
    gradients(model, make_batch((3, 2)), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat_state(model), before)
    assert scaler.get_scale() == 2.0**126
