"""The drop-in MoE layer: it stores and runs only the experts its owner is permitted."""
