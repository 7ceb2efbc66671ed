"""Many adapters on one model: managed, swapped, combined, told apart.

How one is put in is in `injection`, how it is saved and read in `files`.
"""
