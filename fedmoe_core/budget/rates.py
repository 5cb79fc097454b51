"""What a unit of work takes on a device: energy by its power, time by its pace; a model, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Work(Protocol):
    """What takes time and energy: the part of a ``Cost`` that is priced."""

    @property
    def flops(self) -> float: ...

    @property
    def bytes_down(self) -> int: ...

    @property
    def bytes_up(self) -> int: ...


class Prices(NamedTuple):
    """How much of a resource an operation takes, and a byte that arrives or leaves."""

    flop: float
    byte_down: float
    byte_up: float

    def of(self, cost: Work) -> float:
        """Return what a round's operations and traffic take."""
        return self.flop * cost.flops + (self.byte_down * cost.bytes_down + self.byte_up * cost.bytes_up)


@dataclass(frozen=True)
class Power:
    """What a device's work costs in energy, while it trains and while it talks.

    Attributes:
        joules_per_flop: per floating-point operation.
        joules_per_byte: per byte that arrives or leaves.
    """

    joules_per_flop: float
    joules_per_byte: float

    @property
    def prices(self) -> Prices:
        """Joules of each kind of work."""
        return Prices(self.joules_per_flop, self.joules_per_byte, self.joules_per_byte)


class Seconds(NamedTuple):
    """The virtual seconds of a client's round, by what it waits for."""

    down: float
    compute: float
    up: float


@dataclass(frozen=True)
class Pace:
    """How fast a device works; what is None takes no time.

    Attributes:
        flops: floating-point operations a second that it really reaches, not its peak.
        down, up: bits a second of its link.
    """

    flops: float | None = None
    down: float | None = None
    up: float | None = None

    def __post_init__(self) -> None:
        for word, rate in zip(("speed", "downlink", "uplink"), self._rates, strict=True):
            if rate is not None and not rate > 0:  # written so that NaN is refused
                raise ValueError(f"{word}={rate} is not a rate; give a number greater than 0, or leave it out")

    @property
    def prices(self) -> Prices:
        """Seconds of each kind of work."""
        pairs = zip((1, 8, 8), self._rates, strict=True)
        return Prices(*(0.0 if rate is None else work / rate for work, rate in pairs))

    @property
    def _rates(self) -> tuple[float | None, float | None, float | None]:
        return self.flops, self.down, self.up

    def seconds(self, cost: Work) -> Seconds:
        """Return the virtual seconds of a round: down, then compute, then up.

        Example:
            >>> from fedmoe_core.budget.limits import Cost
            >>> Pace(flops=2e9, down=8e6, up=1e6).seconds(Cost(flops=8e9, bytes_down=2_000_000, bytes_up=500_000))
            Seconds(down=2.0, compute=4.0, up=4.0)
        """
        flop, byte_down, byte_up = self.prices
        return Seconds(byte_down * cost.bytes_down, flop * cost.flops, byte_up * cost.bytes_up)
