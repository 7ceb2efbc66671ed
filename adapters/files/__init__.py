"""An adapter's folder: written whole, opened, checked, compared, written in another coding.

No model is changed here; `state` brings a file's tensors into one.
"""
