"""Bindings to model frameworks, one small file each, imported only when asked for."""
