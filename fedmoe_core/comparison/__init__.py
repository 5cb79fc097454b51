"""Many systems over many seeds: run what is missing, test, tabulate."""
