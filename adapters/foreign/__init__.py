"""Masks that others chose: readers of what they store, and adapters made of them."""
