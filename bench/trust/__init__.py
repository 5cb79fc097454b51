"""Attacks on a run: its files changed, its processes killed at every moment, and what came of each."""
