"""What a device can be short of, and the rates at which it works: the tables that plans, logs and texts loop over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fedmoe_core.budget.rates import Pace, Power, Prices, Work

BINARY = {"TiB": 1024**4, "GiB": 1024**3, "MiB": 1024**2, "KiB": 1024}
DECIMAL = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3}
_BYTES = {**BINARY, **DECIMAL, "B": 1}
_FLOPS = {"PFLOP": 10**15, "TFLOP": 10**12, "GFLOP": 10**9, "MFLOP": 10**6}
_JOULES = {"MJ": 10**6, "kJ": 10**3, "J": 1}
_SECONDS = {"h": 3600, "min": 60, "s": 1}
_BITS = {"Gbit": 10**9, "Mbit": 10**6, "kbit": 10**3, "bit": 1}
_MOST = 2**60  # bytes or experts: 1 EiB; solvers add such numbers up in int64
_MOST_FLOPS = 1e300  # what floats hold, with room to be rounded up


@dataclass(frozen=True)
class Resource:
    """One kind of limit: a row of ``RESOURCES``, over which plans, tables, logs and searches loop; or one of ``RATES``.

    Attributes:
        word: its name in a budget's text.
        attribute: field of ``Budget`` that holds the limit, or of ``Pace`` that holds the rate.
        units: what may follow a number, and how much that is.
        exact: whether amounts are whole numbers (bytes, experts), and a limit at most 2^60.
        spent: whether work besides training takes of it what training cannot have then; a peak or a count is not spent.
        shares: whether ``25%`` is understood, as what a share of the experts needs.
        example: an amount, for error messages.
        counted_by: field of ``Budget`` that prices each operation and byte of it, where a device has to say that.
        without: what to write where a limit stands and nothing prices it.
    """

    word: str
    attribute: str
    units: Mapping[str, int]
    exact: bool = True
    spent: bool = False
    shares: bool = True
    example: str = "40MiB"
    counted_by: str = ""
    without: str = ""

    @property
    def most(self) -> float:
        """The largest limit that can be given."""
        return _MOST if self.exact else _MOST_FLOPS

    def used(self, cost: Work, budget: object) -> float:
        """Return how much of it a client of that budget has used."""
        if (prices := self.prices(budget)) is not None:
            return prices.of(cost)
        found: float = getattr(cost, self.attribute)
        return found

    def prices(self, budget: object) -> Prices | None:
        """Return what work takes of it on that budget's device; None where it is counted otherwise, or not known."""
        by: Power | Pace | None = getattr(budget, self.counted_by) if self.counted_by else None
        return None if by is None else by.prices

    def known(self, budget: object) -> bool:
        """Tell whether its use can be told of a client of that budget."""
        return not self.counted_by or self.prices(budget) is not None


_ROWS = (
    Resource("memory", "memory_bytes", _BYTES),
    Resource("down", "bytes_down", _BYTES, spent=True),
    Resource("up", "bytes_up", _BYTES, spent=True),
    Resource("flops", "flops", _FLOPS, exact=False, spent=True, shares=False, example="3e12"),
    Resource("experts", "experts", {}, example="25% or experts=8"),
    Resource(
        *("energy", "energy_joules", _JOULES, False, True, False, "500J", "power"),
        "energy is counted by a device profile; write one before it, for example raspberry-pi-5-8gb,energy=500J",
    ),
    Resource(
        *("time", "virtual_seconds", _SECONDS, False, True, False, "30s", "pace"),
        "time is counted by a device's speed and links; write them too, for example speed=2e9,downlink=10Mbit,time=30s",
    ),
)
RESOURCES: Mapping[str, Resource] = MappingProxyType({row.word: row for row in _ROWS})
_RATES = (
    Resource("speed", "flops", _FLOPS, exact=False, shares=False, example="2e9"),
    Resource("downlink", "down", _BITS, exact=False, shares=False, example="20Mbit"),
    Resource("uplink", "up", _BITS, exact=False, shares=False, example="5Mbit"),
)
RATES: Mapping[str, Resource] = MappingProxyType({row.word: row for row in _RATES})  # each of them by the second
