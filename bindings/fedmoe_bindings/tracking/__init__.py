"""The bindings to experiment trackers: one sink a file, each imported only where ``watch.sinks`` names it."""
