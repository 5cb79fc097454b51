"""What a device can bear in one round, and what a plan costs it: the two records, read from and shown as text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any

from fedmoe_core.base.show import size as shown_size
from fedmoe_core.base.wording import nearest
from fedmoe_core.budget.devices import DEVICES, Device, find_device
from fedmoe_core.budget.rates import Pace, Power
from fedmoe_core.budget.resources import BINARY, DECIMAL, RATES, RESOURCES, Resource

_DIGITS = 80  # of an amount; an exponent has at most three: to write 1e999999999 out takes hours
_NUMBER = re.compile(r"(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)\s*([A-Za-z%]*)")


class BudgetError(ValueError):
    """A budget cannot bear what is asked of it; the sentence names the resource, the need and the limit."""


@dataclass(frozen=True)
class Budget:
    """Hard limits of one device for one round; None = no limit.

    Attributes:
        memory_bytes: peak bytes of weights, gradients, optimizer state and activations.
        flops: floating-point operations a round.
        bytes_down, bytes_up: traffic a round.
        experts: total number of experts over all MoE layers (HFedMoE eq. 15's cardinality budget [N]).
        energy_joules: energy of a round's operations and traffic, by ``power``.
        virtual_seconds: predicted time of a round's traffic and operations, by ``pace``.
        power: of a device profile; energy is counted with it.
        pace: of a device profile or of the text; time is counted with it. None = not known.
        name: label for people; two budgets with the same limits are equal whatever they are called.
    """

    memory_bytes: int | None = None
    flops: float | None = None
    bytes_down: int | None = None
    bytes_up: int | None = None
    experts: int | None = None
    energy_joules: float | None = None
    virtual_seconds: float | None = None
    power: Power | None = None
    pace: Pace | None = None
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for word, resource in RESOURCES.items():
            limit, most = self.limit(word), resource.most
            if limit is not None and not 0 <= limit <= most:  # written so that NaN is refused
                huge = isinstance(limit, int) and limit.bit_length() > 1000  # such an int has no text, nor a float
                given = "a number of hundreds of digits" if huge else limit
                raise ValueError(
                    f"budget {word}={given} is not a limit; give a number from 0 to {most}, or leave it out"
                )

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Budget:
        """Rebuild a budget from its ``record``; limits that older records do not have are none."""
        limits: dict[str, Any] = {row.attribute: record.get(row.attribute) for row in RESOURCES.values()}
        return cls(**limits)

    def record(self) -> dict[str, Any]:
        """Return the limits by attribute, as ledgers keep them."""
        return {row.attribute: self.limit(word) for word, row in RESOURCES.items()}

    def record_of(self, cost: Cost) -> dict[str, Any]:
        """Return a cost by attribute, as ledgers keep it, with energy and time as far as this budget can count them."""
        counted = {row.attribute: row.used(cost, self) for row in RESOURCES.values() if row.known(self)}
        return asdict(cost) | {row.attribute: None for row in RESOURCES.values()} | counted

    def limit(self, word: str) -> float | None:
        """Return the limit of a resource by its word; None = no limit."""
        found: float | None = getattr(self, RESOURCES[word].attribute)
        return found

    @classmethod
    def parse(cls, text: str, *, spec_experts: int | None = None, plain: Callable[[int], Cost] | None = None) -> Budget:
        """Read ``experts=25%``, ``memory=40MiB,down=2MB,up=1MB,flops=3e12``, ``unlimited`` or a device profile's name.

        A profile may be followed by limits that replace its own (``raspberry-pi-5-8gb,experts=8``). MB is 10^6 and
        MiB 2^20 bytes, case does not matter, a bare number counts bytes, operations or experts. Amounts are rounded
        down, because a limit may not grow. ``speed=2e9,downlink=20Mbit,uplink=5Mbit`` state operations and bits a
        second, from which time is predicted; they limit nothing. ``memory=25%`` (or down, up) is what a client needs
        that holds and trains that share of the experts and nothing else: a tier of experts that systems without absent
        experts can meet too.

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
        limits: dict[str, Any] = {}
        for place, part in enumerate(text.split(",")):
            word, equals, amount = (piece.strip() for piece in part.partition("="))
            if not equals and place == 0:
                limits.update(_profile_limits(word, text))
                continue
            row = RESOURCES.get(word) or RATES.get(word)
            if row is None:
                known = [*RESOURCES, *RATES]
                raise ValueError(f"budget {text!r}: {word!r} is not a resource; {_nearest(word, known)}")
            if _count(text, word) > 1:
                raise ValueError(f"budget {text!r}: {word} is given twice; give it once")
            found = _amount(row, amount, text=text, spec_experts=spec_experts, plain=plain)
            if word in RESOURCES:
                limits[row.attribute] = found
            elif not found:
                raise ValueError(f"budget {text!r}: a {word} of 0 ends no round; give more, or leave {word} out")
            else:
                limits["pace"] = replace(limits.get("pace") or Pace(), **{row.attribute: float(found)})
        for row in RESOURCES.values():
            if row.counted_by and limits.get(row.attribute) is not None and limits.get(row.counted_by) is None:
                raise ValueError(f"budget {text!r}: {row.without}")
        return cls(**limits, name=text.strip())

    def __str__(self) -> str:
        """Return text that ``parse`` reads back to an equal budget."""
        if (device := find_device(self.name)) is not None and device_budget(device) == self:
            return device.name
        if find_device(self.name.partition(",")[0].strip()) is not None and Budget.parse(self.name) == self:
            return self.name  # only a profile's name can say the rates of its power
        given = [(row, self.limit(word)) for word, row in RESOURCES.items()]
        given += [(row, getattr(self.pace, row.attribute, None)) for row in RATES.values()]
        return (
            ",".join(f"{row.word}={_text(row, amount)}" for row, amount in given if amount is not None) or "unlimited"
        )

    def violations(self, cost: Cost) -> list[str]:
        """Return one line for every resource of which ``cost`` needs more than is allowed; empty = it fits.

        Example:
            >>> Budget.parse("memory=1MiB").violations(Cost(memory_bytes=2 * 2**20))
            ['memory: 2.00 MiB (2097152 B) used, 1.00 MiB (1048576 B) allowed']
        """
        found = []
        for word, resource in RESOURCES.items():
            used, allowed = resource.used(cost, self), self.limit(word)
            if allowed is not None and not used <= allowed:  # written so that NaN counts as too much
                found.append(f"{word}: {show(word, used, exact=True)} used, {show(word, allowed, exact=True)} allowed")
        return found

    def fits(self, cost: Cost) -> bool:
        """Return whether ``cost`` stays within every limit."""
        return not self.violations(cost)

    def with_flops_of(self, traffic: Cost) -> Budget:
        """Return this budget with a FLOP limit that keeps those of energy and time too, once ``traffic`` is paid."""
        bounds = [] if self.flops is None else [self.flops]
        for word, row in RESOURCES.items():
            limit, prices = self.limit(word), row.prices(self)
            if limit is not None and prices is not None and prices.flop:
                flops = max(0.0, (limit - prices.of(traffic)) / prices.flop)
                while flops and prices.of(replace(traffic, flops=flops)) > limit:  # by rounding
                    flops = math.nextafter(flops, 0.0)
                bounds.append(flops)
        return replace(self, flops=min(bounds)) if bounds else self

    def after(self, extra: Cost) -> Budget:
        """Return what is left of what is spent (traffic, operations, energy) once ``extra`` is paid.

        Raises:
            BudgetError: ``extra`` alone needs more than is allowed of some resource.
        """
        if over := self.violations(extra):
            raise BudgetError(f"the work besides training alone exceeds the budget ({over[0]}); raise the budget")
        left = {
            resource.attribute: limit - resource.used(extra, self)
            for word, resource in RESOURCES.items()
            if resource.spent and (limit := self.limit(word)) is not None
        }
        return replace(self, **left)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Cost:
    """Predicted or measured cost of one client in one round, in the units of ``Budget``; seconds are wall-clock."""

    memory_bytes: int = 0
    flops: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    experts: int = 0
    seconds: float = 0.0
    energy_joules: float = 0.0  # as a ledger has it; elsewhere a budget's power counts it
    virtual_seconds: float = 0.0  # as a ledger has it; elsewhere a budget's pace counts it

    def with_extra(self, extra: Cost) -> Cost:
        """Return this cost plus that of work before or after it: traffic, operations, time add up, peaks do not."""
        pairs = {name: (value, getattr(extra, name)) for name, value in vars(self).items()}
        return Cost(
            **{name: max(pair) if name in ("memory_bytes", "experts") else sum(pair) for name, pair in pairs.items()}
        )


NOTHING = Cost()


def device_budget(device: Device) -> Budget:
    """Return the limits of a device profile."""
    return Budget(
        memory_bytes=device.usable_bytes,
        flops=device.round_flops,
        bytes_down=device.round_down,
        bytes_up=device.round_up,
        power=None if device.watts is None else Power(device.joules_per_flop, device.joules_per_byte),
        pace=Pace(device.reached_flops, device.down_bits, device.up_bits),
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
    if resource in ("energy", "time"):
        unit = "J" if resource == "energy" else "s"
        return f"{_show_flops(amount)} {unit} ({amount!r} {unit})" if exact else f"{_show_flops(amount)} {unit}"
    if resource in RATES:
        return f"{_show_flops(amount)} a second"
    text = shown_size(amount, up=True)
    return f"{text} ({int(amount)} B)" if exact and amount >= 1024 else text


def _show_flops(amount: float) -> str:
    """Three digits, rounded up: 1.24e+09."""
    if amount <= 0:
        return "0"
    step = Fraction(10) ** (math.floor(math.log10(amount)) - 2)
    return f"{float(math.ceil(Fraction(amount) / step) * step):.3g}"


def _profile_limits(word: str, text: str) -> dict[str, Any]:
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
    limits = {row.attribute: budget.limit(word) for word, row in RESOURCES.items()}
    return {"power": budget.power, "pace": budget.pace} | limits


def _count(text: str, word: str) -> int:
    """How often a resource is named in a budget's text."""
    return sum(part.partition("=")[0].strip() == word for part in text.split(","))


def _amount(
    resource: Resource, amount: str, *, text: str, spec_experts: int | None, plain: Callable[[int], Cost] | None
) -> int | float:
    """One amount of a budget's text, as an exact integer of bytes or experts, or a float of operations."""
    word, match = resource.word, _NUMBER.fullmatch(amount)
    if match is None:
        raise ValueError(
            f"budget {text!r}: {amount!r} is not an amount of {word}; write for example {_example(resource)}"
        )
    number, unit = _exact(match[1], text=text, resource=resource), match[2]
    if unit == "%" and resource.shares:
        if spec_experts is None or (word != "experts" and plain is None):
            raise ValueError(f"budget {text!r}: {amount!r} can only be resolved once the model is known; give a number")
        count = min(math.floor(number * spec_experts / 100), spec_experts)
        if word == "experts" or plain is None:
            return count
        return int(getattr(plain(count), resource.attribute))
    size = 1 if not unit else {known.lower(): value for known, value in resource.units.items()}.get(unit.lower())
    if size is None:
        known = [*resource.units, *(["%"] if resource.shares else [])]
        raise ValueError(f"budget {text!r}: {unit!r} is not a unit of {word}; {_nearest(unit, known)}")
    if number * size > resource.most:
        raise ValueError(
            f"budget {text!r}: {amount!r} is more than {show(word, resource.most)}; give less, or leave {word} out for "
            "no limit"
        )
    return math.floor(number * size) if resource.exact else float(number * size)


def _exact(digits: str, *, text: str, resource: Resource) -> Fraction:
    """A number of a budget's text; only one of a sensible length is ever written out."""
    exponent = digits.lower().partition("e")[2].lstrip("+-0")
    if len(digits) > _DIGITS or len(exponent) > 3:
        shown = digits if len(digits) <= 20 else f"{digits[:17]}..."
        raise ValueError(
            f"budget {text[:60]!r}: {shown!r} is too long a number for {resource.word}; write for example "
            f"{_example(resource)}"
        )
    return Fraction(digits)


def _example(resource: Resource) -> str:
    return f"{resource.word}={resource.example}"


def _nearest(word: str, known: list[str]) -> str:
    """The nearest valid word, and all of them when none is near."""
    near = nearest(word, known)
    return f"did you mean {near!r}?" if near else f"valid: {', '.join(known)}"


def _text(resource: Resource, limit: float) -> str:
    """An amount that ``_amount`` reads back: bytes in the largest unit that divides them."""
    if not resource.exact:
        return repr(limit)
    for unit, size in (*BINARY.items(), *DECIMAL.items()) if resource.units else ():
        if limit and limit % size == 0:
            return f"{int(limit) // size}{unit}"
    return f"{int(limit)}{'B' if resource.units else ''}"
