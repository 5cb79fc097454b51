"""A run: prepare the world, play rounds, evaluate, log and checkpoint each."""
