"""Tensors in, tensors out: masked routing and grouped expert products; knows nothing of clients or rounds."""

from fedmoe_kernels.experts.grouped_mm import grouped_mm, grouped_outer
from fedmoe_kernels.experts.moe_mlp import moe_mlp
from fedmoe_kernels.experts.scores import ExpertScores
from fedmoe_kernels.experts.weights import ExpertLora, ExpertWeights
from fedmoe_kernels.quantized import Quantized
from fedmoe_kernels.routing.record import Routing
from fedmoe_kernels.routing.route import route
from fedmoe_kernels.routing.stats import RouterStats
from fedmoe_kernels.slot_map import SlotMap

__all__ = [
    "ExpertLora",
    "ExpertScores",
    "ExpertWeights",
    "Quantized",
    "RouterStats",
    "Routing",
    "SlotMap",
    "grouped_mm",
    "grouped_outer",
    "moe_mlp",
    "route",
]
