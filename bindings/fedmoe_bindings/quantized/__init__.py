"""Experts in few bits as others store them: read to ``fedmoe_kernels.Quantized`` with every code kept, and written."""
