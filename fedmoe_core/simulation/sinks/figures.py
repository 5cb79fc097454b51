"""What sinks keep of a round and of a summary: numbers by name, of all clients and of each tier, and the importance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType
from typing import Any

from fedmoe_core.base import show
from fedmoe_core.config.run_config import Config

# Numbers of a round's line that are kept under their own names, and what each is.
OF_THE_LINE: Mapping[str, str] = MappingProxyType(
    {
        "loss": "held-out loss of the global model",
        "accuracy": "held-out accuracy of the global model",
        "bytes_down_total": "bytes that clients received so far",
        "bytes_up_total": "bytes that clients sent so far",
        "flops_total": "floating-point operations of clients so far",
        "seconds": "seconds of the round, evaluation included",
        "engine_seconds": "seconds of the round that no client trained",
        "virtual_seconds": "virtual seconds of the round",
        "virtual_seconds_total": "virtual seconds so far",
        "staleness_mean": "server steps by which the answers were late, mean",
        "staleness_max": "server steps by which the answers were late, most",
        "in_flight": "clients that trained on after the step",
        "load_cv": "coefficient of variation of the experts' load",
        "coverage": "share of the experts that some client trained",
        "lost_mass": "share of the router's probability on absent experts",
    }
)
# Numbers that are reckoned from a round's line.
RECKONED: Mapping[str, str] = MappingProxyType(
    {
        "worst_client_loss": "held-out loss of the client that is worst off",
        "worst_client_accuracy": "held-out accuracy of the client that is worst off",
        "own_models_loss": "held-out loss of the clients' own models, mean",
        "own_models_accuracy": "held-out accuracy of the clients' own models, mean",
        "refused": "updates of the round that failed or were refused",
        "late": "updates of the round that came after the deadline",
    }
)


@dataclass(frozen=True)
class Figures:
    """What one round came to, every number finite.

    Attributes:
        values: of the run, by name.
        tiers: of each tier's clients, by the budget's words and then by name.
        importance_LE: what each expert is worth, (L, E), as the line has it; empty where it has none.
    """

    values: Mapping[str, float]
    tiers: Mapping[str, Mapping[str, float]]
    importance_LE: Sequence[Sequence[float]]


def figures_of(line: Mapping[str, Any], config: Config) -> Figures:
    """Read the figures out of a round's line of metrics.jsonl; what was not measured is absent.

    Where clients are judged by their own models alone, ``worst_client_loss`` and the tiers are of those.
    """
    loss_C = line.get("loss_clients") or line.get("personal_loss_C") or ()
    accuracy_C = line.get("accuracy_clients") or line.get("personal_accuracy_C") or ()
    found = {name: line.get(name) for name in OF_THE_LINE}
    found |= {"worst_client_loss": _of(max, loss_C), "worst_client_accuracy": _of(min, accuracy_C)}
    for kind in ("loss", "accuracy"):
        found[f"own_models_{kind}"] = _of(fmean, line.get(f"personal_{kind}_C") or ())
    found["refused"] = len(line.get("refused") or ())
    found["late"] = len(line.get("late") or ()) if config.time.deadline else None
    members: dict[str, list[int]] = {}
    for client in range(max(len(loss_C), len(accuracy_C))):
        members.setdefault(config.budgets[client % len(config.budgets)].strip(), []).append(client)
    tiers = {
        tier: _finite(
            {
                "loss": _of(fmean, [loss_C[client] for client in clients if client < len(loss_C)]),
                "worst_client_loss": _of(max, [loss_C[client] for client in clients if client < len(loss_C)]),
                "accuracy": _of(fmean, [accuracy_C[client] for client in clients if client < len(accuracy_C)]),
            }
        )
        for tier, clients in members.items()
    }
    rows = line.get("importance_LE") or ()
    whole = all(show.known(value) for row in rows for value in row)
    return Figures(_finite(found), {tier: values for tier, values in tiers.items() if values}, rows if whole else ())


def summary_figures(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of summary.json by name; flags count 0 or 1."""
    return _finite({key: value for key, value in summary.items() if isinstance(value, int | float)})


def _of(reduce: Any, values: Iterable[float | None]) -> float | None:
    found = [value for value in values if show.known(value)]
    return reduce(found) if found else None


def _finite(found: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in found.items() if show.known(value)}
