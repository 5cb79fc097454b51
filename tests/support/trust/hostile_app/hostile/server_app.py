"""The honest server."""

from fedmoe_bindings.flower.server import app

__all__ = ["app"]
