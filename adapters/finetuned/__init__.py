"""From a checkpoint that was fine-tuned without masks to an adapter."""
