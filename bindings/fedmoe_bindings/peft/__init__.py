"""The binding to peft: LoRA of a stock model's experts on the fused path, and adapters in and out of a run."""
