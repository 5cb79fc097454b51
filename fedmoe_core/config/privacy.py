"""What ``[privacy]`` needs and refuses, by the values of a whole configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REACH = (2.0**-20, 2.0**20)  # of clip * noise: outside, the sums would have no number format that holds them


def check_privacy(values: Mapping[str, Any]) -> None:
    """Refuse settings that promise privacy and would not give it, or that privacy leaves without a meaning.

    Raises:
        ValueError: one sentence with the remedy.
    """
    clip, noise, delta, epsilon = (values[f"privacy.{name}"] for name in ("clip", "noise", "delta", "epsilon"))
    clients = values["clients"]
    if values["privacy.secure"]:
        _check_secure(values)
    if noise and not clip:
        raise ValueError(f"privacy.noise={noise:g} hides nothing of unbounded size; set privacy.clip, for example to 1")
    if epsilon and not noise:
        raise ValueError(f"privacy.epsilon={epsilon:g} is passed by any round without noise; set privacy.noise")
    if delta and not noise:
        raise ValueError(f"privacy.delta={delta:g} counts with noise alone; set privacy.noise, or leave it out")
    if noise and not 0 < delta < 1 / clients:
        raise ValueError(
            f"privacy.delta={delta:g} must be above 0 and below 1 / clients = {1 / clients:.3g}, for with a larger one "
            f"all data of one client may be told; set for example {0.1 / clients:.1g}"
        )
    if values["privacy.secret"] and not clip:
        raise ValueError("privacy.secret=true has nothing to draw without privacy.clip; set that, or leave it out")
    if not clip:
        return
    if not REACH[0] <= clip * (noise or 1.0) <= REACH[1]:
        raise ValueError(
            f"privacy.clip={clip:g} times privacy.noise={noise:g} is not from {REACH[0]:.0e} to {REACH[1]:.0e}, "
            "which the sums can hold; choose another clip"
        )
    for key, value, why in (
        ("time.mode", "rounds", "an answer to an older model was drawn by the speeds of all, not by a known chance"),
        ("cohort.clients", 1, "who trains at once with a client moves the last bits of its answer"),
        ("min_clients", 1, "whether a round counts would tell how many answered"),
        ("guard.quorum", 1, "whether an expert moves would tell how many trained it"),
        ("guard.rule", "none", "one client's change can move a median or who is left out by more than its own norm"),
    ):
        if values[key] != value:
            raise ValueError(f"privacy.clip={clip:g} cannot be kept with {key}={values[key]}: {why}; set {key}={value}")
    if values["algorithm"] == "hfedmoe_plus" and values["plus.gate"] == "frozen":
        raise ValueError(
            f"privacy.clip={clip:g} cannot be kept with plus.gate=frozen: noise would move routers that never train; "
            "set plus.gate=personal"
        )
    if values["aggregation.gate"] == "literal":
        raise ValueError(
            f"privacy.clip={clip:g} cannot be kept with aggregation.gate=literal, which scales routers by what clients "
            "measured; choose row-wise, normalized or fedavg"
        )


def _check_secure(values: Mapping[str, Any]) -> None:
    if values["time.mode"] != "rounds":
        raise ValueError(
            f"privacy.secure needs the clients of a round to mask together; set time.mode=rounds, not "
            f"{values['time.mode']}"
        )
    if values["guard.rule"] != "none":
        raise ValueError(
            f"privacy.secure hides each client's change, and guard.rule={values['guard.rule']} compares them; set "
            "guard.rule=none, or privacy.secure=false"
        )
    if (values["clients_per_round"] or values["clients"]) < 2:
        raise ValueError(
            "privacy.secure hides nothing where one client makes a round; set clients_per_round to 2 or more"
        )
