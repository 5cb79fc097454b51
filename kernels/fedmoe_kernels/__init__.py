"""Tensors in, tensors out: masked routing and grouped expert products; knows nothing of clients or rounds."""

from fedmoe_kernels.experts import moe_mlp
from fedmoe_kernels.quantized import Quantized
from fedmoe_kernels.routing import Routing, route
from fedmoe_kernels.scores import ExpertScores
from fedmoe_kernels.slot_map import SlotMap
from fedmoe_kernels.stats import RouterStats
from fedmoe_kernels.weights import ExpertLora, ExpertWeights

__all__ = [
    "ExpertLora",
    "ExpertScores",
    "ExpertWeights",
    "Quantized",
    "RouterStats",
    "Routing",
    "SlotMap",
    "moe_mlp",
    "route",
]
