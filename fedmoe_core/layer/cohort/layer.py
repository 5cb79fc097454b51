"""CohortMoE: the MoE layers of several clients as one module, one routing and one grouped GEMM for all of them.

Shapes: C clients, T tokens of all of them (T / C each), E experts, Bt trainable slots of all clients, B all slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn

from fedmoe_core.layer.cohort.parts import Bases, ClientLayer, end_to_end, laid_out
from fedmoe_core.layer.lora import FACTORS
from fedmoe_core.layer.lora import end_to_end as beside
from fedmoe_core.layer.moe import ROUTING_BACKENDS, MoE
from fedmoe_core.layer.router_product import router_logits
from fedmoe_kernels.experts.moe_mlp import ExpertLora, ExpertScores, ExpertWeights, moe_mlp
from fedmoe_kernels.quantized import Quantized
from fedmoe_kernels.routing.record import Routing
from fedmoe_kernels.routing.route import route
from fedmoe_kernels.routing.rules import compute_dtype
from fedmoe_kernels.routing.stats import RouterStats


class CohortMoE(nn.Module):
    """The layers of C clients: x (..., H) -> y (..., H); the first T / C tokens are the first client's, and so on.

    Each token meets its own client's router, mask and experts, and nothing of another's. What the clients train lies
    end to end in one Parameter for each tensor of a layer, client after client, so that one optimizer call moves all.

    Attributes:
        learning: the Parameters by name: ``router``, ``router_bias``, matrices and biases, or adapters' factors, with a
            row for each trainable expert of each client, and ``out_scale`` with one for each client.
        last_stats: router statistics of the last forward, (C, E).
        scores: importance sums of all slots since the layer was made.
        slot_maps: expert id to slot of the layer that each client would have alone.
        recorder: called in each forward with the router logits of all tokens (T, E), with their graph, their
            ``Routing``, and the mask of real tokens or None; see ``recording_cohort``.

    Example:
        >>> import torch
        >>> from fedmoe_core import MoE
        >>> masks = [True, True, False, False], [False, True, True, True]
        >>> alone = [MoE(8, 16, 4, 2, permitted=held) for held in masks]
        >>> together = CohortMoE(alone[0], [ClientLayer.of(layer) for layer in alone])
        >>> x_TH = torch.randn(10, 8)
        >>> torch.allclose(together(x_TH)[:5], alone[0](x_TH[:5]), atol=1e-6)
        True
        >>> together
        CohortMoE(clients=2, experts=5 of 2 x 4, trainable=5)
    """

    correction_bias: Tensor | None
    out_scale: nn.Parameter | None
    _order: Tensor

    def __init__(self, like: MoE, parts: Sequence[ClientLayer], *, rows_per_slot: int | None = None) -> None:
        """Lay the clients' parts end to end.

        Args:
            like: a layer whose rule, activation, backend and shared expert all of them have. Its shared expert serves
                every client and is not copied.
            parts: one for each client.
            rows_per_slot: rows that a slot is expected to get, from the plan; see ``fedmoe_kernels.SlotMap``.

        Raises:
            ValueError: no client, or clients that differ in which tensors they train.
        """
        super().__init__()
        if not parts:
            raise ValueError("a cohort needs at least one client; give the part of each")
        for c, part in enumerate(parts):
            if part.form != parts[0].form:
                raise ValueError(
                    f"client {c} of the cohort has other tensors than client 0 ({part.form} and {parts[0].form}); "
                    "put it in a cohort of its own kind"
                )
        self.hidden_size, self.num_experts, self.top_k = like.hidden_size, like.num_experts, like.top_k
        self.rule, self.activation, self.backend = like.rule, like.activation, like.backend
        self.float32_router, self.recompute, self.shared = like.float32_router, like.recompute, like.shared
        self.clients, device = len(parts), like.device
        self.trainable = tuple(part.trainable for part in parts)
        self.frozen = tuple(part.frozen for part in parts)
        self.slot_map = laid_out(parts, rows_per_slot=rows_per_slot).to(device)
        self.slot_maps = tuple(part.slot_map.to(device) for part in parts)
        self.last_stats: RouterStats | None = None
        self.recorder: Callable[[Tensor, Routing, Tensor | None], None] | None = None
        self.scores = ExpertScores(self.slot_map.num_slots, device=device)
        self.lora_scale = parts[0].lora_scale
        self._bases: Tensor | None = None
        self._slotted, self._codes = like.slot_names, like.frozen_format
        self._hold_experts(parts)
        self._hold_routers(parts, trains=like.train_router)
        corrections = [part.correction_bias for part in parts]
        self.register_buffer("correction_bias", corrections[0])
        factors = [part.out_scale for part in parts if part.out_scale is not None]
        self.register_parameter("out_scale", nn.Parameter(torch.stack(factors)) if factors else None)

    def _hold_experts(self, parts: Sequence[ClientLayer]) -> None:
        bases = Bases.of(parts) if self.lora_scale is not None else None
        for name in self._slotted:
            if bases is None:
                self._hold(name, torch.cat([part.learning[name] for part in parts]))
                frozen = end_to_end([part.frozen_rows[name] for part in parts])
            else:
                frozen = bases.stack(parts, name)
                none = parts[0].learning["a_in"].new_empty(0, *frozen.shape[1:])
                self._hold(name, none)
            self._keep(name, frozen)
        for name in FACTORS if bases is not None else ():
            self._hold(name, torch.cat([part.learning[name] for part in parts]))
            beside = [part.frozen_factors[name] for part in parts if part.frozen_factors]
            self.register_buffer(f"{name}_frozen", torch.cat(beside) if beside else None)
        if bases is not None:
            self._bases = torch.tensor(bases.row_of_slot, device=self.device)

    def _hold_routers(self, parts: Sequence[ClientLayer], *, trains: bool) -> None:
        """Part all routers into the rows that learn and the rest, and remember where each row of (C, E) is."""
        learns_CE = torch.zeros(self.clients, self.num_experts, dtype=torch.bool)
        for c, part in enumerate(parts):
            learns_CE[c, list(part.trainable)] = trains
        flat = learns_CE.flatten()
        order = torch.cat([flat.nonzero(), (~flat).nonzero()]).flatten()
        self.register_buffer("_order", order.argsort().to(self.device), persistent=False)
        for name in parts[0].steering:
            rows = torch.stack([part.steering[name] for part in parts]).flatten(0, 1)
            self._hold(name, rows[flat.to(rows.device)])
            self.register_buffer(f"{name}_rest", rows[~flat.to(rows.device)])

    def _hold(self, name: str, rows: Tensor) -> None:
        if len(rows):
            self.register_parameter(name, nn.Parameter(rows))
        else:
            self.register_buffer(name, rows)

    def _keep(self, name: str, frozen: Tensor | Quantized) -> None:
        parts: tuple[Tensor | None, ...] = (frozen, None, None) if isinstance(frozen, Tensor) else ()
        if isinstance(frozen, Quantized):
            parts = frozen.codes, frozen.scale, frozen.whole
        for part, value in zip(("frozen", "scale", "whole"), parts, strict=True):
            self.register_buffer(f"{name}_{part}", value)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.slot_map.slot_of_expert.device

    @property
    def learning(self) -> dict[str, nn.Parameter]:
        """What trains here, by name."""
        return dict(self.named_parameters(recurse=False))

    def bounds(self, name: str) -> tuple[int, ...]:
        """Return where each client's rows of a Parameter begin, and where the last ones end, C + 1 numbers."""
        if name == "out_scale":
            return tuple(range(self.clients + 1))
        return (0, *accumulate(len(experts) for experts in self.trainable))

    def learning_of_each(self, name: str) -> tuple[Tensor, ...]:
        """Return each client's rows of a Parameter, with their graph, as views: their gradients are joined once."""
        parameter = self.learning[name]
        if name == "out_scale":
            return parameter.unbind()
        return parameter.split([len(experts) for experts in self.trainable])

    def places(self) -> np.ndarray:
        """Return of each slot which expert of which client it is, as the place in a flattened (C, E), (B,)."""
        owners_B = self.slot_map
        return np.asarray((owners_B.client_of_slot_B * self.num_experts + owners_B.expert_of_slot_B).cpu())

    def keep_only_learning(self) -> None:
        """Let go of everything that does not train; no forward can run any more."""
        for name, _ in list(self.named_buffers(recurse=False)):
            setattr(self, name, None)

    def slots(self, client: int) -> list[int]:
        """Return the slots of one client, in the order of its trainable and then its frozen experts."""
        table_E = self.slot_map.slot_of_expert[client].tolist()
        return [table_E[expert] for expert in self.trainable[client] + self.frozen[client]]

    def forward(self, x: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
        """Route each client's tokens over its own permitted experts and sum their weighted outputs.

        Args:
            x: (..., H), the clients' tokens one after another, as many of each.
            token_mask_T: bool (T,) in the order of x's leading dimensions, False = padding; None = all are real.

        Raises:
            ValueError: the tokens cannot be shared out evenly, or the mask does not fit.
        """
        x_TH = x.reshape(-1, self.hidden_size)
        tokens = x_TH.shape[0]
        if tokens % self.clients or (token_mask_T is not None and token_mask_T.shape != (tokens,)):
            mask = "" if token_mask_T is None else f" with a mask of shape {tuple(token_mask_T.shape)}"
            raise ValueError(
                f"{tokens} tokens{mask} of {self.clients} clients; give each client as many, and a mask (T,)"
            )
        client_T = torch.arange(self.clients, device=x.device).repeat_interleave(tokens // self.clients)
        logits_TE = router_logits(
            x_TH,
            self._router("router").unflatten(0, (self.clients, -1)),
            self._router("router_bias").unflatten(0, (self.clients, -1)) if hasattr(self, "router_bias") else None,
            valid_T=token_mask_T,
            dtype=compute_dtype(x.dtype) if self.float32_router else x.dtype,
        )
        routing = route(
            logits_TE,
            self.top_k,
            permitted_E=self.slot_map,
            **self.rule.keywords(),
            bias_E=self.correction_bias,
            client_T=client_T,
            valid_T=token_mask_T,
            with_stats=True,
            backend=ROUTING_BACKENDS[self.backend],
        )
        self.last_stats = routing.stats
        if self.recorder is not None:
            self.recorder(logits_TE, routing, token_mask_T)
        if self.out_scale is not None:
            routing = replace(routing, weights_TK=routing.weights_TK * self.out_scale[client_T, None])
        weights = {name: self._weights(name) for name in self._slotted}
        y_TH = moe_mlp(
            x_TH,
            routing,
            weights["w_in"],
            weights["w_out"],
            activation=self.activation,
            bias_in=weights.get("bias_in"),
            bias_out=weights.get("bias_out"),
            lora=self._lora(),
            scores=self.scores,
            recompute=self.recompute,
            backend=self.backend,
        )
        if self.shared is not None:
            y_TH = y_TH + self.shared(x_TH)
        return y_TH.reshape(x.shape)

    def _router(self, name: str) -> Tensor:
        """All clients' rows in the order of clients and experts, (C * E, ...)."""
        return torch.cat([getattr(self, name), getattr(self, f"{name}_rest")])[self._order]

    def _weights(self, name: str) -> ExpertWeights:
        values, scale, whole = (getattr(self, f"{name}_{part}") for part in ("frozen", "scale", "whole"))
        frozen = values if scale is None else Quantized(values, scale, self._codes or "", whole)
        return ExpertWeights(getattr(self, name), frozen)

    def _lora(self) -> ExpertLora | None:
        if self.lora_scale is None:
            return None
        a_in, b_in, a_out, b_out = (beside(getattr(self, name), getattr(self, f"{name}_frozen")) for name in FACTORS)
        return ExpertLora(a_in, b_in, a_out, b_out, self.lora_scale, self._bases)

    def extra_repr(self) -> str:
        slots, learning = self.slot_map.num_slots, sum(map(len, self.trainable))
        return f"clients={self.clients}, experts={slots} of {self.clients} x {self.num_experts}, trainable={learning}"
