"""The binding to transformers: fedmoe's experts in its models, sub-models of them, and the simulator's live model."""

from fedmoe_bindings.transformers.live.adapter import TransformersAdapter, load_adapter
from fedmoe_bindings.transformers.stock.hold_still import hold_still
from fedmoe_bindings.transformers.stock.submodel import extract_submodel, merge_submodel
from fedmoe_bindings.transformers.stock.use import use_fedmoe

__all__ = [
    "TransformersAdapter",
    "extract_submodel",
    "hold_still",
    "load_adapter",
    "merge_submodel",
    "use_fedmoe",
]
