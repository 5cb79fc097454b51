"""What runs beside the SuperLink."""

from fedmoe_bindings.flower.server import app

__all__ = ["app"]
