"""FLEX-MoE (arXiv 2512.23070) and what only it needs."""
