"""The table of the zoo (stub)."""
