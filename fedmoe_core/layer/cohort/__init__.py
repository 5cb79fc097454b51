"""MoE layers of several clients at once."""
