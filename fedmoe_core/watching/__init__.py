"""A run that goes on, read from its directory while it is written: what is new, how it stands, a table."""
