"""Tensors in, tensors out: masked routing and grouped expert products; knows nothing of clients or rounds."""
