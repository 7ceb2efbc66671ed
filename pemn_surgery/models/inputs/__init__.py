"""Example inputs for any timm or transformers model, from its configuration alone.

No model is run here, and nothing is fetched.
"""
