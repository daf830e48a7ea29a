"""Measuring losses, models and their parts; records of it; the page made from them."""
