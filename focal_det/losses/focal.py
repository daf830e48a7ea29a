"""Focal Loss (FL)."""

from torch import Tensor
from torch.nn import functional as F

from .contract import ElementwiseLoss, check_in_range
from .logistic import logistic
from .registry import LOSS_REGISTRY


@LOSS_REGISTRY.register()
class FocalLoss(ElementwiseLoss):
    """Focal Loss (arXiv 1708.02002, eqs. 4 and 5; derivative: appendix B).

        FL(p_t)  = -alpha_t (1 - p_t)^gamma log(p_t)
        dFL/dx   = y alpha_t (1 - p_t)^gamma (gamma p_t log(p_t) + p_t - 1)

    Args:
        alpha: weight of the foreground terms, ``1 - alpha`` of the background ones, in [0, 1];
            None or negative for no weighting. It sinks as gamma grows, since focusing already
            quiets the easy background: the paper's best pairs are (gamma 0, alpha .75),
            (.5, .5), (2, .25).
        gamma: focusing strength, >= 0; 0 gives cross entropy. Values in (0, 1) are exact too.

    Raises:
        ValueError: `alpha` above 1 or `gamma` below 0.
    """

    def __init__(self, alpha: float | None = 0.25, gamma: float = 2.0) -> None:
        super().__init__()
        self._set_alpha(alpha)
        check_in_range(self, "gamma", gamma, 0.0)
        self.gamma = float(gamma)

    @classmethod
    def config_keys(cls) -> dict[str, str]:
        """Detectron2's own keys, so that a config for its RetinaNet means the same here."""
        detectron2 = {
            "alpha": "MODEL.RETINANET.FOCAL_LOSS_ALPHA",
            "gamma": "MODEL.RETINANET.FOCAL_LOSS_GAMMA",
        }
        return {name: detectron2.get(name, key) for name, key in super().config_keys().items()}

    def value(self, x_t: Tensor, foreground: bool) -> Tensor:
        """FL without alpha_t, of the shape of `x_t`."""
        # (1 - p_t)^gamma from log(1 - p_t): a power of 1 - p_t would be 0^gamma once that
        # underflows, whose derivative is infinite for gamma < 1.
        return (self.gamma * F.logsigmoid(-x_t)).exp() * -F.logsigmoid(x_t)

    def value_and_slope(self, z: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        """FL and its derivative by z = -x_t, each of the shape of `z`, without alpha_t."""
        minus_log_p, miss, p_t = logistic(z)
        if self.gamma in (0.5, 2):  # the paper's best, by a square (root), which costs less
            modulator = miss.pow(self.gamma)
        else:
            modulator = (z - minus_log_p).mul_(self.gamma).exp_()  # log(1 - p_t) = z + log(p_t)
        slope = miss.addcmul_(p_t, minus_log_p, value=self.gamma).mul_(modulator)
        return modulator.mul_(minus_log_p), slope
