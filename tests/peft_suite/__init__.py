"""PEFT's own tests, unedited, with our configurations: ``python -m tests.peft_suite``."""
