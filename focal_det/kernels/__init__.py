"""Fused value-and-gradient operations over all terms of a dense detector's classification."""

from .rows import pick_anchors
from .sums import (
    IMPLEMENTATIONS,
    check_implementation,
    elementwise_terms,
    sum_levels,
    sum_terms,
    sum_terms_per_anchor,
)
from .terms import LossSums, Terms

__all__ = [
    "IMPLEMENTATIONS",
    "LossSums",
    "Terms",
    "check_implementation",
    "elementwise_terms",
    "pick_anchors",
    "sum_levels",
    "sum_terms",
    "sum_terms_per_anchor",
]
