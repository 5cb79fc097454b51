"""MoE, the nn.Module: a Mixture-of-Experts layer that stores and runs only the experts its owner is permitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fedmoe_core.rows import Rows, check_rows, slot_map_of
from fedmoe_core.slots import frozen_stack, group_of, stack
from fedmoe_kernels.experts import ExpertScores, ExpertWeights, moe_mlp
from fedmoe_kernels.quantized import Quantized
from fedmoe_kernels.routing import SlotMap, route
from fedmoe_kernels.stats import RouterStats

ExpertMask = Tensor | np.ndarray | Sequence[bool]  # bool (E,)
INIT_STD = 0.02  # of fresh weights, as transformers' initializer_range
NO_ROWS: Rows = MappingProxyType({})
ROUTING_BACKENDS = {"auto": "auto", "triton": "triton", "cpu": "torch", "reference": "torch"}
GATED = ("swiglu", "geglu", "swiglu_oai")  # activations whose w_in is [gate; up]


@dataclass(frozen=True)
class LayerState:
    """The weights of some experts of one MoE layer, in global coordinates.

    Attributes:
        experts: expert ids, ascending; place i of ``w_in`` and ``w_out`` is expert ``experts[i]``.
        router: (E, H), always of all experts.
        w_in: (len(experts), 2I, H) for gated activations [gate; up], (len(experts), I, H) else.
        w_out: (len(experts), H, I).
    """

    experts: tuple[int, ...]
    router: Tensor
    w_in: Tensor
    w_out: Tensor


class MoE(nn.Module):
    """Router and permitted experts of one layer: x (..., H) -> y (..., H).

    Storage is compact: ``w_in`` and ``w_out`` are Parameters of the trainable experts only, ``w_in_frozen`` and
    ``w_out_frozen`` buffers of the other permitted ones, and an absent expert has no byte here. ``router`` is a
    Parameter with the rows of the trainable experts, ``router_rest`` a buffer with all other rows: the whole router is
    small, and with it the demand for absent experts stays measurable. So a frozen or absent expert can have neither
    gradient nor optimizer state, whatever the optimizer (invariant 5).

    Attributes that may be set between forwards:
        top_k: choices per token; may be lowered below the model's own k to meet a FLOP budget.
        token_mask: bool (T,), False = padding (no row, no statistic); None = every token is real.
        with_stats: leave this forward's router statistics in ``last_stats``.
        with_scores: let every backward add importance sums to ``scores``.
        keep_logits: leave the router logits of this forward's real tokens, with their graph, in ``last_logits_TE``, and
            the choices of all its tokens, (T, K), -1 = none, in ``last_experts_TK``.
        recompute: keep no activations for the backward, which makes them again from x.
        backend: as ``fedmoe_kernels.moe_mlp``.

    ``last_stats`` is overwritten by each forward and never summed here, so that a forward repeated by activation
    checkpointing cannot count twice; whoever wants sums adds it once per micro-batch.
    """

    w_in: nn.Parameter
    w_out: nn.Parameter
    router: nn.Parameter
    w_in_frozen: Tensor
    w_out_frozen: Tensor
    w_in_scale: Tensor | None
    w_out_scale: Tensor | None
    router_rest: Tensor
    trainable_experts: tuple[int, ...]
    frozen_experts: tuple[int, ...]
    _slot_map: SlotMap

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        permitted: ExpertMask | None = None,
        trainable: ExpertMask | None = None,
        activation: str = "swiglu",
        scoring: str = "softmax",
        renormalize: bool = True,
        train_router: bool = True,
        with_stats: bool = False,
        with_scores: bool = False,
        recompute: bool = False,
        frozen_bits: int | None = None,
        rows_per_slot: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
    ) -> None:
        """Make a layer with fresh normal weights.

        Args:
            hidden_size, intermediate_size, num_experts, top_k: H, I, E and k.
            permitted: bool (E,), the experts to store; None = all.
            trainable: bool (E,), those that get a weight gradient, a subset of ``permitted``; None = all permitted.
            activation: as ``fedmoe_kernels.moe_mlp``.
            scoring, renormalize: as ``fedmoe_kernels.route``.
            train_router: False freezes every router row.
            with_stats, with_scores, recompute: see the class.
            frozen_bits: 8 or 4 stores the frozen experts in as many bits with a scale per 128 columns, which 32 must
                divide; None = in ``dtype``. An expert so stored trains again only from a ``source``.
            rows_per_slot: rows an expert is expected to get, see ``fedmoe_kernels.SlotMap``.
            dtype, device: of the weights.
            backend: as ``fedmoe_kernels.moe_mlp``.

        Raises:
            ValueError: k above E, an empty permitted set, or masks of the wrong shape, kind or inclusion.
        """
        super().__init__()
        if backend not in ROUTING_BACKENDS:
            raise ValueError(f"backend is {backend!r}; choose one of {', '.join(ROUTING_BACKENDS)}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} of {num_experts} experts is impossible; choose 1 to {num_experts}")
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_experts, self.top_k = num_experts, top_k
        self.activation, self.scoring, self.renormalize = activation, scoring, renormalize
        self.train_router = train_router
        self.with_stats, self.with_scores, self.keep_logits = with_stats, with_scores, False
        self.recompute, self.backend = recompute, backend
        self.frozen_bits, self.rows_per_slot = frozen_bits, rows_per_slot
        self.token_mask: Tensor | None = None
        self.last_stats: RouterStats | None = None
        self.last_logits_TE: Tensor | None = None
        self.last_experts_TK: Tensor | None = None
        self._scores: ExpertScores | None = None
        for name in ("w_in_frozen", "w_out_frozen", "w_in_scale", "w_out_scale", "router_rest"):
            self.register_buffer(name, None)
        if frozen_bits is not None:
            if frozen_bits not in (8, 4):
                raise ValueError(f"frozen_bits is {frozen_bits}; choose 8, 4 or None")
            group_of(hidden_size), group_of(intermediate_size)
        width = intermediate_size * (2 if activation in GATED else 1)
        held, trains = self.check_masks(permitted, trainable)
        ids = tuple(np.flatnonzero(held).tolist())
        shapes = (num_experts, hidden_size), (len(ids), width, hidden_size), (len(ids), hidden_size, intermediate_size)
        fresh = (torch.empty(s, dtype=dtype, device=device).normal_(std=INIT_STD) for s in shapes)
        self._install(held, trains, LayerState(ids, *fresh))

    @classmethod
    def from_dense(
        cls,
        router_EH: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        top_k: int,
        *,
        permitted: ExpertMask | None = None,
        trainable: ExpertMask | None = None,
        **options: object,
    ) -> MoE:
        """A layer with copies of a dense MoE layer's permitted weights.

        Args:
            router_EH: (E, H).
            w_in, w_out: (E, 2I, H) and (E, H, I), the layout of transformers.
            top_k, permitted, trainable: as the constructor.
            options: the constructor's other keywords; dtype and device are those of the tensors.
        """
        # On "meta" the constructor allocates nothing; load_global then brings the storage with the real weights.
        num_experts, hidden_size = router_EH.shape
        layer = cls(hidden_size, w_out.shape[-1], num_experts, top_k, device="meta", **options)  # type: ignore[arg-type]
        layer.load_global(router_EH, w_in, w_out, permitted=permitted, trainable=trainable)
        return layer

    def forward(self, x: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
        """Route each token of x (..., H) over the permitted experts and sum their weighted outputs; the same shape.

        Args:
            x: activations.
            token_mask_T: bool (T,) in the order of x's leading dimensions; goes before ``token_mask``.
        """
        if x.shape[-1] != self.hidden_size:
            raise ValueError(f"x is {x.shape[-1]} wide; this MoE layer needs hidden_size={self.hidden_size}")
        x_TH = x.reshape(-1, self.hidden_size)
        logits_TE = linear(x_TH, self.router_EH())
        valid_T = self.token_mask if token_mask_T is None else token_mask_T
        routing = route(
            logits_TE,
            self.top_k,
            permitted_E=self.slot_map,
            scoring=self.scoring,
            renormalize=self.renormalize,
            valid_T=valid_T,
            with_stats=self.with_stats,
            backend=ROUTING_BACKENDS[self.backend],
        )
        self.last_stats = routing.stats
        if self.keep_logits:
            self.last_logits_TE = logits_TE if valid_T is None else logits_TE[valid_T]
            self.last_experts_TK = routing.experts_TK
        y_TH = moe_mlp(
            x_TH,
            routing,
            ExpertWeights(self.w_in, self._frozen("w_in")),
            ExpertWeights(self.w_out, self._frozen("w_out")),
            activation=self.activation,
            scores=self.scores,
            recompute=self.recompute,
            backend=self.backend,
        )
        return y_TH.reshape(x.shape)

    def router_EH(self) -> Tensor:
        """The whole router in expert order, (E, H); gradients reach the trainable rows only."""
        rows = torch.cat([self.router, self.router_rest])
        return rows if self._router_in_order else rows[self._row_of_expert.to(rows.device)]

    @property
    def slot_map(self) -> SlotMap:
        """Expert id to slot, on the device of the weights."""
        if self._slot_map.slot_of_expert.device != self.w_in.device:
            self._slot_map = self._slot_map.to(self.w_in.device)
        return self._slot_map

    @property
    def scores(self) -> ExpertScores | None:
        """Importance sums by slot since the last ``set_experts``, ``load_global`` or ``scores.reset()``."""
        if not self.with_scores:
            return None
        if self._scores is None or self._scores.leaf_B6.device != self.w_in.device:
            self._scores = ExpertScores(len(self.experts), device=self.w_in.device)
        return self._scores

    @property
    def experts(self) -> tuple[int, ...]:
        """Expert id of every slot: the trainable ones first, ascending id within each part."""
        return self.trainable_experts + self.frozen_experts

    def forget_logits(self) -> None:
        """Release what ``keep_logits`` left behind."""
        self.last_logits_TE, self.last_experts_TK = None, None

    def chosen_rows_E(self) -> np.ndarray:
        """Rows of each held expert in the last forward, (E,), by the choices that ``keep_logits`` left; one host sync.

        A choice of an expert that another one serves counts for the one that serves.
        """
        chosen_R = cast(Tensor, self.last_experts_TK).flatten()
        slots_N = self.slot_map.slot_of_expert[chosen_R[chosen_R >= 0]]
        rows_E = np.zeros(self.num_experts)
        rows_E[list(self.experts)] = torch.bincount(slots_N, minlength=len(self.experts)).cpu().numpy()
        return rows_E

    def load_global(
        self,
        router: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        *,
        permitted: ExpertMask | None = None,
        trainable: ExpertMask | None = None,
        rows: Rows | None = None,
        alias: np.ndarray | None = None,
    ) -> None:
        """Become the sub-layer of a whole layer's tensors (E, ...): copies of the permitted experts, never views.

        Args:
            router, w_in, w_out: the layer in global coordinates.
            permitted, trainable: as the constructor.
            rows: rows in place of those tensors' own, by "router", "w_in" or "w_out" and expert id.
            alias: int (E,), the held expert whose slot serves an absent one, -1 = none; see ``SlotMap.shared``.

        Raises:
            ValueError: as the constructor; a row of another shape or of an expert that is not held; a bad alias.
        """
        state = LayerState(tuple(range(self.num_experts)), router, w_in, w_out)
        self._install(*self.check_masks(permitted, trainable), state, own=rows or {}, alias=alias)

    def set_experts(
        self, permitted: ExpertMask | None, trainable: ExpertMask | None = None, *, source: LayerState | None = None
    ) -> None:
        """Change which experts are held and trained; what stays keeps its bits, and so does the router.

        Args:
            permitted, trainable: as the constructor.
            source: where experts that are new here come from; it may hold any experts, its router is not read.

        Raises:
            ValueError: an expert is new and ``source`` does not hold it.
        """
        self._install(*self.check_masks(permitted, trainable), source, keep=True)

    def global_state(self) -> LayerState:
        """Copies of the router and of the held experts, in ascending expert id."""
        order = sorted(range(len(self.experts)), key=self.experts.__getitem__)
        with torch.no_grad():
            w_in, w_out = (torch.stack([self._rows(name)[b] for b in order]) for name in ("w_in", "w_out"))
            return LayerState(tuple(sorted(self.experts)), self.router_EH().detach().clone(), w_in, w_out)

    def trained_state(self) -> dict[str, Tensor]:
        """Detached views of what trains here, rows in ascending expert id; empty where no expert trains."""
        if not self.trainable_experts:
            return {}
        names = ("router", "w_in", "w_out") if self.train_router else ("w_in", "w_out")
        return {name: getattr(self, name).detach() for name in names}

    def check_masks(self, permitted: ExpertMask | None, trainable: ExpertMask | None) -> tuple[np.ndarray, np.ndarray]:
        """Numpy bool (E,) masks of the permitted and of the trainable experts, None filled in.

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
        """The experts by slot, so that a state dict cannot be read into a layer that holds others."""
        return torch.tensor([len(self.trainable_experts), *self.experts])

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse the state dict of a layer with other experts."""
        if state.tolist() != self.get_extra_state().tolist():
            raise ValueError(
                f"the state dict holds experts {state.tolist()[1:]}, this layer {list(self.experts)}; "
                "call set_experts with its permitted and trainable experts first"
            )

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, top_k={self.top_k}, "
            f"experts={len(self.experts)}/{self.num_experts}, trainable={len(self.trainable_experts)}"
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
        own: Rows = NO_ROWS,
        alias: np.ndarray | None = None,
    ) -> None:
        """Lay the experts out in slots. With ``keep``, what this layer has wins over ``source``; ``own`` over both."""
        slot_map = slot_map_of(held, trains, alias, rows_per_slot=self.rows_per_slot)
        trainable = tuple(np.flatnonzero(trains).tolist())
        frozen = tuple(np.flatnonzero(held & ~trains).tolist())
        have = self.experts if keep else ()
        offered = {} if source is None else {e: i for i, e in enumerate(source.experts)}
        missing = [e for e in trainable + frozen if e not in have and e not in offered]
        if missing:
            raise ValueError(f"expert {missing[0]} is new to this layer; pass a source that holds its weights")
        coded = self.frozen_experts if keep and self.frozen_bits else ()
        lossy = [e for e in trainable if e in coded and e not in offered]
        if lossy:
            raise ValueError(f"expert {lossy[0]} is held in {self.frozen_bits} bits; pass a source to train it from")
        if source is not None:
            self._check(source)
            check_rows(own, {name: getattr(source, name) for name in ("router", "w_in", "w_out")}, held)
        with torch.no_grad():
            router_EH = self.router_EH() if keep else cast(LayerState, source).router
            for name in ("w_in", "w_out"):
                like = getattr(self if keep else source, name)
                rows = {} if source is None else {e: getattr(source, name)[i] for e, i in offered.items()}
                if keep:
                    rows |= dict(zip(self.trainable_experts, getattr(self, name), strict=True))
                stored = self._frozen(name) if keep else None
                codes = {e: stored[i] for i, e in enumerate(coded)} if isinstance(stored, Quantized) else {}
                if isinstance(stored, Tensor):
                    rows |= dict(zip(self.frozen_experts, stored, strict=True))
                rows |= own.get(name, {})
                setattr(self, name, nn.Parameter(stack(rows, trainable, like)))
                values, scale = frozen_stack(rows, codes, frozen, bits=self.frozen_bits, like=like)
                setattr(self, f"{name}_frozen", values)
                setattr(self, f"{name}_scale", scale)
            steered = trainable if self.train_router else ()
            rest = tuple(e for e in range(self.num_experts) if e not in steered)
            rows = dict(enumerate(router_EH)) | dict(own.get("router", {}))
            self.router = nn.Parameter(stack(rows, steered, router_EH))
            self.router_rest = stack(rows, rest, router_EH)
        self.trainable_experts, self.frozen_experts = trainable, frozen
        order = steered + rest
        self._router_in_order = order == tuple(range(self.num_experts))
        self._row_of_expert = torch.tensor(order).argsort()
        self._slot_map = slot_map
        # Made here and not at the first forward, because a compiled forward cannot make a leaf.
        self._scores = ExpertScores(len(self.experts), device=self.w_in.device) if self.with_scores else None
        self.last_stats = None
        self.forget_logits()

    def _check(self, source: LayerState) -> None:
        """The shapes of a source, before anything of this layer changes."""
        width = self.intermediate_size * (2 if self.activation in GATED else 1)
        want = {
            "router": (self.num_experts, self.hidden_size),
            "w_in": (len(source.experts), width, self.hidden_size),
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
        values, scale = getattr(self, f"{name}_frozen"), getattr(self, f"{name}_scale")
        return values if scale is None else Quantized(values, scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        """Another dtype for the layer is none for the scales of its codes, which stay float32."""
        scales = {name: getattr(self, name) for name in ("w_in_scale", "w_out_scale")}
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            if scale is not None and getattr(self, name).dtype != scale.dtype:
                setattr(self, name, scale.to(getattr(self, name).device))
        return self
