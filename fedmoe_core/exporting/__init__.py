"""A run's model as others load it: the one that the report judged, with where it comes from beside it."""
