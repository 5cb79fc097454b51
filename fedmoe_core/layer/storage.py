"""What an MoE layer stores: router and permitted experts, laid out in slots, and how they come and go."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fedmoe_core.layer import saved
from fedmoe_core.layer.held import FROZEN_OTHERS, STORED, Held, hold, put_in_order
from fedmoe_core.layer.lora import FACTORS, LayerLora, MergedRows, end_to_end
from fedmoe_core.layer.slots import (
    NO_ROWS,
    ExpertMask,
    OwnRows,
    check_masks,
    check_rows,
    frozen_stack,
    order_of_rows,
    slot_map_of,
    stack,
)
from fedmoe_core.layer.state import BIASES, MATRICES, STEERING, LayerState
from fedmoe_kernels.activations import width
from fedmoe_kernels.formats import format_named
from fedmoe_kernels.quantized import Quantized
from fedmoe_kernels.slot_map import SlotMap, index_beside


class ExpertStore(Held):
    """The storage of one MoE layer; ``MoE`` adds the forward.

    Storage is compact: ``w_in`` and ``w_out`` are Parameters of the trainable experts only, ``w_in_frozen`` and
    ``w_out_frozen`` buffers of the other permitted ones, and an absent expert has no byte here. ``router`` is a
    Parameter with the rows of the trainable experts, ``router_rest`` a buffer with all other rows. The whole router is
    kept because it is small, and with it the demand for absent experts stays measurable. A frozen or absent expert can
    have neither gradient nor optimizer state, whatever the optimizer (invariant 5).

    A Parameter has at least one row. Where nothing would be in it, the name is a buffer of no rows: gradient norms, DDP
    and FSDP fail on Parameters without rows. Where the trainable experts stay the same, so do the Parameter objects,
    and an optimizer goes on with them. Where they change, make the optimizer again: it holds the old objects.

    Biases of experts (``bias_in``, ``bias_out``) are stored as their matrices are, and that of the router
    (``router_bias``) as its rows are. ``correction_bias`` is a buffer.

    With adapters (a ``LayerState`` that has ``lora``) the experts themselves are frozen: ``w_in`` and ``w_out`` have no
    row, and the frozen buffers hold every slot. ``a_in``, ``b_in``, ``a_out``, ``b_out`` are Parameters of the
    trainable experts' factors. The adapter of an expert that does not train is merged into its weights; where those
    are held in few bits, which would round it away, its factors are buffers (``a_in_frozen``, ...).

    Args:
        hidden_size, intermediate_size, num_experts, activation, train_router, frozen_format, rows_per_slot: as ``MoE``.
        biases: names of the biases that the layer has.
    """

    w_in: Tensor
    w_out: Tensor
    bias_in: Tensor | None
    bias_out: Tensor | None
    router: Tensor
    router_bias: Tensor | None
    correction_bias: Tensor | None
    w_in_frozen: Tensor
    w_out_frozen: Tensor
    w_in_scale: Tensor | None
    w_out_scale: Tensor | None
    w_in_whole: Tensor | None
    w_out_whole: Tensor | None
    router_rest: Tensor
    a_in: Tensor | None
    b_in: Tensor | None
    a_out: Tensor | None
    b_out: Tensor | None
    a_in_frozen: Tensor | None
    lora_scale: float | None
    trainable_experts: tuple[int, ...]
    frozen_experts: tuple[int, ...]
    _host_map: SlotMap
    _slot_map: SlotMap
    _host_order: Tensor | None
    _row_of_expert: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: str,
        train_router: bool,
        frozen_format: str | None,
        rows_per_slot: int | None,
        biases: Collection[str],
    ) -> None:
        super().__init__()
        self.hidden_size, self.intermediate_size, self.num_experts = hidden_size, intermediate_size, num_experts
        self.activation, self.train_router = activation, train_router
        self.frozen_format, self.rows_per_slot = frozen_format, rows_per_slot
        self._slotted = (*MATRICES, *(name for name in BIASES if name in biases))
        self._steering = tuple(name for name in STEERING if name == "router" or name in biases)
        self._corrected = "correction_bias" in biases
        for name in (*STORED, *FROZEN_OTHERS, *(f"{name}_rest" for name in STEERING), "correction_bias"):
            self.register_buffer(name, None)
        for name in (*BIASES, "router_bias", *FACTORS):
            self.register_parameter(name, None)
        self.lora_scale = None
        self.trainable_experts = self.frozen_experts = ()
        if frozen_format is not None:
            form = format_named(frozen_format)
            form.block_of(self.width, hidden_size), form.block_of(hidden_size, intermediate_size)

    @property
    def width(self) -> int:
        """F, the rows of a ``w_in``."""
        return width(self.activation, self.intermediate_size)

    def router_EH(self) -> Tensor:
        """Return the whole router in expert order, (E, H); gradients reach the trainable rows only."""
        return self._in_order("router")

    def router_bias_E(self) -> Tensor | None:
        """Return the router's whole bias in expert order, (E,), as ``router_EH``; None where it has none."""
        return None if self.router_bias is None else self._in_order("router_bias")

    def _in_order(self, name: str) -> Tensor:
        learning, rest = getattr(self, name), getattr(self, f"{name}_rest")
        # FSDP casts parameters and no buffers, so the two may differ in dtype; the one that has rows says which.
        learning, rest = (learning, rest.to(learning.dtype)) if len(learning) else (learning.to(rest.dtype), rest)
        rows = torch.cat([learning, rest])
        if self._host_order is None:
            return rows
        where = self._row_of_expert
        if where is None or where.device != rows.device or type(where) is not Tensor:
            where = index_beside(self._host_order, rows)
            if type(where) is Tensor:  # once: a copy at every call would wait for the device
                self._row_of_expert = where
        return rows[where]

    @property
    def device(self) -> torch.device:
        """Where the weights are; the router has rows in every layer."""
        return (self.router if len(self.router) else self.router_rest).device

    @property
    def slot_map(self) -> SlotMap:
        """Expert id to slot, on the device of the weights."""
        like = self.router if len(self.router) else self.router_rest
        held = self._slot_map
        if held.slot_of_expert.device != like.device or isinstance(like, FakeTensor):
            held = self._host_map.beside(like)
            if not isinstance(like, FakeTensor):
                self._slot_map = held
        return held

    @property
    def experts(self) -> tuple[int, ...]:
        """Expert id of every slot: the trainable ones first, ascending id within each part."""
        return self.trainable_experts + self.frozen_experts

    @property
    def names(self) -> tuple[str, ...]:
        """What the tensors of this layer are called in a state; factors of adapters are not among them."""
        return (*self._steering, *self._slotted, *["correction_bias"] * self._corrected)

    @property
    def slot_names(self) -> tuple[str, ...]:
        """What the tensors of this layer are called that have a row for each slot: matrices and their biases."""
        return self._slotted

    def shapes(self, count: int) -> dict[str, tuple[int, ...]]:
        """Return the shape that each tensor of this layer has in a state of so many experts, by name."""
        shapes: dict[str, tuple[int, ...]] = {
            "router": (self.num_experts, self.hidden_size),
            "router_bias": (self.num_experts,),
            "w_in": (count, self.width, self.hidden_size),
            "w_out": (count, self.hidden_size, self.intermediate_size),
            "bias_in": (count, self.width),
            "bias_out": (count, self.hidden_size),
            "correction_bias": (self.num_experts,),
        }
        return {name: shapes[name] for name in self.names}

    def load_global(
        self,
        state: LayerState,
        *,
        permitted: ExpertMask | None = None,
        trainable: ExpertMask | None = None,
        rows: OwnRows | None = None,
        alias: np.ndarray | None = None,
    ) -> None:
        """Become a sub-layer of ``state``: copies of the permitted experts, never views.

        Args:
            state: the layer in global coordinates; it must hold the permitted experts. Where it has adapters, they
                train instead of the experts.
            permitted, trainable: as the constructor.
            rows: rows instead of the state's own, by a tensor's or a factor's name and expert id.
            alias: int (E,), the held expert whose slot serves an absent one, -1 = none; see ``SlotMap.shared``.

        Where the trainable experts change, their Parameters are new objects. Make the optimizer again then. Where they
        stay, the Parameters do, too, and lose their gradients.

        Raises:
            ValueError: as the constructor; a tensor that this layer does not have, or lacks, or of another shape; a row
                of another shape or of an expert that is not held; a bad alias.
        """
        self._install(*self.check_masks(permitted, trainable), state, own=rows or {}, alias=alias)

    def set_experts(
        self, permitted: ExpertMask | None, trainable: ExpertMask | None = None, *, source: LayerState | None = None
    ) -> None:
        """Change which experts are held and trained; what stays keeps its bits, and so does the router.

        Args:
            permitted, trainable: as the constructor.
            source: where experts that are new here come from; it may hold any experts, its router is not read.

        Where the trainable experts change, their Parameters are new objects. Make the optimizer again then.

        Raises:
            ValueError: an expert is new and ``source`` does not hold it, or the layer has adapters.
        """
        if self.lora_scale is not None:
            raise ValueError("a layer with adapters has merged some of them; change its experts by load_global")
        self._install(*self.check_masks(permitted, trainable), source, keep=True)

    def global_state(self) -> LayerState:
        """Return copies of the router and of the held experts, in ascending expert id.

        Raises:
            ValueError: the adapter of a frozen expert is merged into it and cannot be told apart any more.
        """
        if self.lora_scale is not None and self.frozen_experts and self.a_in_frozen is None:
            raise ValueError("frozen experts of this layer have merged their adapters; let all train to read them back")
        order = sorted(range(len(self.experts)), key=self.experts.__getitem__)
        with torch.no_grad():
            found = {name: torch.stack([self._rows(name)[b] for b in order]) for name in self._slotted}
            found |= {name: self._in_order(name).detach().clone() for name in self._steering}
            if self.correction_bias is not None:
                found["correction_bias"] = self.correction_bias.clone()
            lora = None
            if self.lora_scale is not None:
                lora = LayerLora.of({name: self._factor(name)[order].detach() for name in FACTORS}, self.lora_scale)
            return LayerState.of(found, experts=tuple(sorted(self.experts)), lora=lora)

    def trained_state(self) -> dict[str, Tensor]:
        """Return detached views of what trains here, rows in ascending expert id; empty where no expert trains."""
        if not self.trainable_experts:
            return {}
        names = self._slotted if self.lora_scale is None else FACTORS
        names = (*self._steering, *names) if self.train_router else names
        return {name: getattr(self, name).detach() for name in names}

    def check_masks(self, permitted: ExpertMask | None, trainable: ExpertMask | None) -> tuple[np.ndarray, np.ndarray]:
        """Return numpy bool (E,) masks of the permitted and of the trainable experts, None filled in.

        Raises:
            ValueError: an empty permitted set, or masks of the wrong shape, kind or inclusion.
        """
        return check_masks(permitted, trainable, self.num_experts)

    def facts(self) -> dict[str, Any]:
        """Return what a state dict says beside its tensors: JSON values by name."""
        return {
            "trainable": list(self.trainable_experts),
            "frozen": list(self.frozen_experts),
            "activation": self.activation,
            "frozen_format": self.frozen_format,
            "lora_scale": self.lora_scale,
        }

    def take_over(self, facts: saved.Facts) -> None:
        """Take the scale of the adapters over from a state dict."""
        self.lora_scale = facts.get("lora_scale", self.lora_scale)

    def _install(
        self,
        held: np.ndarray,
        trains: np.ndarray,
        source: LayerState | None,
        *,
        keep: bool = False,
        own: OwnRows = NO_ROWS,
        alias: np.ndarray | None = None,
    ) -> None:
        """Lay the experts out in slots. With ``keep``, what this layer has wins over ``source``; ``own`` over both."""
        slot_map = slot_map_of(held, trains, alias, rows_per_slot=self.rows_per_slot)
        trainable = tuple(np.flatnonzero(trains).tolist())
        frozen = tuple(np.flatnonzero(held & ~trains).tolist())
        self._require(trainable, frozen, source, keep=keep)
        lora = None if source is None else source.lora
        if source is not None:
            source.check(self.shapes(len(source.experts)))
            like = {name: getattr(source, name) for name in (*self._steering, *self._slotted)}
            check_rows(own, like if lora is None else like | lora.factors, held)
            lora = None if lora is None else lora.with_rows(own)
        # Adapters train instead of the experts, which then lie in the frozen stack, still the trainable ones first.
        learning, stored = (trainable, frozen) if lora is None else ((), trainable + frozen)
        with torch.no_grad():
            steering = {name: self._in_order(name) if keep else getattr(source, name) for name in self._steering}
            for name in self._slotted:
                like_B = getattr(self if keep else source, name)
                rows, codes = self._collect(name, source, own, keep=keep)
                matrix = name in MATRICES
                merging = lora is not None and matrix and self.frozen_format is None
                whole = MergedRows(rows, lora, name, frozenset(frozen)) if merging and lora is not None else rows
                # What stays in its place needs no copy; under adapters it is the factors that train.
                if not (keep and learning and learning == self.trainable_experts):
                    hold(self, name, stack(whole, learning, like_B), same=learning == self.trainable_experts)
                form = self.frozen_format if matrix else None
                self._keep(name, frozen_stack(whole, codes, stored, frozen_format=form, like=like_B))
            self._install_factors(lora, trainable, () if self.frozen_format is None else frozen)
            self._steer(steering, own, trainable, keep=keep)
            if not keep and self._corrected:
                self.correction_bias = cast(Tensor, cast(LayerState, source).correction_bias).clone()
        self.trainable_experts, self.frozen_experts = trainable, frozen
        self._host_map = self._slot_map = slot_map
        put_in_order(self)
        self._installed()

    def _require(
        self, trainable: tuple[int, ...], frozen: tuple[int, ...], source: LayerState | None, *, keep: bool
    ) -> None:
        """Every expert has to come from somewhere, and one that trains not from few bits."""
        have, offered = self.experts if keep else (), () if source is None else source.experts
        missing = [e for e in trainable + frozen if e not in have and e not in offered]
        if missing:
            raise ValueError(f"expert {missing[0]} is new to this layer; pass a source that holds its weights")
        coded = self.frozen_experts if keep and self.frozen_format else ()
        lossy = [e for e in trainable if e in coded and e not in offered]
        if lossy:
            raise ValueError(f"expert {lossy[0]} is held as {self.frozen_format}; pass a source to train it from")

    def _collect(
        self, name: str, source: LayerState | None, own: OwnRows, *, keep: bool
    ) -> tuple[dict[int, Tensor], dict[int, Quantized]]:
        """Return a matrix of every expert that is at hand, and the codes of those held in few bits."""
        rows = {} if source is None else dict(zip(source.experts, getattr(source, name), strict=True))
        codes: dict[int, Quantized] = {}
        if keep:
            rows |= dict(zip(self.trainable_experts, getattr(self, name), strict=True))
            stored = self._frozen(name)
            if isinstance(stored, Quantized) and self.frozen_format:
                codes = {expert: stored[slot] for slot, expert in enumerate(self.frozen_experts)}
            elif isinstance(stored, Tensor):
                rows |= dict(zip(self.frozen_experts, stored, strict=True))
        return rows | dict(own.get(name, {})), codes

    def _steer(self, steering: Mapping[str, Tensor], own: OwnRows, trainable: tuple[int, ...], *, keep: bool) -> None:
        """Part the router, and its bias, into the rows that learn and the rest."""
        steered = trainable if self.train_router else ()
        rest = tuple(e for e in range(self.num_experts) if e not in steered)
        for name, whole in steering.items():
            rows = dict(enumerate(whole)) | dict(own.get(name, {}))
            learning = stack(rows, steered, whole)
            stays = trainable == self.trainable_experts
            if not (keep and stays and len(learning) == len(getattr(self, name)) > 0):
                hold(self, name, learning, same=stays)
            setattr(self, f"{name}_rest", stack(rows, rest, whole))
        self._host_order = order_of_rows(steered + rest)
        self._row_of_expert = None

    def _install_factors(self, lora: LayerLora | None, trainable: tuple[int, ...], kept: tuple[int, ...]) -> None:
        same = trainable == self.trainable_experts and self.lora_scale is not None
        self.lora_scale = None if lora is None else lora.scale
        for name in FACTORS:
            factor = None if lora is None else getattr(lora, name)
            hold(self, name, None if factor is None else stack(factor, trainable, factor), same=same)
            setattr(self, f"{name}_frozen", None if factor is None or not kept else stack(factor, kept, factor))

    def _factor(self, name: str) -> Tensor:
        """A factor of the trainable slots, and of the frozen ones where it is not merged into their weights."""
        return end_to_end(getattr(self, name), getattr(self, f"{name}_frozen"))

    def _installed(self) -> None:
        """Called whenever the experts have changed."""
