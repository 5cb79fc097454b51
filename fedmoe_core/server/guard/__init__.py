"""Rules that bound what a few hostile clients can do to an expert."""
