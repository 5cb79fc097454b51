"""Benchmarks and proofs of the kernels, and the commands behind the published studies."""
