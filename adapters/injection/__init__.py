"""How an adapter gets into a model: what is matched, checked, then done, all or nothing.

No file is read or written here.
"""
