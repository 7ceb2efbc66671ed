"""Masks chosen and applied in few passes over memory: compiled where it can be, numpy where not.

`selection` chooses the largest scores exactly, `product` makes a masked weight and the gradients of
its scores in one pass each. `library` holds the compiled code, `twin` the same work in numpy.
"""
