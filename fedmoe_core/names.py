"""The systems by the names that configurations, runs and reports use."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

# The value of ``algorithm``, what people call it, and where it is.
_SYSTEMS = (
    ("hfedmoe", "HFedMoE", "hfedmoe:HFedMoE"),
    ("fedmoe", "FedMoE", "fedmoe:FedMoE"),
    ("flex_moe", "FLEX-MoE", "flex_moe:FlexMoE"),
    ("hfedmoe_plus", "HFedMoE+", "hfedmoe_plus:HFedMoEPlus"),
    ("fft_moe", "FFT-MoE", "fft_moe:FftMoE"),
    ("flame", "FLAME", "flame:Flame"),
    ("hetlora", "HetLoRA", "lora_rivals:HetLora"),
    ("flexlora", "FlexLoRA", "lora_rivals:FlexLora"),
    ("flux", "Flux", "flux:Flux"),
    ("fedavg", "FedAvg, all experts", "baselines:FedAvg"),
    ("fedavg_smallest", "FedAvg, smallest budget", "rivals:FedAvgSmallest"),
    ("most_activated", "most activated experts", "rivals:MostActivated"),
    ("random", "random experts", "baselines:RandomExperts"),
)
ALGORITHMS = tuple(name for name, _, _ in _SYSTEMS)
TITLES: Mapping[str, str] = MappingProxyType({name: title for name, title, _ in _SYSTEMS})
PLACES: Mapping[str, str] = MappingProxyType({n: f"fedmoe_core.algorithms.{place}" for n, _, place in _SYSTEMS})
# Sections of a configuration that one system alone reads: another value there does not touch the others.
SECTIONS: Mapping[str, str] = MappingProxyType(
    {"fedmoe": "fedmoe", "flex_moe": "flex_moe", "fft_moe": "fft_moe", "flux": "flux", "plus": "hfedmoe_plus"}
)


def title_of(algorithm: str) -> str:
    """Return what people call the system: its title, or the class name of one given as ``MODULE:CLASS``."""
    return TITLES.get(algorithm) or algorithm.partition(":")[2] or algorithm


def concerns(key: str, systems: Collection[str]) -> bool:
    """Tell whether any of ``systems`` reads the setting of that dotted key."""
    owner = SECTIONS.get(key.partition(".")[0])
    return owner is None or owner in systems
