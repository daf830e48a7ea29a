"""Cross entropy (CE)."""

from torch import Tensor

from .contract import ElementwiseLoss
from .logistic import logistic
from .registry import LOSS_REGISTRY


@LOSS_REGISTRY.register()
class CrossEntropyLoss(ElementwiseLoss):
    """Sigmoid cross entropy, the baseline of the paper (arXiv 1708.02002, eqs. 1 and 2).

        CE(p_t) = -log(p_t)               dCE/dx = y (p_t - 1)

    Logits (..., K), labels (...): see :class:`focal_det.losses.ClassificationLoss`.
    """

    def value_and_slope(self, x_t: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        """CE and its derivative by x_t, each of the shape of `x_t`."""
        minus_log_p, miss, _ = logistic(-x_t)
        return minus_log_p, -miss
