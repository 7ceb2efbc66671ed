"""The commands behind ``pemn``: their arguments, what they do, what they print.

What can be done from Python, too, lives in the other rooms; here are words, names of models, and
the quickstart.
"""
