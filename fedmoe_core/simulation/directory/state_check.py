"""A checkpoint's tensors against what its run can have saved: names, shapes, kinds of number, ranges."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from fedmoe_core.messages.profile import empty_profile, profile_arrays
from fedmoe_core.server.guard.bounds import ROUNDS
from fedmoe_core.server.state import NORMS, ServerState
from fedmoe_core.simulation.directory.standing import AFRESH
from fedmoe_core.simulation.worlds.federation import Federation


@dataclass(frozen=True)
class StateCheck:
    """What every packed state of one run agrees with.

    Attributes:
        begin: the state before the first round, made again from the configuration.
        layers, experts: of its model.
        place: where the checkpoint lies, for the sentences.
        bounds_norms: whether a guard keeps usual norms.
    """

    begin: ServerState
    layers: int
    experts: int
    place: str
    bounds_norms: bool = False

    @classmethod
    def of(cls, world: Federation, place: str) -> StateCheck:
        """Make the check of a founded run."""
        spec = world.population.spec
        guarded = world.config.guard.rule != "none"
        return cls(world.algorithm.init(world.params), spec.num_layers, spec.num_experts, place, guarded)

    def require(self, packed: Mapping[str, Tensor], round: int, *, whole: bool = True) -> None:
        """Refuse a packed state that no run of this configuration can have after ``round`` rounds.

        Args:
            packed: as ``pack_state`` gives it, or ``pack_older`` where not ``whole``.
            round: rounds applied so far.
            whole: whether every tensor of the model is there.

        Raises:
            ValueError: a tensor is missing, unknown, of another shape or dtype, or holds what it cannot hold.
        """
        params = {f"params/{key}": tensor for key, tensor in self.begin.params.items()}
        memory = {f"memory/{key}": tensor for key, tensor in self.begin.memory.items()}
        profiles = {key for key in packed if key.startswith("profiles/")}
        remembered = {key for key in packed if key.startswith("memory/")}
        older = set() if whole else {key for key in packed if key.startswith("unknown/") or key == "unheard"}
        known = {*params, *remembered, *profiles, *older, *([NORMS] if self.bounds_norms else []), "visits"}
        self._names(packed, known, [*params, *memory, "visits"] if whole else ["visits"])
        for key, like in {**params, **memory}.items():
            if key in packed:
                self._like(packed, key, like.dtype, like.shape)
        for key in {*params, *remembered} & packed.keys():
            # A memory may hold infinity, such as a best value that is still unknown; NaN is in nothing that we keep.
            found, finite = packed[key], key in params
            if found.is_floating_point() and not bool((found.isfinite() if finite else ~found.isnan()).all()):
                self.refuse(key, f"holds NaN{' or infinity' if finite else ''}")
        self._like(packed, "visits", torch.int64, torch.Size([len(self.begin.visits)]))
        self.between(packed, "visits", 0, round)
        if profiles:
            self._profiles(packed, profiles)
        if NORMS in packed:
            self._norms(packed, round)
        if "unheard" in packed:
            self._clients(packed, "unheard")

    def _profiles(self, packed: Mapping[str, Tensor], found: Collection[str]) -> None:
        shapes = {
            f"profiles/{name}": array.shape
            for name, array in profile_arrays(empty_profile(self.layers, self.experts)).items()
        }
        self._names(dict.fromkeys(found), {*shapes, "profiles/clients"}, [*shapes, "profiles/clients"])
        heard = self._clients(packed, "profiles/clients")
        for key, shape in shapes.items():
            self._like(packed, key, torch.float64, torch.Size([heard, *shape]))
            if not bool(packed[key].isfinite().all()):
                self.refuse(key, "holds NaN or infinity")
        held = packed["profiles/held_LE"]
        if not bool(((held == 0) | (held == 1)).all()):
            self.refuse("profiles/held_LE", "holds other numbers than 0 and 1")

    def _norms(self, packed: Mapping[str, Tensor], round: int) -> None:
        rounds = packed[NORMS].shape[0] if packed[NORMS].ndim else 0
        if not 1 <= rounds <= min(ROUNDS, round):
            self.refuse(NORMS, f"is of {rounds} rounds")
        self._like(packed, NORMS, torch.float64, torch.Size([rounds, 2 * self.layers + 1]))
        self.between({NORMS: packed[NORMS].nan_to_num(nan=1.0)}, NORMS, 0.0, sys.float_info.max)  # NaN: not known

    def _clients(self, packed: Mapping[str, Tensor], key: str) -> int:
        """Refuse what is not an ascending list of clients; return how many they are."""
        self._like(packed, key, torch.int64, torch.Size([packed[key].numel()]))
        self.between(packed, key, 0, len(self.begin.visits) - 1)
        if not bool((packed[key].diff() > 0).all()):
            self.refuse(key, "does not name clients in ascending order, each once")
        return packed[key].numel()

    def _names(self, packed: Mapping[str, object], known: Collection[str], needed: Collection[str]) -> None:
        if missing := sorted(set(needed) - packed.keys()):
            self.refuse(missing[0], "is missing")
        if stray := sorted(packed.keys() - set(known)):
            self.refuse(stray[0], "is not of this run")

    def like(self, packed: Mapping[str, Tensor], kinds: Mapping[str, tuple[torch.dtype, torch.Size]]) -> None:
        """Refuse tensors that are missing, or of another dtype or shape."""
        for key, (dtype, shape) in kinds.items():
            if key not in packed:
                self.refuse(key, "is missing")
            self._like(packed, key, dtype, shape)

    def _like(self, packed: Mapping[str, Tensor], key: str, dtype: torch.dtype, shape: torch.Size) -> None:
        found = packed[key]
        if (found.dtype, found.shape) != (dtype, shape):
            was, want = (
                f"{str(kind).removeprefix('torch.')}{list(sizes)}"
                for kind, sizes in ((found.dtype, found.shape), (dtype, shape))
            )
            self.refuse(key, f"is {was}, not {want}")

    def between(self, packed: Mapping[str, Tensor], key: str, least: float, most: float) -> None:
        """Refuse a tensor with a number outside these bounds."""
        if not bool(((packed[key] >= least) & (packed[key] <= most)).all()):
            self.refuse(key, f"is not between {least} and {most}")

    def refuse(self, key: str, what: str) -> NoReturn:
        """Refuse the checkpoint for one of its tensors."""
        raise ValueError(f"{self.place} cannot be this run's: its tensor {key!r:.80} {what}; {AFRESH}")
