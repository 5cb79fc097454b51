"""Flux (arXiv 2508.19078) and what only it needs."""
