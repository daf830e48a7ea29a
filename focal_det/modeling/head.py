"""ROI-free heads: dense predictions straight from the pyramid."""

from typing import TYPE_CHECKING, Any

from detectron2.config import configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from fvcore.common.registry import Registry
from torch import nn

from focal_det.losses.registry import find_registered

if TYPE_CHECKING:
    from detectron2.config import CfgNode

DENSE_HEAD_REGISTRY: Registry = Registry("DENSE_HEAD")
DENSE_HEAD_REGISTRY.__doc__ = """
Heads by class name. Called with the list of feature maps (N, C, Hi, Wi), a head returns two lists,
one entry a level: logits (N, A x K, Hi, Wi) and box deltas (N, A x 4, Hi, Wi).
"""


GROUPS_FIT = 32  # channels that any norm can be made for


def build_dense_head(cfg: "CfgNode", input_shape: list[ShapeSpec]) -> nn.Module:
    """Build the head that ``MODEL.FOCAL_DET.HEAD.NAME`` names.

    Args:
        cfg: a config with the keys of :func:`focal_det.add_config`.
        input_shape: channels and stride of each feature level.

    Raises:
        ValueError: an unknown name (the valid ones are listed).
    """
    head = find_registered(DENSE_HEAD_REGISTRY, cfg, "MODEL.FOCAL_DET.HEAD.NAME")
    return head(cfg, input_shape)


@DENSE_HEAD_REGISTRY.register()
class FocalRetinaNetHead(RetinaNetHead):
    """The paper's two subnets (arXiv 1708.02002, section 4): classification and box regression.

    Same structure, parameter names and initialisation as Detectron2's head, so weights load both
    ways; arguments are checked early. The classification bias starts at
    ``-log((1 - prior_prob) / prior_prob)``, so that every anchor begins with
    ``p = prior_prob`` of being foreground (section 4.1).

    Args:
        input_shape: channels and stride of each feature level; the channels must agree.
        num_classes: K, foreground classes, >= 1.
        num_anchors: A, anchors per location, the same on every level.
        conv_dims: channels of each 3x3 convolution of a subnet, at least one.
        norm: normalization after them, ``""`` for none (the paper's); see
            :func:`detectron2.layers.get_norm`.
        prior_prob: in (0, 1); 0.5 switches the prior off (the bias is then 0).

    Raises:
        ValueError: an argument out of its range; its config key is named.
    """

    @configurable
    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_classes: int,
        num_anchors: int,
        conv_dims: list[int],
        norm: Any = "",
        prior_prob: float = 0.01,
    ) -> None:
        if num_classes < 1:
            raise ValueError(
                f"num_classes (MODEL.RETINANET.NUM_CLASSES) must be >= 1, got {num_classes}: it "
                "counts the foreground classes, background is not one of them"
            )
        if not conv_dims:
            raise ValueError("conv_dims is empty: MODEL.RETINANET.NUM_CONVS must be >= 1, got 0")
        if not 0 < prior_prob < 1:
            raise ValueError(
                f"prior_prob (MODEL.RETINANET.PRIOR_PROB) must be in (0, 1), got {prior_prob}"
            )
        try:
            get_norm(norm, GROUPS_FIT)
        except KeyError:
            raise ValueError(
                'norm (MODEL.RETINANET.NORM) must be "" or a norm of Detectron2 (GN, BN, SyncBN, '
                f"FrozenBN, ...), got {norm!r}"
            ) from None
        super().__init__(
            input_shape=input_shape,
            num_classes=num_classes,
            num_anchors=num_anchors,
            conv_dims=conv_dims,
            norm=norm,
            prior_prob=prior_prob,
        )
