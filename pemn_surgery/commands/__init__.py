"""The commands behind ``pemn``: their arguments, what they do, what they print."""
