"""All ranks compare what they are about to do, and refuse by name what differs, before anything trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.profile import profile_arrays
from fedmoe_core.model.spec import model_hash
from fedmoe_core.simulation.identity import Identity
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.ranks.joining import named
from fedmoe_core.simulation.worlds.federation import Federation

TROUBLE = "trouble"  # what kept a rank from finding its facts
SHOWN = 3  # differences that one sentence names
NAMES = {"corpus_sha256": "the content of data", "model_sha256": "the content of model", "code": "the code of fedmoe"}
SAME = "start every node with the same words, files and versions"


def agree_on_sources(ranks: Ranks, config: Config, sources: Callable[[], Identity]) -> None:
    """Compare versions, configuration, kind of device, corpus and model of all ranks; one rank alone has no doubt.

    Raises:
        ValueError: on every rank: some differ, or one of them cannot read its files.
    """
    if ranks.world > 1:
        compare(ranks, _sources(ranks, config, sources), SAME)


def agree_on_world(ranks: Ranks, world: Federation) -> None:
    """Compare what the ranks prepared for themselves: from it every rank makes the same plans, or they diverge.

    Raises:
        ValueError: on every rank: some differ.
    """
    if ranks.world > 1:
        compare(ranks, _prepared(world), "give all nodes one cache=DIRECTORY that all of them see, and equal machines")


def compare(ranks: Ranks, facts: Mapping[str, Any], remedy: str) -> None:
    """Compare the facts of all ranks with those of rank 0.

    Raises:
        ValueError: on every rank alike, with the ranks and the facts that differ, or the trouble that one met.
    """
    told = ranks.gather(dict(facts))
    if troubled := [rank for rank, found in enumerate(told) if TROUBLE in found]:
        first = troubled[0]
        raise ValueError(f"{named(troubled)} of {ranks.world} cannot start: {told[first][TROUBLE]}")
    unlike = [rank for rank, found in enumerate(told) if found != told[0]]
    if not unlike:
        return
    lead, other = told[0], told[unlike[0]]
    keys = [key for key in dict.fromkeys([*lead, *other]) if lead.get(key) != other.get(key)]
    shown = [f"{NAMES.get(key, key)} ({_short(other.get(key))}, not {_short(lead.get(key))})" for key in keys[:SHOWN]]
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    raise ValueError(
        f"{named(unlike)} {'differs' if len(unlike) == 1 else 'differ'} from rank 0 in {', '.join(shown)}{more}; "
        f"{remedy}"
    )


def _sources(ranks: Ranks, config: Config, sources: Callable[[], Identity]) -> dict[str, Any]:
    try:
        identity = sources()
    except (ValueError, OSError) as error:
        return {TROUBLE: " ".join(str(error).split())}
    return {**identity.facts(), "device": _kind(ranks.device), "ranks": config.ranks, **config.decisive()}


def _kind(device: torch.device) -> str:
    """Name the kind of device; another one rounds otherwise, and then the bits depend on who trains which client."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def _prepared(world: Federation) -> dict[str, str]:
    population, digest = world.population, sha256()
    for array in (*profile_arrays(population.prior).values(), population.samples_C):
        digest.update(np.ascontiguousarray(array).tobytes())
    return {
        "the warm model": model_hash(world.params),
        "what the server measured on public text": digest.hexdigest(),
        "the predicted costs": sha256(repr((population.costs, population.lora_costs)).encode()).hexdigest(),
        "the budgets": sha256(repr(population.budgets).encode()).hexdigest(),
    }


def _short(value: object) -> str:
    """A value in few letters: a digest by its first digits."""
    text = str(value)
    return text[:12] if len(text) == 64 and " " not in text else text[:60]
