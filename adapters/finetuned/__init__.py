"""From a checkpoint that was fine-tuned without masks to an adapter. Nothing is trained here."""
