"""What an MoE layer stores: router and permitted experts, laid out in slots, and how they come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from fedmoe_core.layer.lora import FACTORS, LayerLora
from fedmoe_core.layer.slots import NO_ROWS, OwnRows, check_rows, frozen_stack, slot_map_of, stack
from fedmoe_kernels.formats import format_named
from fedmoe_kernels.quantized import Quantized
from fedmoe_kernels.slot_map import SlotMap

ExpertMask = Tensor | np.ndarray | Sequence[bool]  # bool (E,)
_STORED = tuple(f"w_{end}_{part}" for end in ("in", "out") for part in ("frozen", "scale", "whole"))
GATED = ("swiglu", "geglu", "swiglu_oai")  # activations whose w_in is [gate; up]


@dataclass(frozen=True)
class LayerState:
    """The weights of some experts of one MoE layer, in global coordinates.

    Attributes:
        experts: expert ids, ascending; place i of ``w_in`` and ``w_out`` is expert ``experts[i]``.
        router: (E, H), always of all experts.
        w_in: (len(experts), 2I, H) for gated activations [gate; up], (len(experts), I, H) else.
        w_out: (len(experts), H, I).
        lora: adapters over them, rows in the same order; None = none.
    """

    experts: tuple[int, ...]
    router: Tensor
    w_in: Tensor
    w_out: Tensor
    lora: LayerLora | None = None


class _Merged(Mapping[int, Tensor]):
    """OwnRows of a matrix, those of ``merged`` experts with their adapters; made on reading, one by one."""

    def __init__(self, rows: Mapping[int, Tensor], lora: LayerLora, name: str, merged: frozenset[int]) -> None:
        self.rows, self.lora, self.name, self.merged = rows, lora, name, merged

    def __getitem__(self, expert: int) -> Tensor:
        row = self.rows[expert]
        return row + self.lora.change(self.name, expert) if expert in self.merged else row

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


class ExpertStore(nn.Module):
    """The storage of one MoE layer; ``MoE`` adds the forward.

    Storage is compact: ``w_in`` and ``w_out`` are Parameters of the trainable experts only, ``w_in_frozen`` and
    ``w_out_frozen`` buffers of the other permitted ones, and an absent expert has no byte here. ``router`` is a
    Parameter with the rows of the trainable experts, ``router_rest`` a buffer with all other rows. The whole router is
    kept because it is small, and with it the demand for absent experts stays measurable. A frozen or absent expert can
    have neither gradient nor optimizer state, whatever the optimizer (invariant 5).

    With adapters (``load_global(lora=...)``) the experts themselves are frozen: ``w_in`` and ``w_out`` have no row, and
    the frozen buffers hold every slot. ``a_in``, ``b_in``, ``a_out``, ``b_out`` are Parameters of the trainable
    experts' factors. The adapter of an expert that does not train is merged into its weights.

    Args:
        hidden_size, intermediate_size, num_experts, activation, train_router, frozen_format, rows_per_slot: as ``MoE``.
    """

    w_in: nn.Parameter
    w_out: nn.Parameter
    router: nn.Parameter
    w_in_frozen: Tensor
    w_out_frozen: Tensor
    w_in_scale: Tensor | None
    w_out_scale: Tensor | None
    w_in_whole: Tensor | None
    w_out_whole: Tensor | None
    router_rest: Tensor
    a_in: nn.Parameter | None
    b_in: nn.Parameter | None
    a_out: nn.Parameter | None
    b_out: nn.Parameter | None
    lora_scale: float | None
    trainable_experts: tuple[int, ...]
    frozen_experts: tuple[int, ...]
    _slot_map: SlotMap
    _row_of_expert: Tensor

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
    ) -> None:
        super().__init__()
        self.hidden_size, self.intermediate_size, self.num_experts = hidden_size, intermediate_size, num_experts
        self.activation, self.train_router = activation, train_router
        self.frozen_format, self.rows_per_slot = frozen_format, rows_per_slot
        for name in (*_STORED, "router_rest"):
            self.register_buffer(name, None)
        for name in FACTORS:
            self.register_parameter(name, None)
        self.lora_scale = None
        if frozen_format is not None:
            form = format_named(frozen_format)
            form.block_of(self.width, hidden_size), form.block_of(hidden_size, intermediate_size)

    @property
    def width(self) -> int:
        """F, the rows of a ``w_in``."""
        return self.intermediate_size * (2 if self.activation in GATED else 1)

    def router_EH(self) -> Tensor:
        """Return the whole router in expert order, (E, H); gradients reach the trainable rows only."""
        rows = torch.cat([self.router, self.router_rest])
        if self._router_in_order:
            return rows
        if self._row_of_expert.device != rows.device:  # once: a copy at every call would wait for the device
            self._row_of_expert = self._row_of_expert.to(rows.device)
        return rows[self._row_of_expert]

    @property
    def slot_map(self) -> SlotMap:
        """Expert id to slot, on the device of the weights."""
        if self._slot_map.slot_of_expert.device != self.w_in.device:
            self._slot_map = self._slot_map.to(self.w_in.device)
        return self._slot_map

    @property
    def experts(self) -> tuple[int, ...]:
        """Expert id of every slot: the trainable ones first, ascending id within each part."""
        return self.trainable_experts + self.frozen_experts

    def load_global(
        self,
        router: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        *,
        permitted: ExpertMask | None = None,
        trainable: ExpertMask | None = None,
        rows: OwnRows | None = None,
        alias: np.ndarray | None = None,
        lora: LayerLora | None = None,
    ) -> None:
        """Become the sub-layer of a whole layer's tensors (E, ...): copies of the permitted experts, never views.

        Args:
            router, w_in, w_out: the layer in global coordinates.
            permitted, trainable: as the constructor.
            rows: rows instead of those tensors' own, by "router", "w_in", "w_out" or a factor's name, and expert id.
            alias: int (E,), the held expert whose slot serves an absent one, -1 = none; see ``SlotMap.shared``.
            lora: adapters of all experts (E, ...), which then train instead of the experts.

        Raises:
            ValueError: as the constructor; a row of another shape or of an expert that is not held; a bad alias.
        """
        state = LayerState(tuple(range(self.num_experts)), router, w_in, w_out, lora)
        self._install(*self.check_masks(permitted, trainable), state, own=rows or {}, alias=alias)

    def set_experts(
        self, permitted: ExpertMask | None, trainable: ExpertMask | None = None, *, source: LayerState | None = None
    ) -> None:
        """Change which experts are held and trained; what stays keeps its bits, and so does the router.

        Args:
            permitted, trainable: as the constructor.
            source: where experts that are new here come from; it may hold any experts, its router is not read.

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
        if self.lora_scale is not None and self.frozen_experts:
            raise ValueError("frozen experts of this layer have merged their adapters; let all train to read them back")
        order = sorted(range(len(self.experts)), key=self.experts.__getitem__)
        with torch.no_grad():
            w_in, w_out = (torch.stack([self._rows(name)[b] for b in order]) for name in ("w_in", "w_out"))
            factors = {n: p.detach().clone() for n in FACTORS if (p := getattr(self, n)) is not None}
            lora = None if self.lora_scale is None else LayerLora.of(factors, self.lora_scale)
            return LayerState(tuple(sorted(self.experts)), self.router_EH().detach().clone(), w_in, w_out, lora)

    def trained_state(self) -> dict[str, Tensor]:
        """Return detached views of what trains here, rows in ascending expert id; empty where no expert trains."""
        if not self.trainable_experts:
            return {}
        names = ("w_in", "w_out") if self.lora_scale is None else FACTORS
        names = ("router", *names) if self.train_router else names
        return {name: getattr(self, name).detach() for name in names}

    def check_masks(self, permitted: ExpertMask | None, trainable: ExpertMask | None) -> tuple[np.ndarray, np.ndarray]:
        """Return numpy bool (E,) masks of the permitted and of the trainable experts, None filled in.

        Raises:
            ValueError: an empty permitted set, or masks of the wrong shape, kind or inclusion.
        """
        held = self._mask("permitted", permitted, np.ones(self.num_experts, dtype=bool))
        trains = self._mask("trainable", trainable, held)
        if not held.any():
            raise ValueError("no expert is permitted; permit at least one of every MoE layer")
        if (trains & ~held).any():
            raise ValueError(
                f"trainable expert {np.flatnonzero(trains & ~held)[0]} is not permitted; permit it or drop it"
            )
        return held, trains

    def get_extra_state(self) -> Tensor:
        """Save the experts by slot, so that a state dict cannot be read into a layer that holds others."""
        return torch.tensor([len(self.trainable_experts), *self.experts])

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse the state dict of a layer with other experts."""
        if state.tolist() != self.get_extra_state().tolist():
            raise ValueError(
                f"the state dict holds experts {state.tolist()[1:]}, this layer {list(self.experts)}; "
                "call set_experts with its permitted and trainable experts first"
            )

    def _mask(self, name: str, mask: ExpertMask | None, default: np.ndarray) -> np.ndarray:
        if mask is None:
            return default
        array = mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
        if array.dtype != np.bool_ or array.shape != (self.num_experts,):
            raise ValueError(
                f"{name} is {array.dtype} of shape {array.shape}; give a bool mask of shape ({self.num_experts},)"
            )
        return array

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
            self._check(source)
            like = {name: getattr(source, name) for name in ("router", "w_in", "w_out")}
            check_rows(own, like if lora is None else like | lora.factors, held)
            lora = None if lora is None else lora.with_rows(own)
        # Adapters train instead of the experts, which then lie in the frozen stack, still the trainable ones first.
        learning, stored = (trainable, frozen) if lora is None else ((), trainable + frozen)
        with torch.no_grad():
            router_EH = self.router_EH() if keep else cast(LayerState, source).router
            for name in ("w_in", "w_out"):
                like_B = getattr(self if keep else source, name)
                rows, codes = self._collect(name, source, own, keep=keep)
                whole = rows if lora is None else _Merged(rows, lora, name, frozenset(frozen))
                setattr(self, name, nn.Parameter(stack(whole, learning, like_B)))
                self._keep(name, frozen_stack(whole, codes, stored, frozen_format=self.frozen_format, like=like_B))
            self._install_factors(lora, trainable)
            self._steer(router_EH, own.get("router", {}), trainable)
        self.trainable_experts, self.frozen_experts = trainable, frozen
        self._slot_map = slot_map
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

    def _steer(self, router_EH: Tensor, own: Mapping[int, Tensor], trainable: tuple[int, ...]) -> None:
        """Part the router into the rows that learn and the rest."""
        steered = trainable if self.train_router else ()
        rest = tuple(e for e in range(self.num_experts) if e not in steered)
        rows = dict(enumerate(router_EH)) | dict(own)
        # Without a row it must not learn: its gradient, an empty view, would keep the whole router's alive (8 KB of
        # the demo's client, and no optimizer would ever clear it).
        self.router = nn.Parameter(stack(rows, steered, router_EH), requires_grad=bool(steered))
        self.router_rest = stack(rows, rest, router_EH)
        order = steered + rest
        self._router_in_order = order == tuple(range(self.num_experts))
        self._row_of_expert = torch.tensor(order).argsort()

    def _install_factors(self, lora: LayerLora | None, trainable: tuple[int, ...]) -> None:
        self.lora_scale = None if lora is None else lora.scale
        for name in FACTORS:
            factor = None if lora is None else getattr(lora, name)
            setattr(self, name, None if factor is None else nn.Parameter(stack(factor, trainable, factor)))

    def _installed(self) -> None:
        """Called whenever the experts have changed."""

    def _check(self, source: LayerState) -> None:
        """The shapes of a source, before anything of this layer changes."""
        want = {
            "router": (self.num_experts, self.hidden_size),
            "w_in": (len(source.experts), self.width, self.hidden_size),
            "w_out": (len(source.experts), self.hidden_size, self.intermediate_size),
        }
        for name, shape in want.items():
            if tuple(getattr(source, name).shape) != shape:
                raise ValueError(f"{name} has shape {tuple(getattr(source, name).shape)}; this layer needs {shape}")

    def _rows(self, name: str) -> list[Tensor]:
        """Every slot's weight, in slot order; views, but for those that are held in few bits."""
        trainable, frozen = getattr(self, name).detach(), self._frozen(name)
        return [*trainable, *(frozen.dequantize(trainable.dtype) if isinstance(frozen, Quantized) else frozen)]

    def _frozen(self, name: str) -> Tensor | Quantized:
        """The frozen slots of a matrix as they are stored."""
        values, scale, whole = (getattr(self, f"{name}_{part}") for part in ("frozen", "scale", "whole"))
        return values if scale is None else Quantized(values, scale, cast(str, self.frozen_format), whole)

    def _keep(self, name: str, held_as: Tensor | Quantized) -> None:
        """Store the frozen slots of a matrix."""
        parts: tuple[Tensor | None, ...]
        if isinstance(held_as, Quantized):
            parts = (held_as.codes, held_as.scale, held_as.whole)
        else:
            parts = (held_as, None, None)
        for part, value in zip(("frozen", "scale", "whole"), parts, strict=True):
            setattr(self, f"{name}_{part}", value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertStore:
        """Cast the layer, but not what quantised experts are stored in: codes may be numbers of 8 bits, too."""
        stored = {name: getattr(self, name) for name in _STORED} if self.frozen_format else {}
        super()._apply(fn, recurse)
        for name, value in stored.items():
            if value is not None and getattr(self, name).dtype != value.dtype:
                setattr(self, name, value.to(getattr(self, name).device))
        return self
