"""Cross entropy (CE)."""

from torch import Tensor
from torch.nn import functional as F

from .contract import ElementwiseLoss
from .registry import LOSS_REGISTRY


@LOSS_REGISTRY.register()
class CrossEntropyLoss(ElementwiseLoss):
    """Sigmoid cross entropy, the baseline of the paper (arXiv 1708.02002, eqs. 1 and 2).

        CE(p_t) = -log(p_t)               dCE/dx = y (p_t - 1)

    Logits (..., K), labels (...): see :class:`focal_det.losses.ClassificationLoss`.
    """

    def value_and_slope(self, x_t: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        """CE and its derivative by x_t, each of the shape of `x_t`."""
        # p_t - 1 = -sigmoid(-x_t) keeps its relative precision where p_t rounds to 1.
        return F.softplus(-x_t), -(-x_t).sigmoid()
