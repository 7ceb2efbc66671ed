"""Masks as bytes: one bit a weight, or near their entropy (``docs/format.md``)."""
