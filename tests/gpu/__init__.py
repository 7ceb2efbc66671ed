"""The whole library on a GPU in a few minutes: ``python -m tests.gpu``."""
