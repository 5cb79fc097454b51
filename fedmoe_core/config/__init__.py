"""Every setting of a run, checked when it is read; the systems by name."""
