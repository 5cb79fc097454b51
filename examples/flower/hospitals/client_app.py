"""What runs beside each SuperNode."""

from fedmoe_bindings.flower.client import app

__all__ = ["app"]
