"""The Triton kernels of routing and of the experts, one file per family; imported only where Triton exists."""
