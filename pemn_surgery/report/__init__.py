"""How results look: tables, plots, and the machine that made them.

Nothing here knows of masks; whoever measures or lists something hands over plain values.
"""
