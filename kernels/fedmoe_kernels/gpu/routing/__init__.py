"""The Triton kernels of routing, one file for each kind, and what drives them."""
