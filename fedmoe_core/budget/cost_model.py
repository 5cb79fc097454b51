"""The cost model: memory, traffic and arithmetic of one client's round, from a model's sizes and one dry step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedmoe_core.budget.additive import AdditiveCosts
from fedmoe_core.budget.limits import Cost
from fedmoe_core.budget.trunk_cost import UNMEASURED, TrunkCost

# compact: only permitted experts are stored and run. backward-masked: all are, and only trainable ones get gradients.
Mode = Literal["compact", "backward-masked"]


@dataclass(frozen=True)
class CostModel:
    """Closed-form cost of a client's round [E]: bytes and floating-point operations.

    An expert has P = H * I_in + I * H weights (I_in = 2I where gated), and I_in + H biases where it has any. Held: all
    of them. Trainable: gradient and optimizer state in addition (fp32 AdamW: 16 bytes a parameter in all). LoRA
    experts: the base stays frozen and r * (d_in + d_out) adapter parameters per matrix train instead. Arithmetic per
    row: 2P forward, 2P input gradient, 2P weight gradient, so 6P trainable and 4P frozen (the bound of a frozen expert
    on the path of a gradient). Element-wise work (activation, biases, optimizer, scores) is not counted: it is
    O(P + rows * I), not O(rows * P).

    Attributes:
        num_layers, num_experts, top_k, hidden_size, intermediate_size, gated: sizes of the MoE layers.
        tokens: tokens of one local step, batch x sequence, padding included.
        trunk_params, trunk_trainable: parameters that are neither expert nor router, and how many of them train.
        trunk: measured terms.
        expert_bias, router_bias: whether experts have biases, and router rows one. They count as bytes; what they add
            to the arithmetic is element-wise.
        weight_bytes: bytes per weight of trunk, router, adapters and (without ``base_bytes``) experts, stored and sent.
        base_bytes: bytes per expert weight under LoRA where it is stored in few bits, scales included (a little over
            0.5 for 4 bits); None = as it is. Few bits would round a merged adapter away, so frozen experts keep theirs.
        grad_bytes, optimizer_bytes: bytes per trainable parameter (AdamW: two fp32 moments).
        lora_rank: rank of the experts' adapters; None = the experts themselves train.
        base_experts: experts of the blocks that these layers are grafted on; resident, so they count as held.
        train_router: whether the router rows of trainable experts train.
        router_travels: whether routers are sent at all; False where each client keeps its own gate.
        anchored: whether a copy of what trains, as it was received, is kept too (FedProx).
        adapters_travel: whether adapters are sent to the client; False where it makes them itself.
        experts_return: whether trained experts, or their adapters, are sent back.
        chosen_per_batch, chosen_in_round: most experts that learn from one batch and in one round, where every batch
            chooses its own; then a step has a scoring pass before it.
        aux_tables: (tokens, experts) float32 tables per layer that an auxiliary router loss keeps alive.
        slot_bytes: index, offset and score storage per held expert.
    """

    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    tokens: int
    trunk_params: int = 0
    trunk_trainable: int = 0
    trunk: TrunkCost = UNMEASURED
    gated: bool = True
    expert_bias: bool = False
    router_bias: bool = False
    weight_bytes: int = 4
    base_bytes: float | None = None
    grad_bytes: int = 4
    optimizer_bytes: int = 8
    lora_rank: int | None = None
    base_experts: int = 0
    train_router: bool = True
    router_travels: bool = True
    adapters_travel: bool = True
    experts_return: bool = True
    anchored: bool = False
    chosen_per_batch: int | None = None
    chosen_in_round: int | None = None
    aux_tables: int = 0
    slot_bytes: int = 64

    def __post_init__(self) -> None:
        if self.num_layers and not 1 <= self.top_k <= self.num_experts:  # without MoE layers, all is trunk
            raise ValueError(f"top_k={self.top_k} is outside 1..{self.num_experts}, the number of experts per layer")
        bad = [stages for stages in self.trunk.transients.values() if len(stages) not in (1, self.num_layers + 1)]
        if bad:
            raise ValueError(f"a dry step has {len(bad[0])} stages; give 1 or {self.num_layers + 1} (MoE layers + 1)")

    @property
    def total_experts(self) -> int:
        """Experts of the whole model, L * E."""
        return self.num_layers * self.num_experts

    @property
    def expert_weights(self) -> int:
        """Weights of one expert's matrices: what is multiplied by, and what a format of few bits stores."""
        return self.hidden_size * self._width_in + self.intermediate_size * self.hidden_size

    @property
    def expert_params(self) -> int:
        """Parameters of one expert, without adapters."""
        return self.expert_weights + (self._width_in + self.hidden_size) * self.expert_bias

    @property
    def router_bytes(self) -> int:
        """Memory of all routers of the model, as they are sent."""
        return self.total_experts * (self.hidden_size + self.router_bias) * self.weight_bytes

    @property
    def adapter_params(self) -> int:
        """LoRA parameters of one expert; 0 without LoRA."""
        rank = self.lora_rank or 0
        return rank * (self.hidden_size + self._width_in) + rank * (self.intermediate_size + self.hidden_size)

    @property
    def trained_params(self) -> int:
        """Parameters of one trainable expert that get a gradient, without its router row."""
        return self.expert_params if self.lora_rank is None else self.adapter_params

    @property
    def _width_in(self) -> int:
        return (2 if self.gated else 1) * self.intermediate_size

    @property
    def _router_row(self) -> int:
        """Trainable router parameters per trainable expert."""
        return (self.hidden_size + self.router_bias) * self.train_router

    @property
    def _base_expert(self) -> int:
        """Bytes of one expert's weights without adapters."""
        per_weight = self.weight_bytes if self.base_bytes is None else self.base_bytes
        biases = self.expert_params - self.expert_weights
        return math.ceil(self.expert_weights * per_weight) + biases * self.weight_bytes

    @property
    def held_bytes(self) -> int:
        """Memory of one expert's weights, adapters included."""
        return self._base_expert + self.slot_bytes + self.adapter_params * self.weight_bytes

    @property
    def frozen_bytes(self) -> int:
        """Memory of one expert that only runs: its adapter is merged into its weights, or beside them in few bits.

        One that is not merged is laid beside those that train at every call, and its gradient is made with theirs.
        """
        apart = 0 if self.base_bytes is None else self.adapter_params * (2 * self.weight_bytes + self.grad_bytes)
        return self._base_expert + self.slot_bytes + apart

    @property
    def _laid_bytes(self) -> int:
        """Copy of a trainable expert's adapter in a layer where others only run, beside theirs."""
        return 0 if self.base_bytes is None else self.adapter_params * self.weight_bytes

    @property
    def gradient_bytes(self) -> int:
        """Memory of the gradients of one trainable expert and of its router row."""
        return (self.trained_params + self._router_row) * self.grad_bytes

    @property
    def state_bytes(self) -> int:
        """Memory of the optimizer state, and of the anchor, of one trainable expert and of its router row."""
        return (self.trained_params + self._router_row) * self.kept_bytes

    @property
    def kept_bytes(self) -> int:
        """Return the bytes per trainable parameter that stay between two steps, in addition to its weight."""
        return self.optimizer_bytes + self.anchored * self.weight_bytes

    @property
    def resident_bytes(self) -> int:
        """Memory that is there whatever experts are held: trunk, its optimizer state, the whole router, buffers."""
        weights = self.trunk_params * self.weight_bytes + self.router_bytes
        aux = self.aux_tables * self.tokens * self.total_experts * 4
        return weights + self.trunk_trainable * self.kept_bytes + self.trunk.buffer_bytes + aux

    def memory(self, permitted_LE: np.ndarray, trainable_LE: np.ndarray, *, top_k: int | None = None) -> int:
        """Return the peak bytes of a local step from the second on (optimizer state exists): its largest stage."""
        if self.chosen_per_batch is not None:
            return self._rescheduled_memory(permitted_LE, top_k=top_k)
        rows = self.rows("compact", top_k=top_k)
        frozen = int((permitted_LE & ~trainable_LE).sum())
        memory_D = rows.base_D + (rows.costs_DLE * trainable_LE).sum(axis=(1, 2)) + frozen * rows.frozen_D
        beside_LE = trainable_LE & (permitted_LE & ~trainable_LE).any(axis=1, keepdims=True)
        laid = int(beside_LE.sum()) * self._laid_bytes
        return laid + int(max(memory for name, memory in zip(rows.names, memory_D, strict=True) if name == "memory"))

    def bytes_down(
        self, permitted_LE: np.ndarray, *, first_participation: bool = True, cached_LE: np.ndarray | None = None
    ) -> int:
        """Return bytes to the client: permitted experts, the whole router, the trunk (all at first, then what trains).

        ``cached_LE``: experts whose frozen LoRA base the client still has; only their adapters travel.
        """
        new_LE = permitted_LE if cached_LE is None or self.lora_rank is None else permitted_LE & ~cached_LE
        adapters = int(permitted_LE.sum()) * self._adapter_down
        return int(new_LE.sum()) * self._base_expert + adapters + self._base_down(first_participation)

    def bytes_up(self, trainable_LE: np.ndarray) -> int:
        """Return bytes from the client: deltas of trainable experts and router rows, statistics, a trained trunk."""
        count = int(trainable_LE.sum())
        return min(count, self.chosen_in_round or count) * self._expert_up + self._base_up

    def step_flops(self, permitted_LE: np.ndarray, trainable_LE: np.ndarray, *, top_k: int | None = None) -> float:
        """Return the most operations that one local step can need, over every routing of its tokens.

        A token's k' rows go to different experts, so a layer sees at most T * min(k', held) rows, of which at most
        T * min(k', trainable) meet a trainable expert.
        """
        k = self.top_k if top_k is None else top_k
        rows_L = self.tokens * np.minimum(k, permitted_LE.sum(axis=1))
        trained = float(self.tokens * np.minimum(k, trainable_LE.sum(axis=1)).sum())
        scoring = 0.0
        if self.chosen_per_batch is not None:
            trained = min(trained, float(self.tokens * self.chosen_per_batch))
            scoring = self.forward_flops(permitted_LE, tokens=self.tokens, top_k=top_k)
        return self._flops(trained, float(rows_L.sum()) - trained, self.tokens) + scoring

    def real_flops(self, rows_LE: np.ndarray, trainable_LE: np.ndarray, *, tokens: int) -> float:
        """Return the operations of a local step in which each expert had ``rows_LE`` rows; never above ``step_flops``.

        Pure, so that a client can add it up step by step and stop before the step that would pass its budget.
        """
        trained = float(rows_LE[trainable_LE].sum())
        return self._flops(trained, float(rows_LE.sum()) - trained, tokens)

    def forward_flops(self, served_LE: np.ndarray, *, tokens: int, top_k: int | None = None) -> float:
        """Return the most operations of a pass without gradients: 2P a row, the routers, and the trunk's forward.

        Args:
            served_LE: experts that a token may choose, bool (L, E).
            tokens: padding included.
            top_k: choices per token; None = the model's own.
        """
        k = self.top_k if top_k is None else top_k
        rows = float(tokens * np.minimum(k, served_LE.sum(axis=1)).sum())
        routers = 2.0 * self.total_experts * self.hidden_size
        expert = 2.0 * (self.expert_weights + self.adapter_params)
        return rows * expert + tokens * (routers + self.trunk.forward_flops_per_token)

    def forward_memory(self, held_LE: np.ndarray, *, top_k: int | None = None) -> int:
        """Bound the peak of a pass without gradients over batches of the training shape, ``held_LE`` experts held.

        Of a training step it has the weights and, at most, what lives while the forward and the loss run.
        """
        transient = max(self.trunk.stages(self.top_k if top_k is None else top_k)[0], 0)
        return self.resident_bytes + int(held_LE.sum()) * self.held_bytes + transient

    def predict(
        self,
        permitted_LE: np.ndarray,
        trainable_LE: np.ndarray,
        *,
        local_steps: int,
        top_k: int | None = None,
        first_participation: bool = True,
        cached_LE: np.ndarray | None = None,
        mode: Mode = "compact",
    ) -> Cost:
        """Predict a round's cost. ``experts`` counts permitted (compact) or trainable experts (backward-masked)."""
        counted_LE = permitted_LE if mode == "compact" else trainable_LE
        return Cost(
            memory_bytes=self.memory(permitted_LE, trainable_LE, top_k=top_k),
            flops=local_steps * self.step_flops(permitted_LE, trainable_LE, top_k=top_k),
            bytes_down=self.bytes_down(permitted_LE, first_participation=first_participation, cached_LE=cached_LE),
            bytes_up=self.bytes_up(trainable_LE),
            experts=self.base_experts + (self.chosen_per_batch or int(counted_LE.sum())),
        )

    def rows(self, mode: Mode, *, top_k: int | None = None, first_participation: bool = True) -> AdditiveCosts:
        """Return the additive resources of a plan in which every chosen expert trains.

        In compact mode an expert that is not chosen does not exist; in backward-masked mode it is held and frozen,
        so holding all experts is part of the base and choosing one costs its gradient and optimizer state.
        """
        stages = self.trunk.stages(self.top_k if top_k is None else top_k)
        shape = (self.num_layers, self.num_experts)
        compact = mode == "compact"
        moved = 0 if compact else self._laid_bytes - self.frozen_bytes
        held = np.full(shape, self.held_bytes + moved + self.state_bytes)
        base = self.resident_bytes + (0 if compact else self.total_experts * self.frozen_bytes)
        resident_LE = np.full(shape, not compact)
        expert_down = self._base_expert + self._adapter_down
        base_down = self.bytes_down(resident_LE, first_participation=first_participation)
        step = base + self.trunk_trainable * self.grad_bytes + self.trunk.step_bytes
        entries = [("memory", step, held + self.gradient_bytes)]
        entries += [
            ("memory", base + transient, held + self.gradients(stage, of=len(stages)))
            for stage, transient in enumerate(stages)
        ]
        entries.append(("down", base_down, np.full(shape, expert_down if compact else 0)))
        entries.append(("up", self._base_up, np.full(shape, self._expert_up)))
        entries.append(("experts", self.base_experts, np.ones(shape, int)))
        names, bases, costs = zip(*entries, strict=True)
        # In backward-masked mode the frozen are all there already, and an expert budget counts those that train.
        frozen = {"memory": self.frozen_bytes, "down": expert_down, "up": 0, "experts": 1}
        frozen_D = np.array([frozen[name] * compact for name in names], dtype=np.int64)
        return AdditiveCosts(names, np.array(bases, dtype=np.int64), np.stack(costs).astype(np.int64), frozen_D)

    def _rescheduled_memory(self, permitted_LE: np.ndarray, *, top_k: int | None) -> int:
        """Return the peak bytes where every batch re-chooses its experts.

        Optimizer state is counted for every expert that ever learnt, gradients only for the current ones. It is a
        bound: every batch is taken to choose other experts, and in the layers that are reached first.
        """
        stages = self.trunk.stages(self.top_k if top_k is None else top_k)
        chosen, ever = self.chosen_per_batch or 0, self.chosen_in_round or 0
        resident = self.resident_bytes + int(permitted_LE.sum()) * self.held_bytes + ever * self.state_bytes
        of = len(stages)
        reached = [self.num_layers if of == 1 else stage for stage in range(of)]
        gradients = [self.gradient_bytes * min(chosen, self.num_experts * layers) for layers in reached]
        peaks = [transient + gradient for transient, gradient in zip(stages, gradients, strict=True)]
        step = chosen * self.gradient_bytes + self.trunk_trainable * self.grad_bytes + self.trunk.step_bytes
        layout = self.num_experts * self.held_bytes + self.router_bytes // self.num_layers  # a layer laid out again
        return resident + max(step, layout, *peaks)

    def gradients(self, stage: int, *, of: int, at_least: bool = False) -> np.ndarray:
        """Return bytes of gradients (L, 1) that a trainable expert of each layer adds in a stage.

        Where one stage stands for the whole step, all gradients are taken to exist at its peak. ``at_least``: what is
        sure to exist then; of the layer that runs its router's rows get theirs after the experts.
        """
        layer_L1 = np.arange(self.num_layers)[:, None]
        copies = self.trunk.gradient_copies
        if of == 1:
            return np.full_like(layer_L1, self.gradient_bytes * (1 + copies))
        running = self.num_layers - stage
        late = self._router_row * self.grad_bytes * at_least
        return self.gradient_bytes * (layer_L1 >= running) + (copies * self.gradient_bytes - late) * (
            layer_L1 == running
        )

    @property
    def _adapter_down(self) -> int:
        return self.adapter_params * self.weight_bytes * self.adapters_travel

    @property
    def _expert_up(self) -> int:
        params = self.trained_params * self.experts_return + self._router_row * self.router_travels
        return params * self.weight_bytes

    @property
    def _base_up(self) -> int:
        # Beside the profile, ClientUpdate has 2 float64 per expert.
        return self.profile_bytes + 2 * 8 * self.total_experts + self.trunk_trainable * self.weight_bytes

    @property
    def profile_bytes(self) -> int:
        """A ClientProfile on the wire: 10 float64 and a bool per expert, 2 float64 per layer."""
        return self.total_experts * (10 * 8 + 1) + self.num_layers * 2 * 8

    def _base_down(self, first_participation: bool) -> int:
        trunk = self.trunk_params if first_participation else self.trunk_trainable
        return self.router_bytes * self.router_travels + trunk * self.weight_bytes

    @property
    def router_flops_per_token(self) -> float:
        """Operations of all routers, forward and backward, per token of a training step."""
        return float((6 if self.train_router else 4) * self.total_experts * self.hidden_size)

    def _flops(self, trained_rows: float, frozen_rows: float, tokens: int) -> float:
        through = 4 * (self.expert_weights + self.adapter_params)
        learning = 2 * (self.expert_weights if self.lora_rank is None else self.adapter_params)
        expert = trained_rows * (through + learning) + frozen_rows * through
        return expert + tokens * (self.router_flops_per_token + self.trunk.flops_per_token)
