"""The Accumulator: checked client updates in, exact order-free sums out; ``means`` turns them into the next model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.model.spec import ParamSpec
from fedmoe_core.server.adding import Adder
from fedmoe_core.server.admission import Admission, examined
from fedmoe_core.server.agreement import agreements
from fedmoe_core.server.blocks import end_to_end
from fedmoe_core.server.buckets import BUCKET, bucket_plan, reduce_buckets, touched_spans
from fedmoe_core.server.fixed_point import SumSettings
from fedmoe_core.server.guard.combine import Gather, Part, Told, alone, combine
from fedmoe_core.server.guard.settings import Guard
from fedmoe_core.server.guard.shelf import Shelf, rows_of
from fedmoe_core.server.means import Sums

SCALARS = ("accepted", "gate_den", "dense_den", "round_den")  # places 0..3 of the flat sums


class Accumulator:
    """Exact fixed-point sums of one round, folded client by client and never holding two clients (invariant 13).

    All sums live in one flat int64 tensor, so that ranks are merged by adding spans of it; integer addition makes the
    result the same bits for every order of clients and every placement on ranks.

    Args:
        specs: every tensor of the global model.
        settings: the number format; overflow is ruled out when it is made.
        lr: the clients' learning rate; None skips the check that the sums resolve a thousandth of it.
        train_router: clients send the router rows of their trainable experts.
        train_dense: clients send all dense tensors (trunk and head); without it they have no sum and may not be sent.
        guard: a quorum, and a rule that bears hostile clients. Where it ``needs_all`` updates of a round, they wait on
            disk, and the numerators are zero until ``close``.
        second_visit: ``close`` compares each update with the sum of all (``Sums.agreement``); they wait on disk.
        device: where the sums live.

    Raises:
        ValueError: nothing to sum, a repeated key, layers that differ in their number of experts, or a resolution too
            coarse for ``lr``.

    Example:
        >>> from fedmoe_core.budget.limits import Budget, Cost
        >>> from fedmoe_core.server.means import expert_mean
        >>> sums = Accumulator([ParamSpec("moe.0.w_out", "expert", (2, 1, 1), torch.float32, layer=0)])
        >>> first = np.array([[True, False]])  # both clients train expert 0 only
        >>> for client, delta in enumerate([0.25, 0.75]):
        ...     plan = ExpertPlan(client, 0, first, first, 1, 1, 0, Budget(), Cost())
        ...     deltas = {"moe.0.w_out": torch.full((1, 1, 1), delta)}
        ...     weights = 1.0 * first, 0.0 * first, 0.0, 1.0  # of experts, router rows, gate, dense tensors
        ...     update = ClientUpdate(client, 0, plan.id, deltas, *weights, None, Cost(), 8, steps=1)
        ...     print(sums.add(update, plan).accepted)
        True
        True
        >>> expert_mean(sums.sums(), {"moe.0.w_out": torch.zeros(2, 1, 1)})["moe.0.w_out"].flatten()
        tensor([0.5000, 0.0000])
    """

    def __init__(
        self,
        specs: Sequence[ParamSpec],
        settings: SumSettings | None = None,
        *,
        lr: float | None = None,
        train_router: bool = True,
        train_dense: bool = False,
        device: torch.device | str = "cpu",
        guard: Guard | None = None,
        second_visit: bool = False,
    ) -> None:
        self.settings, self.guard = settings or SumSettings(), guard or Guard()
        if lr is not None:
            self.settings.check_resolution(lr)
        kinds = {"expert", *["router"] * train_router, *["dense"] * train_dense}
        self.specs = tuple(spec for spec in specs if spec.kind in kinds)
        if len({spec.key for spec in specs}) != len(specs):
            raise ValueError("two tensors of the model share a key; give each ParamSpec its own")
        heights = {spec.shape[0] for spec in specs if spec.kind in ("expert", "router")}
        if not self.specs:
            raise ValueError("no tensor of the model trains, so there is nothing to sum; let some of them train")
        if len(heights) > 1:
            raise ValueError(f"MoE layers have {sorted(heights)} experts; give all layers the same number")
        self.num_experts = max(heights, default=0)  # none: a model whose tensors are all dense
        self.num_layers = 1 + max(spec.layer for spec in specs)
        self._clients: set[int] = set()
        self._lent = False  # whether a Sums record looks into the flat tensor
        self._closed = False  # whether the guard has been applied
        if second_visit and self.guard.needs_all:
            raise ValueError(f"rule {self.guard.rule!r} and a second visit both want the updates; give one of them")
        self._shelf = Shelf(self.specs, self.settings) if self.guard.needs_all else None
        self._again = Shelf(self.specs, self.settings) if second_visit else None
        self._agreement: dict[int, np.ndarray] = {}
        self._header = len(SCALARS) + 4 * self.num_layers * self.num_experts  # places before the numerators
        size = self._header + sum(math.prod(spec.shape) for spec in self.specs)
        self._set_flat(torch.zeros(size, dtype=torch.int64, device=device))

    def _set_flat(self, flat: Tensor) -> None:
        """Adopt ``flat`` and cut its views: scalars, four (L, E) tables, then one numerator for each spec."""
        table = (self.num_layers, self.num_experts)
        shapes = [(len(SCALARS),), table, table, table, table, *[tuple(spec.shape) for spec in self.specs]]
        parts = [
            part.view(shape) for part, shape in zip(flat.split([math.prod(s) for s in shapes]), shapes, strict=True)
        ]
        self._flat, self._lent = flat, False
        self._scalars, self._expert_den_LE, self._router_den_LE, self._expert_voters_LE, self._router_voters_LE = parts[
            :5
        ]
        self._numerators = {spec.key: part for spec, part in zip(self.specs, parts[5:], strict=True)}

    def _own(self) -> None:
        """Copy on write: a Sums record that was handed out must not change under its reader."""
        if self._lent:
            self._set_flat(self._flat.clone())

    def add(self, update: ClientUpdate, plan: ExpertPlan, *, share: float = 1.0) -> Admission:
        """Sum one update, or refuse it whole with a reason. Never raises on a bad update, never changes its inputs.

        Args:
            update: what the client sent; deltas of experts and routers as (Bt, ...) rows in ascending expert id.
            plan: what the server asked of that client.
            share: what its deltas are multiplied by before they are summed, in (0, 1]: s(tau) of a stale update. Its
                weights stay, so that a lone stale trainer of an expert moves it by s(tau) of its delta, as FedBuff
                has it, and not by all of it. Bounds are those of the whole delta.

        Raises:
            ValueError: the plan itself does not fit the model, or such a share does not exist.
            OSError: a guard that needs all updates has no room for this one on disk.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share = {share!r} of client {plan.client}'s deltas is not above 0 and at most 1; give 1")
        if plan.trainable_LE.shape != (self.num_layers, self.num_experts):
            raise ValueError(
                f"plan of client {plan.client} is for (layers, experts) {plan.trainable_LE.shape}, the model has "
                f"{(self.num_layers, self.num_experts)}; plan with the same model"
            )
        largest = math.inf
        if plan.client in self._clients:
            reason: str | None = f"client {plan.client} is already in the sums of this round"
        elif self.accepted >= self.settings.max_clients:
            reason = f"the sums are full: max_clients is {self.settings.max_clients}"
        else:
            reason, largest = examined(update, plan, self.specs, self.settings)
        if reason is None:
            self._own()
            self._fold(update, plan, largest, share)
            self._clients.add(plan.client)
        return Admission(plan.client, plan.round, reason is None, reason or "")

    def _fold(self, update: ClientUpdate, plan: ExpertPlan, largest: float, share: float) -> None:
        """Sum ``share`` of a checked update, no |delta| of which is above ``largest``."""
        device, quantize = self._flat.device, self.settings.quantize
        gate, sample = self.settings.quantize_one(update.gate_weight), self.settings.quantize_one(update.sample_weight)
        sends_dense = any(spec.kind == "dense" for spec in self.specs)
        self._scalars += torch.tensor([1, gate, sample * sends_dense, sample], device=device)
        if self._shelf is None and (whole := self._whole(update)) is not None:
            adder = Adder.on(device, self.settings, whole.numel(), largest=largest, share=share)
            adder.add(self._flat[self._header :].unsqueeze(0), whole.unsqueeze(0), [sample], [0])
            return
        expert_LE, router_LE = quantize(update.expert_weight_LE), quantize(update.router_weight_LE)
        self._expert_den_LE += torch.from_numpy(expert_LE).to(device)
        self._router_den_LE += torch.from_numpy(router_LE).to(device)
        self._expert_voters_LE += torch.from_numpy((expert_LE > 0).astype(np.int64)).to(device)
        self._router_voters_LE += torch.from_numpy((router_LE > 0).astype(np.int64)).to(device)
        for shelf in (self._shelf, self._again):
            if shelf is not None:
                shelf.put(update, plan, share)
        if self._shelf is not None:
            return
        longest = max((delta.numel() for delta in update.deltas.values()), default=0)
        adder = Adder.on(device, self.settings, longest, largest=largest, share=share)
        for spec in self.specs:
            if spec.key not in update.deltas:
                continue
            total, delta = self._numerators[spec.key], update.deltas[spec.key]
            if spec.kind == "dense":  # one row: the whole tensor
                adder.add(total.unsqueeze(0), delta.unsqueeze(0), [sample], [0])
            else:
                rows = np.flatnonzero(plan.trainable_LE[spec.layer])
                weight_LE = expert_LE if spec.kind == "expert" else router_LE
                adder.add(total, delta, weight_LE[spec.layer, rows].tolist(), rows.tolist())

    def _whole(self, update: ClientUpdate) -> Tensor | None:
        """All deltas of a model of dense tensors as one, in the order of the sums; None where they lie apart."""
        if self.num_layers or len(update.deltas) < len(self.specs):
            return None
        return end_to_end([update.deltas[spec.key] for spec in self.specs])

    @property
    def accepted(self) -> int:
        """Number of updates in the sums."""
        return int(self._scalars[0])

    def sums(self) -> Sums:
        """Return the sums so far; later calls leave the record unchanged (copied only if something is added later).

        Raises:
            ValueError: the guard has not been applied, see ``close``.
        """
        if not self._closed and (self.guard != Guard() or self._again is not None):
            raise ValueError("the guard has not been applied to these sums; call close() first")
        self._lent = True
        _, gate_den, dense_den, round_den = self._scalars.tolist()
        return Sums(
            settings=self.settings,
            specs=self.specs,
            numerators=dict(self._numerators),
            expert_den_LE=self._expert_den_LE,
            router_den_LE=self._router_den_LE,
            expert_voters_LE=self._expert_voters_LE,
            router_voters_LE=self._router_voters_LE,
            gate_den=gate_den,
            dense_den=dense_den,
            round_den=round_den,
            accepted=self.accepted,
            agreement=self._agreement,
        )

    def flatten(self) -> Tensor:
        """Return a copy of all sums as one int64 vector; adding such vectors merges the sums."""
        return self._flat.clone()

    def load(self, flat: Tensor) -> None:
        """Take over sums that ``flatten`` of accumulators alike gave, or the sum of such vectors; int64, copied.

        Raises:
            ValueError: another length, or too many clients.
        """
        if flat.shape != self._flat.shape:
            raise ValueError(
                f"sums of {tuple(flat.shape)} values are not of {tuple(self._flat.shape)}; load those of the same model"
            )
        self._check_count(int(flat[0]))
        self._set_flat(flat.to(self._flat.device, copy=True))

    def merge(self, other: Accumulator) -> None:
        """Add the sums of ``other``, which holds other clients of the same round; ``other`` is left unchanged.

        Raises:
            ValueError: different models or settings, a client in both, or too many clients together.
        """
        if (other.specs, other.settings, other.guard) != (self.specs, self.settings, self.guard):
            raise ValueError("the two accumulators differ in model or settings; merge only sums made the same way")
        if self._shelf is not None or self._again is not None:
            why = f"rule {self.guard.rule!r}" if self._again is None else "a second visit"
            raise ValueError(f"{why} needs all updates in one accumulator; add them to one")
        if twice := self._clients & other._clients:
            raise ValueError(f"client {min(twice)} is in both sums; give each client to one accumulator")
        self._check_count(self.accepted + other.accepted)
        self._own()
        self._flat += other._flat.to(self._flat.device)
        self._clients |= other._clients

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up the sums of all ranks, in place; exact whatever their order, the same bits on every rank.

        Counts and denominators go first, and tell every rank which rows of which tensors any client changed; only those
        follow. A rank without a client takes part alike.

        Raises:
            ValueError: the ranks together hold more clients than ``max_clients``; the sums are left as they were.
        """
        header = self._flat[: self._header].clone()
        dist.all_reduce(header, group=group)
        numbers = header.cpu()
        self._check_count(int(numbers[0]))
        self._own()
        self._flat[: self._header] = header
        if self._shelf is not None:
            return  # the numerators come with close(), on every rank
        expert_den, router_den, *_ = numbers[len(SCALARS) :].view(4, self.num_layers, self.num_experts).tolist()
        spans = touched_spans(
            self.specs,
            self._header,
            expert_den_LE=expert_den,
            router_den_LE=router_den,
            dense_den=int(numbers[SCALARS.index("dense_den")]),
        )
        reduce_buckets(self._flat, bucket_plan(spans, BUCKET), group)

    def close(self, *, history_RG: np.ndarray | None = None, gather: Gather = alone) -> Told:
        """Apply the guard, once all updates of the round are in and the ranks have met; without a guard do nothing.

        Args:
            history_RG: as ``Told`` of the round before gave it.
            gather: brings one-dimensional tensors of all ranks together, in rank order; every rank calls ``close``.
        """
        told, self._closed = Told(self.guard.rule), True
        if self._shelf is not None:
            self._own()
            told, dens = combine(
                self._shelf,
                self.guard,
                self.specs,
                self._numerators,
                layers=self.num_layers,
                unit=self.settings.resolution,
                history_RG=history_RG,
                gather=gather,
            )
            for part, den in dens.items():
                self._set_den(part, den)
        if self.guard.quorum > 1:
            self._own()
            below = sum(self._hold_back(part) for part in self._parts() if 0 < self._voters(part) < self.guard.quorum)
            told = replace(told, below_quorum=below)
        if self._again is not None:
            self._agreement = agreements(
                self._again,
                self.specs,
                self._numerators,
                shape_LE=(self.num_layers, self.num_experts),
                unit=self.settings.resolution,
                gather=gather,
            )
        return told

    def _parts(self) -> list[Part]:
        """Every expert, router row, and the dense tensors, each once."""
        return list(dict.fromkeys((spec.kind, spec.layer, row) for spec in self.specs for row in range(rows_of(spec))))

    def _voters(self, part: Part) -> int:
        kind, layer, row = part
        if kind == "dense":
            return self.accepted
        return int((self._expert_voters_LE if kind == "expert" else self._router_voters_LE)[layer, row])

    def _set_den(self, part: Part, den: int) -> None:
        kind, layer, row = part
        if kind == "dense":
            self._scalars[SCALARS.index("dense_den")] = den
        else:
            (self._expert_den_LE if kind == "expert" else self._router_den_LE)[layer, row] = den

    def _hold_back(self, part: Part) -> bool:
        """Take a part out of the sums, so that it keeps its bits."""
        for spec in self.specs:
            if (spec.kind, spec.layer) == part[:2]:
                self._numerators[spec.key].view(rows_of(spec), -1)[part[2]] = 0
        self._set_den(part, 0)
        return True

    def _check_count(self, count: int) -> None:
        if not 0 <= count <= self.settings.max_clients:
            raise ValueError(f"sums of {count} clients are past max_clients = {self.settings.max_clients}; raise it")
