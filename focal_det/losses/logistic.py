"""The logistic function and its logarithm, from one exponential."""

from torch import Tensor


def logistic(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``log(1 + e^x)``, ``1 / (1 + e^-x)`` and ``1 / (1 + e^x)``.

    With x = -x_t these are -log(p_t), 1 - p_t and p_t. Each is accurate to a few roundings, also
    where it is tiny; none is ever computed as 1 minus another. Not for autograd, which would
    multiply what underflows here.

    Args:
        x: any shape, float32 or better, any finite values.

    Returns:
        Three new tensors of the shape of `x`: softplus(x), sigmoid(x), sigmoid(-x).
    """
    # e^-87 is the last whole power among the normal numbers of float32; log(1 + e^x) is x long
    # before.
    exp = x.clamp(max=87.0).exp_()
    complement = (exp + 1).reciprocal_()
    miss = exp * complement
    return exp.log1p_().clamp_(min=x), miss, complement
