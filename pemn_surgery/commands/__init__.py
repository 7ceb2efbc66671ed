"""The commands behind ``pemn``, a file each: its arguments, what it does, what it prints."""
