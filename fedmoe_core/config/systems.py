"""The systems by the names that configurations and reports use, and what each is: paper, equations, evidence, gaps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from textwrap import fill
from types import MappingProxyType
from typing import Any, Literal

# The value of ``algorithm``, what people call it, and where it is.
_SYSTEMS = (
    ("hfedmoe", "HFedMoE", "hfedmoe:HFedMoE"),
    ("fedmoe", "FedMoE", "fedmoe.fedmoe:FedMoE"),
    ("flex_moe", "FLEX-MoE", "flex_moe.flex_moe:FlexMoE"),
    ("hfedmoe_plus", "HFedMoE+", "hfedmoe_plus:HFedMoEPlus"),
    ("fft_moe", "FFT-MoE", "fft_moe:FftMoE"),
    ("flame", "FLAME", "lora.flame:Flame"),
    ("hetlora", "HetLoRA", "lora.hetlora:HetLora"),
    ("flexlora", "FlexLoRA", "lora.flexlora:FlexLora"),
    ("flux", "Flux", "flux.flux:Flux"),
    ("fedavg", "FedAvg, all experts", "baselines:FedAvg"),
    ("fedavg_smallest", "FedAvg, smallest budget", "baselines:FedAvgSmallest"),
    ("most_activated", "most activated experts", "baselines:MostActivated"),
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


Tag = Literal["P", "N", "A", "D", "E"]
TAGS: dict[Tag, str] = {
    "P": "read in the paper itself",
    "N": "from published notes that quote the paper's numbered equations",
    "A": "from the abstract only",
    "D": "derived here",
    "E": "our engineering reading where the paper is silent",
}


@dataclass(frozen=True)
class Equation:
    """One implemented formula: its number in the paper (or a name), the evidence for it, and what it says."""

    number: str
    tag: Tag
    what: str


@dataclass(frozen=True)
class System:
    """One federated system as this package has it.

    Attributes:
        name: the value of ``algorithm``.
        title: what people call it.
        paper: title or authors, and identifier; "this package" for our own.
        equations: what is implemented.
        approximated: sentences, each one departure from the paper.
        missing: sentences, each something of the paper that is not here.
    """

    name: str
    title: str
    paper: str
    equations: tuple[Equation, ...]
    approximated: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def as_json(systems: Sequence[System]) -> list[dict[str, Any]]:
    """Put the systems into JSON types."""
    return [asdict(system) for system in systems]


def listing(systems: Sequence[System]) -> str:
    """Write one block per system, wrapped at 100 columns, and what the tags mean."""
    blocks = []
    for system in systems:
        lines = [f"{system.name}: {system.title} ({system.paper})"]
        lines += [_wrapped(f"[{e.tag}] {e.number}: {e.what}") for e in system.equations]
        lines += [_wrapped(f"approximated: {sentence}") for sentence in system.approximated]
        lines += [_wrapped(f"missing: {sentence}") for sentence in system.missing]
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, "\n".join(f"[{tag}] {meaning}" for tag, meaning in TAGS.items())])


def _wrapped(text: str) -> str:
    return fill(text, 100, initial_indent="  ", subsequent_indent="      ")
