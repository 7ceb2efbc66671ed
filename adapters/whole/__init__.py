"""Modules that a task has whole, as copies: heads and layers that no mask lies on."""
