"""The cache of anchors: shared while nothing changes, and never stale."""

import copy
import pickle

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import BufferList, DefaultAnchorGenerator
from detectron2.utils.events import EventStorage
from torch import nn

from focal_det.modeling.anchors import AnchorCache


@pytest.fixture
def generator():
    return DefaultAnchorGenerator(
        sizes=[[32], [64]], aspect_ratios=[[0.5, 1.0]], strides=[8, 16], offset=0.0
    )


def maps(height=4, width=6, **kwargs):
    return [torch.zeros(2, 3, height, width, **kwargs), torch.zeros(2, 3, 2, 3, **kwargs)]


def equal(one, other):
    return all(torch.equal(a.tensor, b.tensor) for a, b in zip(one, other, strict=True))


def same(first, second):
    """Whether two lists of anchors are the same tensors."""
    return all(a.tensor is b.tensor for a, b in zip(first, second, strict=True))


def test_the_same_sizes_share_the_anchors_of_the_generator(generator):
    cache = AnchorCache()
    anchors = cache(generator, maps())
    assert equal(anchors, generator(maps()))
    again = cache(generator, [x[:1, :1] + 1 for x in maps()])  # other images and channels
    assert same(anchors, again)


@pytest.mark.parametrize("shape", [(4, 7), (5, 6), (6, 4)])
def test_other_sizes_get_other_anchors(generator, shape):
    cache = AnchorCache()
    cache(generator, maps())
    assert equal(cache(generator, maps(*shape)), generator(maps(*shape)))


def test_the_size_that_was_not_used_for_longest_is_forgotten(generator):
    cache = AnchorCache(max_sizes=2)
    first, second = cache(generator, maps(1)), cache(generator, maps(2))
    assert same(cache(generator, maps(1)), first)
    cache(generator, maps(3))
    assert same(cache(generator, maps(1)), first)
    assert not same(cache(generator, maps(2)), second)
    assert len(cache._kept) == 2


def test_any_other_generator_is_asked_each_time(generator):
    class Shifted(DefaultAnchorGenerator):
        calls = 0

        def forward(self, features):
            self.calls += 1
            boxes = super().forward(features)
            for level in boxes:
                level.tensor += self.calls
            return boxes

    class Plain(nn.Module):
        def forward(self, features):
            return [object()]

    cache = AnchorCache()
    shifted = Shifted(sizes=[[32], [64]], aspect_ratios=[[0.5, 1.0]], strides=[8, 16], offset=0.0)
    for calls in (1, 2):
        expected = generator(maps())[0].tensor + calls
        assert torch.equal(cache(shifted, maps())[0].tensor, expected)
    plain = Plain()
    assert cache(plain, maps())[0] is not cache(plain, maps())[0]


def first_level(generator):
    return next(generator.cell_anchors.buffers())


def halve(generator):
    generator.half()


def scale_in_place(generator):
    first_level(generator).mul_(2)


def replace_one(generator):
    generator.cell_anchors._buffers["0"] = first_level(generator) * 2


def replace_all(generator):
    generator.cell_anchors = BufferList([x * 2 for x in generator.cell_anchors])


def load(generator):
    for buffer in generator.buffers():
        buffer.copy_(buffer * 2)


@pytest.mark.parametrize(
    "change",
    [halve, scale_in_place, replace_one, replace_all, load],
    ids=lambda change: change.__name__,
)
def test_changed_cell_anchors_are_seen(generator, change):
    cache = AnchorCache()
    before = cache(generator, maps())
    change(generator)
    after = cache(generator, maps())
    assert equal(after, generator(maps()))
    assert not same(after, before)


def test_moved_cell_anchors_are_seen(generator):
    cache = AnchorCache()
    cache(generator, maps())
    assert cache(generator.to("meta"), maps(device="meta"))[0].device.type == "meta"


def test_one_cache_tells_generators_apart(generator):
    other = DefaultAnchorGenerator(
        sizes=[[16], [24]], aspect_ratios=[[0.5, 1.0]], strides=[8, 16], offset=0.0
    )
    cache = AnchorCache()
    cache(generator, maps())
    assert equal(cache(other, maps()), other(maps()))


def test_inference_mode_keeps_to_itself(generator):
    cache = AnchorCache()
    with torch.inference_mode():
        inside = cache(generator, maps())
        assert same(cache(generator, maps()), inside)
    outside = cache(generator, maps())
    assert inside[0].tensor.is_inference()
    assert not outside[0].tensor.is_inference()
    with torch.inference_mode():
        assert same(cache(generator, maps()), inside)


def test_a_generator_made_in_inference_mode_works():
    """Its tensors count no versions."""
    with torch.inference_mode():
        generator = DefaultAnchorGenerator(
            sizes=[[32], [64]], aspect_ratios=[[0.5, 1.0]], strides=[8, 16], offset=0.0
        )
        assert equal(AnchorCache()(generator, maps()), generator(maps()))


@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou"])
def test_training_goes_on_after_an_evaluation_in_inference_mode(small_cfg, make_batch, box_loss):
    small_cfg.MODEL.RETINANET.BBOX_REG_LOSS_TYPE = box_loss
    model, batch = build_model(small_cfg), make_batch((3, 2))
    with torch.inference_mode():
        model.eval()(batch)
    with EventStorage():
        sum(model.train()(batch).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_copies_of_a_model_work_and_carry_no_anchors(small_cfg, make_batch):
    model, batch = build_model(small_cfg).eval(), make_batch((1,))
    with torch.no_grad():
        expected = model(batch)[0]["instances"]
        assert len(model._anchors._kept) == 1
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert len(copied._anchors._kept) == 0
            assert copied._anchors.max_sizes == model._anchors.max_sizes
            found = copied(batch)[0]["instances"]
            assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
            assert len(copied._anchors._kept) == len(model._anchors._kept) == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*")
def test_a_trace_makes_its_own_anchors(generator):
    cache = AnchorCache()
    cache(generator, maps())

    def run(*features):
        return tuple(boxes.tensor for boxes in cache(generator, list(features)))

    traced = torch.jit.trace(run, tuple(maps()), check_trace=False)
    assert len(cache._kept) == 1
    for shape in ((4, 6), (5, 9)):
        expected = generator(maps(*shape))
        found = traced(*maps(*shape))
        assert all(torch.equal(a, b.tensor) for a, b in zip(found, expected, strict=True))


def test_anchors_that_a_caller_changed_are_made_anew(generator):
    cache = AnchorCache()
    for level in cache(generator, maps()):
        level.scale(0.5, 0.5)  # in place
    assert equal(cache(generator, maps()), generator(maps()))


def test_another_offset_gives_other_anchors(generator):
    cache = AnchorCache()
    cache(generator, maps())
    generator.offset = 0.5 - generator.offset
    assert equal(cache(generator, maps()), generator(maps()))
