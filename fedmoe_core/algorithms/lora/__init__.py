"""The systems that train LoRA factors of different ranks: FLAME, HetLoRA and FlexLoRA."""
