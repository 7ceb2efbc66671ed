"""Example inputs for any timm or transformers model, from its configuration alone."""
