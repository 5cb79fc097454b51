"""Numbers as people read them: bytes, FLOPs, seconds, losses, shares; ``n/a`` where nothing is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

NONE = "n/a"
# Clients that are shown one by one; more are grouped by tier. A figure has 3.6 inches for its clients: 40 rows of 6.5
# points, the smallest print that is read. A terminal shows 24 to 50 lines.
MANY = 40


def known(value: float | None) -> TypeGuard[float]:
    """Tell whether ``value`` is a finite number to show."""
    return value is not None and math.isfinite(value)


def size(count: float | None, *, up: bool = False) -> str:
    """Show bytes in binary units, such as ``12.3 MiB``; rounded ``up``, a limit typed from it is large enough."""
    if known(count) and abs(count) < 1024:
        return f"{math.ceil(count) if up else count:.0f} B"
    return _with_unit(count if count is None else count / 1024, ("KiB", "MiB", "GiB", "TiB"), base=1024, up=up)


def flops(count: float | None) -> str:
    """Show floating-point operations in decimal units, such as ``4.20 GFLOP``."""
    return _with_unit(count, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def joules(value: float | None) -> str:
    """Show an energy, such as ``4.20 J`` or ``1.20 kJ``."""
    return _with_unit(value, ("J", "kJ", "MJ", "GJ"))


def seconds(value: float | None) -> str:
    """Show a time, such as ``3.2 s``, ``2 min 05 s`` or ``1 h 04 min``."""
    if not known(value):
        return NONE
    if value < 60:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number(value: float | None, digits: int = 3) -> str:
    """Show a loss or another plain number with ``digits`` decimals."""
    return NONE if not known(value) else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """Show a change, always with its sign."""
    return NONE if not known(value) else f"{value:+.{digits}f}".replace("-", "−")


def share(value: float | None, digits: int = 1) -> str:
    """Show a part of one, in per cent."""
    return NONE if not known(value) else f"{100 * value:.{digits}f} %"


def change(values: Mapping[str, float | None], key: str, text: Callable[[float | None], str]) -> str:
    """Show a figure before and after: ``KEY_before`` and ``KEY_after`` of ``values``."""
    return f"{text(values.get(f'{key}_before'))} → {text(values.get(f'{key}_after'))}"


def plural(count: int, noun: str) -> str:
    """Count things in words: ``1 client``, ``2 clients``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _with_unit(value: float | None, units: Sequence[str], *, base: int = 1000, up: bool = False) -> str:
    """Three digits and the first unit of which there are less than 1000, or the last."""
    if not known(value):
        return NONE
    power = 0
    while abs(value) >= 1000 and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{_three(value, up=up)} {units[power]}"


def _three(value: float, *, up: bool = False) -> str:
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{math.ceil(value * 10**digits) / 10**digits if up else value:.{digits}f}"
