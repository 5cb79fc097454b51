"""FedMoE (arXiv 2408.11304) and what only it needs."""
