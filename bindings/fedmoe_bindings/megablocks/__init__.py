"""The binding to megablocks: its weights both ways, its dropless layer on our operators, our products in its own."""

from fedmoe_bindings.megablocks.arguments import Arguments
from fedmoe_bindings.megablocks.backend import install_backend, uninstall_backend
from fedmoe_bindings.megablocks.layers import dMoE
from fedmoe_bindings.megablocks.losses import (
    batched_load_balancing_loss,
    batched_router_zloss,
    clear_load_balancing_loss,
    clear_router_zloss,
    get_load_balancing_loss,
)
from fedmoe_bindings.megablocks.moe import moe_of, weights_of
from fedmoe_bindings.megablocks.weights import DmoeWeights, from_state_dict, load_into, state_of, to_state_dict

__all__ = [
    "Arguments",
    "DmoeWeights",
    "batched_load_balancing_loss",
    "batched_router_zloss",
    "clear_load_balancing_loss",
    "clear_router_zloss",
    "dMoE",
    "from_state_dict",
    "get_load_balancing_loss",
    "install_backend",
    "load_into",
    "moe_of",
    "state_of",
    "to_state_dict",
    "uninstall_backend",
    "weights_of",
]
