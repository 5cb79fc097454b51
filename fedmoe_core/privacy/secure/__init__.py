"""Secure aggregation: clients mask their vectors, and the server learns the sum alone (Bonawitz et al. 2017)."""
