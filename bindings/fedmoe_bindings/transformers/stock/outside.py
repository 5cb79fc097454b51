"""Families whose experts do not run through transformers' experts interface: what their modules do, on our kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedmoe_bindings.transformers.stock.experts import error_over_rounding, may_look
from fedmoe_bindings.transformers.stock.forms import activation_of
from fedmoe_bindings.transformers.stock.own_gate import autocast_dtype, grouped_experts
from fedmoe_kernels.experts.moe_mlp import moe_mlp
from fedmoe_kernels.routing.record import Routing

NONE = float("-inf")


class Outside(ABC):
    """What the forward of one module is replaced by; its weights stay where they are.

    The first call compares itself with the module's own forward, unless dropout makes that a matter of chance.

    Attributes:
        module: the module whose forward this is.
        checked: it has shown itself equal, or was told not to.
        widths: what a cut router's outputs are filled up with, in their order, to have a place for every expert of the
            whole model; None = they have none, ``...`` = router logits, which stay those of the sub-model if they can.
        layout: how the experts lie, in a few words.
    """

    widths: ClassVar[tuple[Any, ...]] = ()
    layout: ClassVar[str] = ""

    def __init__(self, module: nn.Module, *, check: bool = True) -> None:
        self.module, self.checked = module, not check

    def __call__(self, *args: Any) -> Any:
        """Run the module on our kernels."""
        found = self.run(*args)
        if not self.checked and not self.dropout and may_look(args[0]):
            self._check(args, found)
        return found

    @abstractmethod
    def run(self, *args: Any) -> Any:
        """Compute what the module's forward computes."""

    @property
    def count(self) -> int:
        """E."""
        found: int = self._any.num_experts
        return found

    @property
    def dropout(self) -> bool:
        """Whether this call drops values at random."""
        return False

    @property
    def _any(self) -> Any:
        return self.module

    @torch.no_grad()
    def _check(self, args: tuple[Any, ...], found: Any) -> None:
        want = type(self.module).forward(self.module, *(a.clone() if isinstance(a, Tensor) else a for a in args))
        found, want = (value[0] if isinstance(value, tuple) else value for value in (found, want))
        error = error_over_rounding(found, want)
        if error is None:  # the next call looks again
            return
        if error:
            raise RuntimeError(
                f"{type(self.module).__name__} differs from its own forward by {error:.1e} of its size in its first "
                "call; fedmoe misreads this module, so do not use it there, and please report it"
            )
        self.checked = True


def _run(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, w_in: Tensor, w_out: Tensor, name: str) -> Tensor:
    routing = Routing.from_topk(ids_TK, weights_TK, w_in.shape[0])
    cast_TH = x_TH if autocast_dtype(x_TH) is not None else x_TH.to(w_in.dtype)
    return moe_mlp(cast_TH, routing, w_in.contiguous(), w_out.contiguous(), activation=name).to(x_TH.dtype)


class SwitchExperts(Outside):
    """Switch Transformers: one expert a token, dropped past an expert's capacity, each a pair of linear modules."""

    widths = (0, None, ...)
    layout = "one module each, stacked at every call"

    def run(self, hidden_TH: Tensor, chosen_T1E: Tensor, weights_T1: Tensor) -> Tensor:
        """Return (T, H); a token that found no room gives 0."""
        experts = list(self._any.values())
        w_in, w_out = (torch.stack([getattr(e, name).weight for e in experts]) for name in ("wi", "wo"))
        here_T1 = chosen_T1E.bool().any(dim=-1)
        ids_T1 = chosen_T1E.argmax(dim=-1).where(here_T1, len(experts))
        first = experts[0]
        name = None if self.dropout else activation_of(first, first.act, w_in)
        if name is not None:
            return _run(hidden_TH, ids_T1, weights_T1, w_in, w_out, name)
        routing = Routing.from_topk(ids_T1, weights_T1, len(experts))
        return grouped_experts(hidden_TH, routing, w_in, w_out, lambda z_RF: first.dropout(first.act(z_RF)))

    @property
    def dropout(self) -> bool:
        """Whether the experts' dropout is on."""
        first = next(iter(self._any.values()))
        return bool(first.dropout.training and first.dropout.p > 0)


class DbrxExperts(Outside):
    """DBRX: matrices of all experts one below the other, the second one not transposed (the layout of megablocks)."""

    widths = (NONE,)
    layout = "laid out again at every call"

    def run(self, hidden: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return the hidden states of all tokens, in the shape given."""
        mlp, width = self._any.mlp, self._any.hidden_size
        w1, v1, w2 = (w.view(self.count, -1, width) for w in (mlp.w1, mlp.v1, mlp.w2))
        name = activation_of(mlp, mlp.activation_fn, w1, gated=True)
        x_TH = hidden.reshape(-1, width)
        if name is not None:
            y_TH = _run(x_TH, ids_TK, weights_TK, torch.cat([w1, v1], dim=1), w2.mT, name)
        else:
            routing, act = Routing.from_topk(ids_TK, weights_TK, self.count), mlp.activation_fn
            y_TH = grouped_experts(x_TH, routing, torch.cat([w1, v1], dim=1), w2.mT, lambda z: _gate(act, z))
        return y_TH.view(hidden.shape[0], -1, width)


class Llama4Moe(Outside):
    """Llama 4: experts see their token times its score, and their outputs are added as they are."""

    widths = (0.0, NONE)
    layout = "transposed"

    def run(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return (T, H) and the router logits (T, E)."""
        block = self._any
        x_TH = hidden.reshape(-1, block.hidden_dim)
        scores_TE, logits_TE = block.router(x_TH)
        ids_TK = logits_TE.topk(min(block.top_k, self.count), dim=1).indices
        scaled_RH = (x_TH[:, None] * scores_TE.gather(1, ids_TK)[..., None]).flatten(0, 1)
        w_in, w_out = block.experts.gate_up_proj.mT, block.experts.down_proj.mT
        ones_R1, ids_R1 = torch.ones_like(scaled_RH[:, :1]), ids_TK.reshape(-1, 1)
        name = activation_of(block.experts, block.experts.act_fn, w_in, gated=True)
        if name is not None:
            y_RH = _run(scaled_RH, ids_R1, ones_R1, w_in, w_out, name)
        else:
            routing, act = Routing.from_topk(ids_R1, ones_R1, self.count), block.experts.act_fn
            y_RH = grouped_experts(scaled_RH, routing, w_in, w_out, lambda z: _gate(act, z))
        return block.shared_expert(x_TH) + y_RH.view(*ids_TK.shape, -1).sum(dim=1), logits_TE


class JetMoeMoe(Outside):
    """JetMoE's feed-forward block: top-k, softmax over the chosen, and one bias for the sum."""

    widths = (None, None, None, None, NONE)

    def run(self, hidden: Tensor) -> Tensor:
        """Return the hidden states of all tokens, in the shape given."""
        block = self._any
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        *_, logits_TE = block.router(x_TH)
        top_TK, ids_TK = logits_TE.topk(min(block.router.top_k, self.count), dim=1)
        weights_TK = top_TK.softmax(dim=1).type_as(x_TH)
        w_in, w_out = block.input_linear.weight, block.output_linear.weight
        name = activation_of(block, block.activation, w_in, gated=True)
        if name is not None:
            y_TH = _run(x_TH, ids_TK, weights_TK, w_in, w_out, name)
        else:
            routing, act = Routing.from_topk(ids_TK, weights_TK, self.count), block.activation
            y_TH = grouped_experts(x_TH, routing, w_in, w_out, lambda z: _gate(act, z))
        return (y_TH + block.bias).view(hidden.shape)

    @property
    def count(self) -> int:
        """E."""
        found: int = self._any.router.num_experts
        return found


def _gate(act: Any, z_RF: Tensor) -> Tensor:
    gate_RI, up_RI = z_RF.chunk(2, dim=-1)
    gated: Tensor = act(gate_RI) * up_RI
    return gated


# By the name of the class of the module whose forward is replaced.
OUTSIDE: Mapping[str, type[Outside]] = MappingProxyType(
    {
        "SwitchTransformersExperts": SwitchExperts,
        "DbrxExperts": DbrxExperts,
        "Llama4TextMoe": Llama4Moe,
        "JetMoeMoE": JetMoeMoe,
    }
)
# Classes that are known and refused.
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "NllbMoeExperts": "transformers 5 runs its experts 0 and 1 only, whichever the router chose, so there is "
        "nothing right to compare with",
    }
)
