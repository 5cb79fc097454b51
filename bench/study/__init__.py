"""The published studies: their settings, and their tables."""
