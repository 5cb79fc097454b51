"""Local training of several clients at once."""
