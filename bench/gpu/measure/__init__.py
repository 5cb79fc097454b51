"""What a session on a GPU measures: correctness, behaviour, times, kernels, models."""
