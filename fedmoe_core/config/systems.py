"""The systems by the names that configurations and reports use, and what each is: paper, equations, evidence, gaps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import import_module
from importlib.metadata import entry_points
from textwrap import fill
from types import MappingProxyType
from typing import Any, Literal

from fedmoe_core.base.wording import unknown

ENTRY_POINTS = "fedmoe.algorithms"  # the group under which a package names its systems, each as MODULE:CLASS
PLACE = "MODULE:CLASS"  # how a class that no package names is given

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
    ("fc_moe", "FC-MoE", "fc_moe:FcMoE"),
    ("fedavg", "FedAvg, all experts", "baselines:FedAvg"),
    ("fedavg_smallest", "FedAvg, smallest budget", "baselines:FedAvgSmallest"),
    ("most_activated", "most activated experts", "baselines:MostActivated"),
    ("reap_experts", "experts of largest REAP", "baselines:ReapExperts"),
    ("random", "random experts", "baselines:RandomExperts"),
)
ALGORITHMS = tuple(name for name, _, _ in _SYSTEMS)
TITLES: Mapping[str, str] = MappingProxyType({name: title for name, title, _ in _SYSTEMS})
PLACES: Mapping[str, str] = MappingProxyType({n: f"fedmoe_core.algorithms.{place}" for n, _, place in _SYSTEMS})
# Sections of a configuration that one system alone reads: another value there does not touch the others.
SECTIONS: Mapping[str, str] = MappingProxyType(
    {name: name for name in ("fedmoe", "flex_moe", "fft_moe", "flux", "fc_moe")} | {"plus": "hfedmoe_plus"}
)
# Settings that are gone, at the value at which they did nothing: records that have them so stay comparable.
RETIRED: Mapping[str, object] = MappingProxyType({"plus.redundancy": 0.0})


def installed() -> dict[str, str]:
    """Return every system by name with its place: ours first, which no package can replace, then those of packages."""
    named = {entry.name: f"{entry.module}:{entry.attr}" for entry in entry_points(group=ENTRY_POINTS)}
    return {**PLACES, **{name: place for name, place in named.items() if name not in PLACES}}


def place_of(algorithm: str) -> str:
    """Return where a system's class is, as ``MODULE:CLASS``: ours, one that a package names, or one given that way.

    Raises:
        ValueError: no such system, with the nearest that exists.
    """
    module, colon, name = algorithm.partition(":")
    if algorithm in PLACES:
        return PLACES[algorithm]
    if colon and all(part.isidentifier() for part in [*module.split("."), name]):
        return algorithm
    if algorithm not in (known := installed()):
        raise unknown(f"algorithm={algorithm!r}", algorithm, [*known, PLACE])
    return known[algorithm]


def section_of(algorithm: str) -> str:
    """Return the name of a system's own section: its name, or its class for one given as ``MODULE:CLASS``."""
    return algorithm.rpartition(":")[2]


def settings_of(algorithm: str) -> type | None:
    """Return the frozen dataclass that a system from elsewhere declares as ``settings``; None if it declares none.

    This imports the system's module, but never one of ours: their sections are fields of ``Config``.

    Raises:
        ValueError: no such system, one whose package cannot be imported, or what it declares cannot be settings.
    """
    place = place_of(algorithm)
    if algorithm in PLACES:
        return None
    module, _, name = place.partition(":")
    try:
        declared: Any = getattr(getattr(import_module(module), name), "settings", None)
    except (ImportError, AttributeError) as error:
        if place == algorithm:  # the run refuses it where it loads the class; by then its file may be on the path
            return None
        raise ValueError(f"algorithm={algorithm!r} cannot be loaded ({error}); install its package again") from error
    if declared is None:
        return None
    frozen = is_dataclass(declared) and declared.__dataclass_params__.frozen  # type: ignore[union-attr]
    if not (isinstance(declared, type) and frozen):
        raise ValueError(f"settings of algorithm={algorithm!r} is not a frozen dataclass; make it one")
    for item in fields(declared):
        if item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{section_of(algorithm)}.{item.name} has no default; give it one in {declared.__name__}")
    return declared


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
