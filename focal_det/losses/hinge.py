"""Hinge loss on p_t."""

from torch import Tensor

from .contract import ElementwiseLoss, check_in_range
from .registry import LOSS_REGISTRY


@LOSS_REGISTRY.register()
class HingeLoss(ElementwiseLoss):
    """Hinge loss on the probability of the truth, p_t (arXiv 1708.02002, section 5.1).

        H(p_t) = max(0, threshold - p_t)
        dH/dx  = -y p_t (1 - p_t) where p_t < threshold, else 0

    The paper says only that the loss is 0 above a certain p_t, that training with it was unstable,
    and gives neither formula nor numbers; this form is our reading.

    Args:
        threshold: the p_t above which a term costs nothing, in [0, 1].

    Raises:
        ValueError: `threshold` outside [0, 1].
    """

    config_node = "HINGE"

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        check_in_range(self, "threshold", threshold, 0.0, 1.0)
        self.threshold = float(threshold)

    def value(self, x_t: Tensor, foreground: bool) -> Tensor:
        """Hinge loss, of the shape of `x_t`."""
        return (self.threshold - x_t.sigmoid()).relu()

    def value_and_slope(self, z: Tensor, foreground: bool) -> tuple[Tensor, Tensor]:
        """Hinge loss and its derivative by z = -x_t, each of the shape of `z`."""
        p_t = z.neg().sigmoid_()
        # 1 - p_t as a sigmoid of its own keeps its relative precision where p_t rounds to 1.
        slope = z.sigmoid().mul_(p_t)
        value = p_t.neg_().add_(self.threshold).clamp_(min=0)
        return value, slope.mul_(value.sign())
