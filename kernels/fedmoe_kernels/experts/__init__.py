"""The experts of an MoE layer as one operator: inputs checked, scores fused, the path chosen."""
