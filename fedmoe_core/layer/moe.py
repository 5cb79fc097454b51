"""MoE, the nn.Module: a Mixture-of-Experts layer that stores and runs only the experts its owner is permitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmoe_core.layer.lora import FACTORS
from fedmoe_core.layer.router_product import autocasts, router_logits
from fedmoe_core.layer.routing_rule import RoutingRule
from fedmoe_core.layer.slots import ExpertMask
from fedmoe_core.layer.state import BIASES, INIT_STD, LayerState
from fedmoe_core.layer.storage import ExpertStore
from fedmoe_kernels.activations import parts
from fedmoe_kernels.backends import WORTH_SAYING, warn_once
from fedmoe_kernels.experts.moe_mlp import ExpertLora, ExpertScores, ExpertWeights, moe_mlp
from fedmoe_kernels.routing.record import Routing
from fedmoe_kernels.routing.route import route
from fedmoe_kernels.routing.rules import compute_dtype
from fedmoe_kernels.routing.stats import RouterStats

__all__ = ["ExpertMask", "LayerState", "MoE"]

SOFTMAX = RoutingRule()
ROUTING_BACKENDS = {"auto": "auto", "triton": "triton", "cpu": "torch", "reference": "torch"}


class MoE(ExpertStore):
    """Router and permitted experts of one layer: x (..., H) -> y (..., H).

    How they are stored is ``ExpertStore``: only trainable experts are Parameters, an absent one has no byte here.

    Attributes that may be set between forwards:
        top_k: choices per token; may be lowered below the model's own k to meet a FLOP budget.
        token_mask: bool (T,), False = padding (no row, no statistic); None = every token is real.
        with_stats: leave this forward's router statistics in ``last_stats``.
        with_scores: let every backward add importance sums to ``scores``.
        recompute: keep no activations for the backward, which makes them again from x.
        backend: as ``fedmoe_kernels.moe_mlp``.
        out_scale: a scalar Parameter that the chosen experts' output is multiplied by (FLAME's s_i), not that of
            ``shared``; None = 1, for good.
        recorder: called in each forward with the router logits of real tokens (T, E), with their graph, the ``Routing``
            of all tokens before ``out_scale``, and x (T, H); see ``recording``. A copy of the layer has none.

    ``last_stats`` is overwritten by each forward and never summed here, so that a forward repeated by activation
    checkpointing cannot count twice. To sum it, add it once per micro-batch.

    Example:
        >>> import torch
        >>> layer = MoE(8, 16, 4, 2, permitted=[True, True, False, False], trainable=[True, False, False, False])
        >>> layer(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> layer
        MoE(hidden_size=8, intermediate_size=16, top_k=2, experts=2/4, trainable=1)
        >>> layer.w_in.shape  # one trainable expert; the frozen one is a buffer, the absent two have no byte
        torch.Size([1, 32, 8])
    """

    out_scale: nn.Parameter | None

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
        rule: RoutingRule = SOFTMAX,
        expert_bias: bool = False,
        router_bias: bool = False,
        correction_bias: bool = False,
        shared: nn.Module | None = None,
        train_router: bool = True,
        with_stats: bool = False,
        with_scores: bool = False,
        recompute: bool = False,
        frozen_format: str | None = None,
        float32_router: bool = True,
        rows_per_slot: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
    ) -> None:
        """Make a layer with fresh normal weights.

        Args:
            hidden_size: H, the width of a token.
            intermediate_size: I, the width inside an expert.
            num_experts: E, of the whole layer.
            top_k: k, experts that each token is sent to.
            permitted: bool (E,), the experts to store; None = all.
            trainable: bool (E,), those that get a weight gradient, a subset of ``permitted``; None = all permitted.
            activation: as ``fedmoe_kernels.moe_mlp``.
            rule: how logits become choices and weights.
            expert_bias: give each expert a bias after either matrix; zero at first, and trained as the matrices are.
            router_bias: give the router a bias; zero at first, and trained as the router's rows are.
            correction_bias: give the choice a bias (E,) that no gradient trains, for "sigmoid"; zero at first.
            shared: a module (T, H) -> (T, H) that every token goes through and whose output is added, such as a
                ``SharedExpert``. It is never masked, and padding goes through it too.
            train_router: False freezes every router row.
            with_stats, with_scores, recompute: see the class.
            frozen_format: "int8", "int4", "fp8_e4m3", "mxfp4", "nvfp4" or "nf4" stores the frozen experts so, see
                ``fedmoe_kernels.Quantized``; None = in ``dtype``. 32 must divide both widths. An expert so stored
                trains again only from a ``source``.
            float32_router: compute the router's product in float32, also in a layer of 16 bits and under autocast, as
                its softmax always is. False: in the dtype of x, or autocast's. (float64 for x of float64.)
            rows_per_slot: rows an expert is expected to get, see ``fedmoe_kernels.SlotMap``.
            dtype, device: of the weights.
            backend: as ``fedmoe_kernels.moe_mlp``.

        Raises:
            ValueError: k above E, an empty permitted set, or masks of the wrong shape, kind or inclusion; an unknown
                activation; a rule that does not fit the experts.
        """
        parts(activation)  # raises for a name or a limit that does not exist
        rule.check(num_experts)
        if correction_bias and rule.scoring != "sigmoid":
            raise ValueError(f"a correction bias needs scoring='sigmoid', not {rule.scoring!r}; leave it out")
        if backend not in ROUTING_BACKENDS:
            raise ValueError(f"backend is {backend!r}; choose one of {', '.join(ROUTING_BACKENDS)}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} of {num_experts} experts is impossible; choose 1 to {num_experts}")
        super().__init__(
            hidden_size,
            intermediate_size,
            num_experts,
            activation=activation,
            train_router=train_router,
            frozen_format=frozen_format,
            rows_per_slot=rows_per_slot,
            biases=[
                *BIASES * expert_bias,
                *["router_bias"] * router_bias,
                *["correction_bias"] * correction_bias,
            ],
        )
        self.top_k, self.rule, self.shared = top_k, rule.of_layer(top_k), shared
        self.with_stats, self.with_scores = with_stats, with_scores
        self.recompute, self.backend, self.float32_router = recompute, backend, float32_router
        self.token_mask: Tensor | None = None
        self.last_stats: RouterStats | None = None
        self.recorder: Callable[[Tensor, Routing, Tensor], None] | None = None
        self.register_parameter("out_scale", None)
        self._scores: ExpertScores | None = None
        held, trains = self.check_masks(permitted, trainable)
        ids = tuple(np.flatnonzero(held).tolist())
        fresh = {name: torch.empty(s, dtype=dtype, device=device) for name, s in self.shapes(len(ids)).items()}
        for name, tensor in fresh.items():
            tensor.zero_() if name.endswith("bias") or name in BIASES else tensor.normal_(std=INIT_STD)
        self._install(held, trains, LayerState.of(fresh, experts=ids))

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
        """Make a layer with copies of a dense MoE layer's permitted weights.

        Args:
            router_EH: (E, H).
            w_in, w_out: (E, 2I, H) and (E, H, I), the layout of transformers.
            top_k, permitted, trainable: as the constructor.
            options: as ``of``, which also makes layers with biases.
        """
        whole = LayerState.whole(router_EH, w_in, w_out)
        return cls.of(whole, top_k, permitted=permitted, trainable=trainable, **options)

    @classmethod
    def of(
        cls,
        state: LayerState,
        top_k: int,
        *,
        permitted: ExpertMask | None = None,
        trainable: ExpertMask | None = None,
        **options: object,
    ) -> MoE:
        """Make the layer of a state, with copies of its permitted experts; the biases are those that it has.

        Args:
            state: the layer in global coordinates.
            top_k, permitted, trainable: as the constructor.
            options: the constructor's other keywords; dtype and device are those of the tensors.
        """
        # On "meta" the constructor allocates nothing; load_global then brings the storage with the real weights.
        (num_experts, hidden_size), has = state.router.shape, state.tensors
        layer = cls(
            hidden_size,
            state.w_out.shape[-1],
            num_experts,
            top_k,
            device="meta",
            expert_bias="bias_in" in has,
            router_bias="router_bias" in has,
            correction_bias="correction_bias" in has,
            **options,  # type: ignore[arg-type]
        )
        layer.load_global(state, permitted=permitted, trainable=trainable)
        return layer

    def forward(self, x: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
        """Route each token of x (..., H) over the permitted experts and sum their weighted outputs; the same shape.

        Args:
            x: activations, in the dtype of the experts that train; under autocast in any. Frozen experts of another
                dtype are converted at every call.
            token_mask_T: bool (T,) in the order of x's leading dimensions; goes before ``token_mask``.

        Raises:
            ValueError: x or the mask does not fit the layer.
        """
        casts = autocasts(x) and x.dtype != torch.float64
        self._check(x, casts)
        x_TH = x.reshape(-1, self.hidden_size)
        valid_T = self._valid(x_TH, token_mask_T)
        narrow = torch.get_autocast_dtype(x.device.type) if casts else x.dtype
        logits_TE = router_logits(
            x_TH,
            self.router_EH(),
            self.router_bias_E(),
            valid_T=valid_T,
            dtype=compute_dtype(x.dtype) if self.float32_router else narrow,
        )
        routing = route(
            logits_TE,
            self.top_k,
            permitted_E=self.slot_map,
            **self.rule.keywords(),
            bias_E=self.correction_bias,
            valid_T=valid_T,
            with_stats=self.with_stats,
            backend=ROUTING_BACKENDS[self.backend],
        )
        self.last_stats = routing.stats
        if self.recorder is not None:
            self.recorder(logits_TE if valid_T is None else logits_TE[valid_T], routing, x_TH)
        if self.out_scale is not None:  # by the weights, because T * k numbers are kept for its gradient and not T * H
            routing = replace(routing, weights_TK=routing.weights_TK * self.out_scale)
        y_TH = self.run_experts(x_TH, routing, self.scores)
        if self.shared is not None:
            y_TH = y_TH + self.shared(x_TH)
        return y_TH.reshape(x.shape)

    def run_experts(self, x_TH: Tensor, routing: Routing, scores: ExpertScores | None = None) -> Tensor:
        """Sum the held experts' outputs by the weights of ``routing``, (T, H), without ``shared``."""
        dtype = None if autocasts(x_TH) and x_TH.dtype != torch.float64 else x_TH.dtype
        weights = {name: self._weights(name, dtype) for name in self._slotted}
        return moe_mlp(
            x_TH,
            routing,
            weights["w_in"],
            weights["w_out"],
            activation=self.activation,
            bias_in=weights.get("bias_in"),
            bias_out=weights.get("bias_out"),
            lora=self._lora(dtype),
            scores=scores,
            recompute=self.recompute,
            backend=self.backend,
        )

    def _check(self, x: Tensor, casts: bool) -> None:
        if x.shape[-1] != self.hidden_size:
            raise ValueError(f"x is {x.shape[-1]} wide; this MoE layer needs hidden_size={self.hidden_size}")
        learning = self.w_in if self.a_in is None else self.a_in
        if not x.is_floating_point() or (len(learning) and learning.dtype != x.dtype and not casts):
            raise ValueError(
                f"x is {x.dtype}, the experts of this MoE layer are {learning.dtype}; convert one of them, or call the "
                "layer under torch.autocast"
            )
        if x.device != self.device:
            raise ValueError(f"x is on {x.device}, this MoE layer on {self.device}; move one of them")

    def _valid(self, x_TH: Tensor, token_mask_T: Tensor | None) -> Tensor | None:
        """The mask of this forward, by the name that its giver knows where it does not fit."""
        name, mask_T = ("token_mask", self.token_mask) if token_mask_T is None else ("token_mask_T", token_mask_T)
        if mask_T is None:
            return None
        if mask_T.dtype != torch.bool or mask_T.shape != x_TH.shape[:1] or mask_T.device != x_TH.device:
            raise ValueError(
                f"{name} is {mask_T.dtype} {tuple(mask_T.shape)} on {mask_T.device}; it must be torch.bool "
                f"({x_TH.shape[0]},) on {x_TH.device}, one entry for each token in the order of x"
            )
        return mask_T

    def start_out_scale(self, value: float | None) -> None:
        """Give the layer's output a trainable factor that starts at ``value``; None takes it away."""
        dtype = torch.float64 if self.w_in.dtype == torch.float64 else torch.float32
        start = None if value is None else torch.tensor(value, dtype=dtype, device=self.device)
        self.out_scale = None if start is None else nn.Parameter(start)

    def trained_state(self) -> dict[str, Tensor]:
        """Return what ``ExpertStore.trained_state`` does, and the output's factor where there is one."""
        found = super().trained_state()
        return found if self.out_scale is None else found | {"out_scale": self.out_scale.detach()}

    def _weights(self, name: str, dtype: torch.dtype | None) -> ExpertWeights:
        """All slots of a matrix or bias, those that do not train in ``dtype``; None = autocast brings them to its own.

        What trains has the dtype already. FSDP casts it and leaves the buffers, whose values have no gradient to keep.
        """
        trainable, frozen = getattr(self, name), self._frozen(name)
        if dtype is None:
            return ExpertWeights(trainable, frozen)
        if isinstance(frozen, Tensor) and frozen.dtype != dtype:
            if frozen.nbytes >= WORTH_SAYING and not torch.compiler.is_compiling():
                warn_once(
                    f"{name}_frozen is {frozen.dtype}, and its {frozen.nbytes} bytes are converted to {dtype} at every "
                    f"forward; store it so: layer.{name}_frozen = layer.{name}_frozen.to({dtype})"
                )
            frozen = frozen.to(dtype)
        return ExpertWeights(trainable if len(trainable) else trainable.to(dtype), frozen)

    def _lora(self, dtype: torch.dtype | None) -> ExpertLora | None:
        """The adapters of the slots that have some of their own, as ``_weights``; None where none has."""
        if self.lora_scale is None:
            return None
        a_in, b_in, a_out, b_out = (self._factor(name) for name in FACTORS)
        if not len(a_in):
            return None
        if dtype is not None and not self.trainable_experts:
            a_in, b_in, a_out, b_out = (factor.to(dtype) for factor in (a_in, b_in, a_out, b_out))
        return ExpertLora(a_in, b_in, a_out, b_out, scale=self.lora_scale)

    @property
    def scores(self) -> ExpertScores | None:
        """Importance sums by slot since the last ``set_experts``, ``load_global`` or ``scores.reset()``."""
        if not self.with_scores:
            return None
        if self._scores is None or self._scores.leaf_B7.device != self.device:
            self._scores = self._no_scores()
        return self._scores

    def _no_scores(self) -> ExpertScores:
        """Sums of nothing yet, for the loss scale that was said last."""
        scores = ExpertScores(len(self.experts), device=self.device)
        if self._scores is not None and self._scores.unscale_7 is not None:
            scores.unscale_7 = self._scores.unscale_7.to(self.device)
        return scores

    def facts(self) -> dict[str, Any]:
        """Return what a state dict says beside its tensors, see ``Described``."""
        return super().facts() | {"top_k": self.top_k, "rule": self.rule.facts()}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give the layer fresh weights where they are, after ``to_empty`` for example; an output factor becomes 1.

        A layer whose experts all train gets the draws of a new one.
        """
        self.draw(self.names)
        if self.out_scale is not None:
            self.out_scale.fill_(1.0)
        self._installed()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the recorder out of copies and pickles: what it heard has a graph, and the copy is not recorded."""
        return self.__dict__ | {"recorder": None}

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, top_k={self.top_k}, "
            f"experts={len(self.experts)}/{self.num_experts}, trainable={len(self.trainable_experts)}"
        )

    def _installed(self) -> None:
        # Made here and not at the first forward, because a compiled forward cannot make a leaf.
        self._scores = self._no_scores() if self.with_scores else None
        self.last_stats = None
