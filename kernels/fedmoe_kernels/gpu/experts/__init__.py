"""The Triton kernels of the experts, one file for each kind, and what drives them."""
