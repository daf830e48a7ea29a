"""What only some versions of Detectron2 can do, for the tests that need it."""

import inspect

import pytest
from detectron2.modeling.meta_arch import RetinaNet

needs_newer_ties = pytest.mark.skipif(
    "topk(" not in inspect.getsource(RetinaNet._decode_per_level_predictions),
    reason="of equal scores, Detectron2 0.6 keeps others than later versions and focal_det",
)
