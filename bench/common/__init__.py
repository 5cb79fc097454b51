"""What several benchmarks share: shapes, peers, clocks, the prediction model, and the truth to compare with."""
