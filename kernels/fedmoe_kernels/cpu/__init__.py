"""The experts and their gradients in torch on the CPU, slot by slot."""
