"""Fused value-and-gradient operations over all terms of a dense detector's classification."""

from .terms import LossSums, Terms, elementwise_terms, sum_terms, sum_terms_per_anchor

__all__ = ["LossSums", "Terms", "elementwise_terms", "sum_terms", "sum_terms_per_anchor"]
