"""The simulator's live model: a transformers model whose MoE blocks are fedmoe layers."""
