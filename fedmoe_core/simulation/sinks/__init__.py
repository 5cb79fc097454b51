"""Where a run's curves go besides the screen: sinks, found by their entry points, each kept from hurting the run."""
