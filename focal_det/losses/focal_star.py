"""The alternative form of the focal loss (FL*)."""

from torch import Tensor
from torch.nn import functional as F

from .contract import ElementwiseLoss, check_in_range
from .logistic import logistic
from .registry import LOSS_REGISTRY


@LOSS_REGISTRY.register()
class FocalLossStar(ElementwiseLoss):
    """FL* (arXiv 1708.02002, appendices A and B, Table 3).

        p_t* = sigmoid(gamma x_t + beta)
        FL*  = -alpha_t log(p_t*) / gamma          dFL*/dx = y alpha_t (p_t* - 1)

    Args:
        alpha: weight of the foreground terms, ``1 - alpha`` of the background ones, in [0, 1];
            None or negative for no weighting.
        gamma: steepness, > 0. The paper reports (gamma 2, beta 1) and (4, 0).
        beta: shift, any finite number.

    Raises:
        ValueError: `alpha` above 1, `gamma` not above 0, or `beta` not finite.
    """

    config_node = "FL_STAR"

    def __init__(self, alpha: float | None = 0.25, gamma: float = 2.0, beta: float = 1.0) -> None:
        super().__init__()
        self._set_alpha(alpha)
        check_in_range(self, "gamma", gamma, 0.0, low_excluded=True)
        check_in_range(self, "beta", beta)
        self.gamma, self.beta = float(gamma), float(beta)

    def value(self, x_t: Tensor, foreground: bool) -> Tensor:
        """FL* without alpha_t, of the shape of `x_t`."""
        return -F.logsigmoid(self.gamma * x_t + self.beta) / self.gamma

    def value_and_slope(self, z: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        """FL* and its derivative by z = -x_t, each of the shape of `z`, without alpha_t."""
        minus_log_p, miss, _ = logistic((self.gamma * z).sub_(self.beta))
        return minus_log_p.div_(self.gamma), miss
