"""A stand-in for the CUDA driver, which checks every launch without a GPU."""
