"""What several benchmarks share: shapes, peers, clocks, the prediction model, the truth, and what machine this is."""
