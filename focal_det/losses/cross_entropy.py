"""Cross entropy (CE)."""

from torch import Tensor
from torch.nn import functional as F

from .contract import ElementwiseLoss
from .logistic import logistic
from .registry import LOSS_REGISTRY


@LOSS_REGISTRY.register()
class CrossEntropyLoss(ElementwiseLoss):
    """Sigmoid cross entropy, the baseline of the paper (arXiv 1708.02002, eqs. 1 and 2).

        CE(p_t) = -log(p_t)               dCE/dx = y (p_t - 1)

    Logits (..., K), labels (...): see :class:`focal_det.losses.ClassificationLoss`.
    """

    def value(self, x_t: Tensor, foreground: bool) -> Tensor:
        """CE, of the shape of `x_t`."""
        return -F.logsigmoid(x_t)

    def value_and_slope(self, z: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        """CE and its derivative by z = -x_t, each of the shape of `z`."""
        minus_log_p, miss, _ = logistic(z)
        return minus_log_p, miss
