"""Other detectors on the same backbone, data and schedule."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

import focal_det
from focal_det.lab.rivals import DIFFERENCES, choose_detector
from focal_det.lab.running import run_trial
from focal_det.lab.tables import Row, Table, load_table
from focal_det.lab.trials import make_trials

RIVALS = sorted(DIFFERENCES)
DEMO = "configs/demo/focal_retinanet_digits.yaml"


@pytest.fixture
def build(root):
    """A function that builds a detector of the demo's size from seed 0."""

    def make(name):
        cfg = get_cfg()
        focal_det.add_config(cfg)
        cfg.merge_from_file(str(root / DEMO))
        choose_detector(cfg, name)
        seed_all_rng(0)
        return build_model(cfg)

    return make


def backbone_of(model):
    return getattr(model, "model", model).backbone


def sample(boxes=((10.0, 10.0, 40.0, 50.0),)):
    instances = Instances((128, 128))
    instances.gt_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
    instances.gt_classes = torch.arange(len(boxes))
    image = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0)) * 255
    return {"image": image, "instances": instances, "height": 64, "width": 96}


@pytest.mark.parametrize("name", RIVALS)
def test_the_backbone_starts_from_the_same_weights(build, name):
    ours = {
        key.removeprefix("backbone."): x
        for key, x in backbone_of(build("focal_det")).state_dict().items()
    }
    theirs = {
        key.removeprefix("backbone."): x for key, x in backbone_of(build(name)).state_dict().items()
    }
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[key]) for key, x in ours.items())


@pytest.mark.parametrize("name", RIVALS)
def test_losses_are_finite_with_and_without_objects(build, name):
    model = build(name)
    for boxes in (((10.0, 10.0, 40.0, 50.0), (60.0, 60.0, 90.0, 100.0)), ()):
        with EventStorage():
            losses = model([sample(boxes), sample()])
        assert all(x.isfinite() for x in losses.values())
        sum(losses.values()).backward()
    grads = [x.grad for x in backbone_of(model).parameters() if x.requires_grad]
    assert any(grad is not None and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("name", RIVALS)
def test_detections_are_at_the_size_of_the_image_on_disk(build, name):
    model = build(name).eval()
    with torch.no_grad():
        found = model([sample()])[0]["instances"]
    assert found.image_size == (64, 96)
    if len(found):
        corners = found.pred_boxes.tensor
        assert (corners[:, 0::2] <= 96).all()
        assert (corners[:, 1::2] <= 64).all()
        assert found.pred_classes.max() < 10
        assert len(found) <= 50


def test_torchvisions_own_boxes_and_classes_come_through(build):
    """A detector that predicts what it is told, behind the wrapper."""
    model = build("torchvision_retinanet").eval()
    told = {"boxes": torch.tensor([[10.0, 20.0, 30.0, 40.0]]), "scores": torch.tensor([0.9])}
    model.model.forward = lambda images: [{**told, "labels": torch.tensor([7])}]
    found = model([sample()])[0]["instances"]
    # 128 x 128 as it was seen, 96 x 64 on disk.
    assert found.pred_boxes.tensor.tolist() == [[7.5, 10.0, 22.5, 20.0]]
    assert found.pred_classes.tolist() == [7]


@pytest.mark.parametrize("name", RIVALS)
def test_every_detector_is_a_trial(root, few, build, tmp_path, name):
    (trial,) = make_trials(
        Table("t", "", "", (Row(name, {}, detector=name),)),
        config_file=str(root / DEMO),
        data=few,
        seeds=1,
        budget=2,
        options=("SOLVER.IMS_PER_BATCH", 2),
    )
    record = run_trial(trial, tmp_path / "out")
    assert record["error"] is None
    assert 0 <= record["metrics"]["AP"] <= 100
    assert record["inference_ms"]["median"] > 0
    assert record["images_per_second"] > 0
    assert record["parameters"] == sum(x.numel() for x in build(name).parameters())
    assert record["gflops"] > 0.1


def test_the_built_in_retinanet_is_ours_with_focal_loss(build):
    """The fight is fair only if the two rows begin as the same detector."""
    ours, theirs = build("focal_det"), build("retinanet")
    their_state = theirs.state_dict()
    kept = {key: x for key, x in ours.state_dict().items() if key in their_state}
    assert kept.keys() == their_state.keys()
    assert all(torch.equal(x, their_state[key]) for key, x in kept.items())


def test_the_table_of_detectors_has_all_of_them():
    assert {row.detector for row in load_table("detectors").rows} == set(RIVALS)
