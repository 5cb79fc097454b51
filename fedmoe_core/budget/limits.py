"""What a device can bear in one round, and what a plan costs it: the two records, read from and shown as text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction

from fedmoe_core.base.show import size as shown_size
from fedmoe_core.base.wording import nearest
from fedmoe_core.budget.devices import DEVICES, Device, find_device

# Word in a budget's text -> field of Budget.
RESOURCES = {
    "memory": "memory_bytes",
    "down": "bytes_down",
    "up": "bytes_up",
    "flops": "flops",
    "experts": "experts",
}
_BINARY = {"TiB": 1024**4, "GiB": 1024**3, "MiB": 1024**2, "KiB": 1024}
_DECIMAL = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3}
_BYTES = {**_BINARY, **_DECIMAL, "B": 1}
_FLOPS = {"PFLOP": 10**15, "TFLOP": 10**12, "GFLOP": 10**9, "MFLOP": 10**6}
_MOST = 2**60  # bytes or experts: 1 EiB; solvers add such numbers up in int64
_MOST_FLOPS = 1e300  # what floats hold, with room to be rounded up
_DIGITS = 80  # of an amount; an exponent has at most three: to write 1e999999999 out takes hours
_NUMBER = re.compile(r"(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)\s*([A-Za-z%]*)")


@dataclass(frozen=True)
class Budget:
    """Hard limits of one device for one round; None = no limit.

    Attributes:
        memory_bytes: peak bytes of weights, gradients, optimizer state and activations.
        flops: floating-point operations a round.
        bytes_down, bytes_up: traffic a round.
        experts: total number of experts over all MoE layers (HFedMoE eq. 15's cardinality budget [N]).
        name: label for people; two budgets with the same limits are equal whatever they are called.
    """

    memory_bytes: int | None = None
    flops: float | None = None
    bytes_down: int | None = None
    bytes_up: int | None = None
    experts: int | None = None
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for word, attribute in RESOURCES.items():
            limit = getattr(self, attribute)
            most = _MOST_FLOPS if word == "flops" else _MOST
            if limit is not None and not 0 <= limit <= most:  # written so that NaN is refused
                huge = isinstance(limit, int) and limit.bit_length() > 1000  # such an int has no text, nor a float
                given = "a number of hundreds of digits" if huge else limit
                raise ValueError(
                    f"budget {word}={given} is not a limit; give a number from 0 to {most}, or leave it out"
                )

    @classmethod
    def parse(cls, text: str, *, spec_experts: int | None = None, plain: Callable[[int], Cost] | None = None) -> Budget:
        """Read ``experts=25%``, ``memory=40MiB,down=2MB,up=1MB,flops=3e12``, ``unlimited`` or a device profile's name.

        A profile may be followed by limits that replace its own (``raspberry-pi-5-8gb,experts=8``). MB is 10^6 and
        MiB 2^20 bytes, case does not matter, a bare number counts bytes, operations or experts. Amounts are rounded
        down, because a limit may not grow. ``memory=25%`` (or down, up) is what a client needs that holds and trains
        that share of the experts and nothing else: a tier of experts that systems without absent experts can meet too.

        Args:
            text: the budget; it becomes ``name``.
            spec_experts: experts of the whole model, layers x experts per layer; a percentage is taken of it.
            plain: the cost of a client that holds and trains so many experts, for percentages of bytes.

        Raises:
            ValueError: unknown word, unit or profile (with the nearest valid one), a bad number, a resource twice.

        Example:
            >>> budget = Budget.parse("memory=40MiB,experts=25%", spec_experts=32)
            >>> budget.memory_bytes, budget.experts
            (41943040, 8)
            >>> Budget.parse("raspberry-pi-5-8gb").memory_bytes == 6 * 2**30  # three quarters of its 8 GiB
            True
        """
        limits: dict[str, int | float | None] = {}
        for place, part in enumerate(text.split(",")):
            word, equals, amount = (piece.strip() for piece in part.partition("="))
            if not equals and place == 0:
                limits.update(_profile_limits(word, text))
                continue
            if word not in RESOURCES:
                raise ValueError(f"budget {text!r}: {word!r} is not a resource; {_nearest(word, list(RESOURCES))}")
            if _count(text, word) > 1:
                raise ValueError(f"budget {text!r}: {word} is given twice; give it once")
            limits[RESOURCES[word]] = _amount(word, amount, text=text, spec_experts=spec_experts, plain=plain)
        return cls(**limits, name=text.strip())  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Return text that ``parse`` reads back to an equal budget."""
        if (device := find_device(self.name)) is not None and device_budget(device) == self:
            return device.name
        parts = [
            f"{word}={_exact_bytes(getattr(self, RESOURCES[word]))}"
            for word in ("memory", "down", "up")
            if getattr(self, RESOURCES[word]) is not None
        ]
        if self.flops is not None:
            parts.append(f"flops={self.flops!r}")
        if self.experts is not None:
            parts.append(f"experts={self.experts}")
        return ",".join(parts) or "unlimited"

    def violations(self, cost: Cost) -> list[str]:
        """Return one line for every resource of which ``cost`` needs more than is allowed; empty = it fits.

        Example:
            >>> Budget.parse("memory=1MiB").violations(Cost(memory_bytes=2 * 2**20))
            ['memory: 2.0 MiB (2097152 B) used, 1.0 MiB (1048576 B) allowed']
        """
        found = []
        for word, attribute in RESOURCES.items():
            used, allowed = getattr(cost, attribute), getattr(self, attribute)
            if allowed is not None and not used <= allowed:  # written so that NaN counts as too much
                found.append(f"{word}: {show(word, used, exact=True)} used, {show(word, allowed, exact=True)} allowed")
        return found

    def fits(self, cost: Cost) -> bool:
        """Return whether ``cost`` stays within every limit."""
        return not self.violations(cost)

    def after(self, extra: Cost) -> Budget:
        """Return what is left of traffic and operations once ``extra`` is paid; peaks and counts are not spent by it.

        Raises:
            ValueError: ``extra`` alone needs more than is allowed of some resource.
        """
        if over := self.violations(extra):
            raise ValueError(f"the work besides training alone exceeds the budget ({over[0]}); raise the budget")
        return replace(
            self,
            flops=None if self.flops is None else self.flops - extra.flops,
            bytes_down=None if self.bytes_down is None else self.bytes_down - extra.bytes_down,
            bytes_up=None if self.bytes_up is None else self.bytes_up - extra.bytes_up,
        )


@dataclass(frozen=True)
class Cost:
    """Predicted or measured cost of one client in one round, in the units of ``Budget``; seconds are wall-clock."""

    memory_bytes: int = 0
    flops: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    experts: int = 0
    seconds: float = 0.0

    def with_extra(self, extra: Cost) -> Cost:
        """Return this cost plus that of work before or after it: traffic, operations, time add up, peaks do not."""
        return Cost(
            memory_bytes=max(self.memory_bytes, extra.memory_bytes),
            flops=self.flops + extra.flops,
            bytes_down=self.bytes_down + extra.bytes_down,
            bytes_up=self.bytes_up + extra.bytes_up,
            experts=max(self.experts, extra.experts),
            seconds=self.seconds + extra.seconds,
        )


NOTHING = Cost()


def device_budget(device: Device) -> Budget:
    """Return the limits of a device profile."""
    return Budget(
        memory_bytes=device.usable_bytes,
        flops=device.round_flops,
        bytes_down=device.round_down,
        bytes_up=device.round_up,
        name=device.name,
    )


def show(resource: str, amount: float, *, exact: bool = False) -> str:
    """Format an amount of a resource for people, rounded up: a limit typed from it is large enough.

    ``exact`` adds the plain number, so that two amounts that round to the same text can be told apart.
    """
    if not math.isfinite(amount):
        return str(amount)
    if resource == "experts":
        return f"{math.ceil(amount)} experts" if amount != 1 else "1 expert"
    if resource == "flops":
        return f"{_show_flops(amount)} ({amount!r})" if exact else _show_flops(amount)
    text = shown_size(amount, up=True)
    return f"{text} ({int(amount)} B)" if exact and amount >= 1024 else text


def _show_flops(amount: float) -> str:
    """Three digits, rounded up: 1.24e+09."""
    if amount <= 0:
        return "0"
    step = Fraction(10) ** (math.floor(math.log10(amount)) - 2)
    return f"{float(math.ceil(Fraction(amount) / step) * step):.3g}"


def _profile_limits(word: str, text: str) -> dict[str, int | float | None]:
    """Limits behind a bare word: a device profile or ``unlimited``."""
    if word == "unlimited":
        return {}
    device = find_device(word)
    if device is None:
        names = ["unlimited", *(known.name for known in DEVICES), *(f"{resource}=" for resource in RESOURCES)]
        raise ValueError(
            f"budget {text!r}: {word!r} is neither a device profile nor resource=amount; {_nearest(word, names)}"
        )
    budget = device_budget(device)
    return {attribute: getattr(budget, attribute) for attribute in RESOURCES.values()}


def _count(text: str, word: str) -> int:
    """How often a resource is named in a budget's text."""
    return sum(part.partition("=")[0].strip() == word for part in text.split(","))


def _amount(
    word: str, amount: str, *, text: str, spec_experts: int | None, plain: Callable[[int], Cost] | None
) -> int | float:
    """One amount of a budget's text, as an exact integer of bytes or experts, or a float of operations."""
    match = _NUMBER.fullmatch(amount)
    if match is None:
        raise ValueError(f"budget {text!r}: {amount!r} is not an amount of {word}; write for example {_example(word)}")
    number, unit = _exact(match[1], text=text, word=word), match[2]
    if unit == "%" and word != "flops":
        if spec_experts is None or (word != "experts" and plain is None):
            raise ValueError(f"budget {text!r}: {amount!r} can only be resolved once the model is known; give a number")
        count = min(math.floor(number * spec_experts / 100), spec_experts)
        if word == "experts" or plain is None:
            return count
        return int(getattr(plain(count), RESOURCES[word]))
    units = {"experts": {}, "flops": _FLOPS}.get(word, _BYTES)
    size = 1 if not unit else {known.lower(): value for known, value in units.items()}.get(unit.lower())
    if size is None:
        known = [*units, *(["%"] if word != "flops" else [])]
        raise ValueError(f"budget {text!r}: {unit!r} is not a unit of {word}; {_nearest(unit, known)}")
    most = _MOST_FLOPS if word == "flops" else _MOST
    if number * size > most:
        raise ValueError(
            f"budget {text!r}: {amount!r} is more than {show(word, most)}; give less, or leave {word} out for no limit"
        )
    if word == "flops":
        return float(number * size)
    return math.floor(number * size)


def _exact(digits: str, *, text: str, word: str) -> Fraction:
    """A number of a budget's text; only one of a sensible length is ever written out."""
    exponent = digits.lower().partition("e")[2].lstrip("+-0")
    if len(digits) > _DIGITS or len(exponent) > 3:
        shown = digits if len(digits) <= 20 else f"{digits[:17]}..."
        raise ValueError(
            f"budget {text[:60]!r}: {shown!r} is too long a number for {word}; write for example {_example(word)}"
        )
    return Fraction(digits)


def _example(word: str) -> str:
    return {"experts": "experts=25% or experts=8", "flops": "flops=3e12"}.get(word, f"{word}=40MiB")


def _nearest(word: str, known: list[str]) -> str:
    """The nearest valid word, and all of them when none is near."""
    near = nearest(word, known)
    return f"did you mean {near!r}?" if near else f"valid: {', '.join(known)}"


def _exact_bytes(amount: int) -> str:
    """Bytes in the largest unit that divides them."""
    for unit, size in (*_BINARY.items(), *_DECIMAL.items()):
        if amount and amount % size == 0:
            return f"{amount // size}{unit}"
    return f"{amount}B"
