"""Partitioners over index arrays: which client gets which row."""

from __future__ import annotations

import math

import numpy as np

from fedmoe_core.base.rng import counter_rng
from fedmoe_core.base.wording import unknown

SCHEMES = ("auto", "domain", "iid", "dirichlet:ALPHA")
LEAST_ROWS = 10  # a client with fewer rows than one batch learns only noise; used where the data are plenty


def parse_scheme(text: str) -> tuple[str, float]:
    """Read ``iid``, ``domain``, ``auto`` or ``dirichlet:ALPHA`` as (name, alpha); alpha is 0 where it means nothing.

    Raises:
        ValueError: unknown name, or an alpha that is not a finite number above 0.
    """
    name, colon, value = text.partition(":")
    if name in ("auto", "domain", "iid") and not colon:
        return name, 0.0
    if name != "dirichlet":
        raise unknown(f"partition {text!r}", text, SCHEMES)
    try:
        alpha = float(value)
    except ValueError:
        alpha = math.nan
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"partition {text!r} needs a finite number above 0 after the colon, such as dirichlet:0.5")
    return name, alpha


def partition(groups_N: np.ndarray, *, clients: int, scheme: str, seed: int, least: int = 1) -> np.ndarray:
    """Give every row to exactly one client.

    ``iid`` deals a random order of the rows in turn. ``dirichlet:ALPHA`` draws, for each group, the clients' shares
    from Dir(ALPHA, ..., ALPHA) and cuts the group's random order at them (label skew as in Yurochkin et al. 2019 and
    NIID-Bench [P]). ``domain`` keeps every group whole: the largest group goes to the client with the fewest rows so
    far, so that a client may own several.

    No client may be empty. ``iid`` and ``domain`` see to that by themselves; under ``dirichlet`` every client is raised
    to max(least, min(LEAST_ROWS, N // 2C)) rows by moving random rows, one by one, from the client that holds
    most at that moment. The rule bites only when a draw starves a client, as small alphas do.

    Args:
        groups_N: (N,) integers: the class or the domain of each row.
        clients: C, number of clients.
        scheme: ``iid``, ``dirichlet:ALPHA`` or ``domain`` (``auto`` is resolved by the caller, which knows the data).
        seed: fixes everything.
        least: fewest rows a client can do with.

    Returns:
        (N,) int64: the client, 0..C-1, of each row.

    Raises:
        ValueError: unknown scheme, or more clients than rows or groups allow.
    """
    name, alpha = parse_scheme(scheme)
    if clients < 1:
        raise ValueError(f"clients={clients} must be at least 1")
    total = len(groups_N)
    if total < clients * least:
        raise ValueError(
            f"clients={clients} needs {clients * least} rows or pieces of text ({least} each) but {total} are left for "
            f"clients; use clients <= {total // least} or a larger corpus"
        )
    if name == "domain":
        return _whole_groups(groups_N, clients)
    if name == "iid":
        owner_N = np.empty(total, dtype=np.int64)
        owner_N[counter_rng(seed, "iid").permutation(total)] = np.arange(total) % clients
        return owner_N
    if name == "dirichlet":
        return _raise_poorest(_dirichlet(groups_N, clients, alpha, seed), clients, least, seed)
    raise ValueError(f"partition {scheme!r} must be resolved to iid, domain or dirichlet:ALPHA before rows are dealt")


def counts(owner_N: np.ndarray, groups_N: np.ndarray, shape: tuple[int, int], weights_N: np.ndarray) -> np.ndarray:
    """Count rows or tokens, ``weights_N``, of each client and group, (clients, groups) int64."""
    counts_CD = np.zeros(shape, dtype=np.int64)
    np.add.at(counts_CD, (owner_N, groups_N), weights_N)
    return counts_CD


def _whole_groups(groups_N: np.ndarray, clients: int) -> np.ndarray:
    """Largest group first, each to the client with the fewest rows (ties: lowest number)."""
    names, inverse_N, sizes = np.unique(groups_N, return_inverse=True, return_counts=True)
    if len(names) < clients:
        raise ValueError(
            f"clients={clients} is more than the {len(names)} domains of the corpus; "
            f"use clients <= {len(names)} or partition=iid"
        )
    load_C = np.zeros(clients, dtype=np.int64)
    owner_of_group = np.empty(len(names), dtype=np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        owner_of_group[group] = int(load_C.argmin())
        load_C[owner_of_group[group]] += sizes[group]
    return owner_of_group[inverse_N]


def _dirichlet(groups_N: np.ndarray, clients: int, alpha: float, seed: int) -> np.ndarray:
    owner_N = np.empty(len(groups_N), dtype=np.int64)
    for group in np.unique(groups_N):
        rng = counter_rng(seed, "dirichlet", int(group))
        rows = rng.permutation(np.flatnonzero(groups_N == group))
        cuts = np.round(np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(rows)).astype(np.int64)
        for client, part in enumerate(np.split(rows, cuts)):
            owner_N[part] = client
    return owner_N


def _raise_poorest(owner_N: np.ndarray, clients: int, least: int, seed: int) -> np.ndarray:
    """Move rows from the richest client of the moment until no client has fewer than the floor (see ``partition``)."""
    floor = max(least, min(LEAST_ROWS, len(owner_N) // (2 * clients)))
    owner_N = owner_N.copy()
    rng = counter_rng(seed, "raise")
    held_C = np.bincount(owner_N, minlength=clients)
    while held_C.min() < floor:
        poor, rich = int(held_C.argmin()), int(held_C.argmax())
        owner_N[rng.choice(np.flatnonzero(owner_N == rich))] = poor
        held_C[poor] += 1
        held_C[rich] -= 1
    return owner_N
