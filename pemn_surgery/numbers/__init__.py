"""Where frozen numbers come from - a seed, one bank - and how to tell them apart.

No module of a model is read or changed here: only names, shapes and tensors.
"""
