"""Tensors in, tensors out: masked routing and grouped expert products; knows nothing of clients or rounds."""

from fedmoe_kernels.experts import ExpertLora, ExpertWeights, moe_mlp
from fedmoe_kernels.routing import Routing, SlotMap
from fedmoe_kernels.scores import ExpertScores
from fedmoe_kernels.stats import RouterStats

__all__ = [
    "ExpertLora",
    "ExpertScores",
    "ExpertWeights",
    "RouterStats",
    "Routing",
    "SlotMap",
    "moe_mlp",
]
