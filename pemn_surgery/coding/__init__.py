"""Masks as bytes: one bit a weight, or near their entropy (``docs/format.md``).

No model and no file is known here: masks and what is known of their weights are given.
"""
