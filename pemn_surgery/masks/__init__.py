"""What a masked weight is while a model runs: scores, masks, products, and whose turn it is.

What puts this onto a model is in `pemn_surgery.surgery`; what writes it down in `coding`.
"""
