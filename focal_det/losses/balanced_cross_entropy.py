"""Alpha-balanced cross entropy."""

from .cross_entropy import CrossEntropyLoss
from .registry import LOSS_REGISTRY


@LOSS_REGISTRY.register()
class BalancedCrossEntropyLoss(CrossEntropyLoss):
    """Cross entropy with a weight for each side (arXiv 1708.02002, eq. 3, Table 1a).

        CE(p_t) = -alpha_t log(p_t)       dCE/dx = y alpha_t (p_t - 1)

    Args:
        alpha: weight of the foreground terms, ``1 - alpha`` of the background ones, in [0, 1];
            None or negative for no weighting, which is plain CE. The paper's best is 0.75.

    Raises:
        ValueError: `alpha` above 1.
    """

    config_node = "BALANCED_CE"

    def __init__(self, alpha: float | None = 0.75) -> None:
        super().__init__()
        self._set_alpha(alpha)
