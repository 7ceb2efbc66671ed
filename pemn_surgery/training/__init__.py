"""Training masks: what to watch, what rates do, penalties and schedules, transformers' Trainer."""
