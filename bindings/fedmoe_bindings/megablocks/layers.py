"""`dMoE`: megablocks' dropless layer, its parameters under their published names, on fedmoe's routing and products.

Shapes: T tokens (sequence length times batch), K top-k, E experts, R = T * K rows, H hidden, I intermediate.

The parameters stay as megablocks lays them out, so that optimizers, state dicts and checkpoints see nothing new, and
`grouped_mm` takes them without a copy. `moe_mlp` would fuse the activation, but wants w2 transposed and w1 beside v1: a
second copy of all experts, at every call. `moe.moe_of` makes that copy once and returns fedmoe's own layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedmoe_bindings.megablocks.arguments import Arguments
from fedmoe_bindings.megablocks.recompute import activated, recomputed
from fedmoe_bindings.megablocks.rows import combine, gather
from fedmoe_kernels import Routing, SlotMap, grouped_mm, route


class _Records(nn.Module):
    """A module that keeps what its training forwards leave for a loss, until it is cleared; copies begin with none."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"records": []}


class LearnedRouter(_Records):
    """A linear layer, softmax, top-k, and the p-norm where one is asked for.

    Attributes:
        layer: (E, H) weights, no bias.
        records: router logits (T, E) of each forward, with their graph; filled where `moe_zloss_weight` is not 0.
        permitted: bool (E,), the experts that tokens may go to; None = all. Not part of a state dict.
    """

    permitted: Tensor | None

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.args = args
        self.layer = nn.Linear(args.hidden_size, args.moe_num_experts, bias=False, dtype=args.dtype, device=args.device)
        args.init_method(self.layer.weight)
        self.register_buffer("permitted", None, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Return the logits (T, E), -inf where an expert is not permitted, and the routing."""
        args = self.args
        if self.training and args.moe_jitter_eps is not None:
            x = x * (1 + args.moe_jitter_eps * (2 * torch.rand_like(x) - 1))
        logits_TE = self.layer(x.reshape(-1, args.hidden_size))
        if self.permitted is not None:
            logits_TE = logits_TE.masked_fill(~self.permitted, -torch.inf)
        if args.moe_zloss_weight:
            self.records.append(logits_TE)
        p = args.moe_normalize_expert_weights or 0
        routing = route(logits_TE, args.moe_top_k, renormalize=p == 1)
        weights_TK = routing.weights_TK
        if p not in (0, 1):
            norm_T1 = torch.linalg.vector_norm(weights_TK, ord=p, dim=-1, keepdim=True)
            weights_TK = weights_TK / norm_T1.masked_fill(norm_T1 == 0, 1)  # 0 = a token without a row
        if not args.uniform_expert_assignment:
            return logits_TE, replace(routing, weights_TK=weights_TK)
        E, device = args.moe_num_experts, logits_TE.device
        experts_TK = (torch.arange(weights_TK.numel(), device=device) % E).view(weights_TK.shape)
        return logits_TE, Routing.from_topk(experts_TK, weights_TK, SlotMap(torch.arange(E, device=device), E))


class GroupedMLP(nn.Module):
    """The experts: w1 and w2, and v1 of "glu", each (E * I, H), expert after expert."""

    w1: nn.Parameter
    w2: nn.Parameter
    v1: nn.Parameter | None

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.args = args

        def drawn(init: Any) -> nn.Parameter:
            shape = (args.moe_num_experts, args.ffn_hidden_size, args.hidden_size)  # as the published layer draws them
            whole = torch.empty(shape, dtype=args.dtype, device=args.device)
            init(whole)
            return nn.Parameter(whole.detach().view(-1, args.hidden_size))

        self.w1, self.w2 = drawn(args.init_method), drawn(args.output_layer_init_method)
        self.register_parameter("v1", drawn(args.init_method) if args.mlp_type == "glu" else None)

    def forward(self, x_RH: Tensor, offsets_B1: Tensor) -> Tensor:
        """Return (R, H): each row through its expert; rows of no expert give 0."""
        z = [grouped_mm(x_RH, self._apart(w), offsets_B1) for w in (self.w1, self.v1) if w is not None]
        w2 = self._apart(self.w2).to(z[0].dtype)
        # Compiled, the plain form: the compiler cannot follow a backward within a backward, and chooses what to keep.
        if self.args.memory_optimized_mlp and not torch.compiler.is_compiling():
            return recomputed(self.args.activation_fn, w2, offsets_B1, z)
        return grouped_mm(activated(self.args.activation_fn, z), w2, offsets_B1, transposed=True)

    def _apart(self, stack: Tensor) -> Tensor:
        """View a stack as (E, I, H)."""
        return stack.view(self.args.moe_num_experts, self.args.ffn_hidden_size, self.args.hidden_size)


class ParallelDroplessMLP(_Records):
    """The experts with the copies around them, and the layer's bias.

    Attributes:
        mlp: the experts.
        bias: (H,), added once to the output; None = none.
        records: (rows of each expert (E,), softmax of all logits (T, E)) of each training forward; filled where
            `moe_loss_weight` is above 0.
    """

    bias: nn.Parameter | None

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.args, self.mlp = args, GroupedMLP(args)
        bias = nn.Parameter(torch.zeros(args.hidden_size, dtype=args.dtype, device=args.device)) if args.bias else None
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor, logits_TE: Tensor, routing: Routing) -> Tensor | tuple[Tensor, Tensor]:
        """Return the experts' output in the shape of x, with the bias added, or beside it with `return_bias`."""
        rows_RH = gather(x.reshape(-1, self.args.hidden_size), routing)
        out = combine(self.mlp(rows_RH, routing.offsets_B1), routing).view(x.shape)
        if self.training and self.args.moe_loss_weight > 0:
            self.records.append((routing.counts_B, logits_TE.softmax(dim=-1)))
        if self.bias is None:
            return out
        return (out, self.bias) if self.args.return_bias else out + self.bias


class SharedMLP(nn.Module):
    """The dense expert that every token goes through: up_proj and down_proj, and gate_proj of "glu"."""

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.args = args
        own = {"bias": args.bias, "device": args.device} | ({"dtype": args.dtype} if args.fc_cls is nn.Linear else {})
        how = own | dict(args.fc_kwargs)
        self.up_proj = args.fc_cls(args.hidden_size, args.shared_width, **how)
        self.down_proj = args.fc_cls(args.shared_width, args.hidden_size, **how)
        self.gate_proj = args.fc_cls(args.hidden_size, args.shared_width, **how) if args.mlp_type == "glu" else None

    def forward(self, x: Tensor) -> Tensor:
        """Return down(act(up x)), or down(act(gate x) * up x)."""
        if self.gate_proj is None:
            return self.down_proj(self.args.activation_fn(self.up_proj(x)))
        return self.down_proj(self.args.activation_fn(self.gate_proj(x)) * self.up_proj(x))

    def added(self, shared: Tensor, experts: Tensor) -> Tensor:
        """Return the sum of both outputs, or the mean of the k + 1 experts."""
        if not self.args.shared_expert_weighted_sum:
            return shared + experts
        count = self.args.moe_top_k + 1
        return shared / count + experts * (self.args.moe_top_k / count)


class dMoE(nn.Module):  # noqa: N801 - the published name
    """A dropless MoE layer: `router`, `experts` and `shared_expert` as in megablocks, state dicts the same.

    It routes in float32, where megablocks takes the softmax in the logits' dtype, and ties go to the lowest expert.
    What training forwards leave for the losses lies in the layer, not in a global list; see `losses`.

    Example:
        >>> import torch
        >>> args = Arguments(16, 32, moe_num_experts=4, moe_top_k=2, mlp_type="glu", fp16=False)
        >>> out, bias = dMoE(args)(torch.zeros(3, 2, 16))  # (sequence, batch, hidden)
        >>> out.shape, bias.shape
        (torch.Size([3, 2, 16]), torch.Size([16]))
    """

    def __init__(self, args: Arguments) -> None:
        """Make a layer with fresh weights."""
        super().__init__()
        self.router = LearnedRouter(args)
        self.experts = ParallelDroplessMLP(args)
        self.shared_expert = SharedMLP(args) if args.shared_expert else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the output in the shape of x (..., H), or (output, bias) with `bias` and `return_bias`."""
        H = self.router.args.hidden_size
        if x.shape[-1] != H:
            raise ValueError(f"x is {x.shape[-1]} wide; this layer needs hidden_size={H}")
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        logits_TE, routing = self.router(x)
        out = self.experts(x, logits_TE, routing)
        return out if self.shared_expert is None else self.shared_expert.added(self.shared_expert(x), out)

    def permit(self, permitted_E: Tensor | None) -> None:
        """Let tokens go to some experts only, as if the layer had no others; None = to all again. No weight changes.

        megablocks has no such thing. The others get no row and no gradient; to give up their memory as well, make
        fedmoe's own layer with `moe_of`.

        Raises:
            ValueError: a mask of another dtype or shape, or without any expert; or `uniform_expert_assignment`.
        """
        args = self.router.args
        if permitted_E is None:
            self.router.permitted = None
            return
        if args.uniform_expert_assignment:
            raise ValueError("uniform_expert_assignment sends tokens to all experts; make the layer without it")
        if permitted_E.dtype != torch.bool or permitted_E.shape != (args.moe_num_experts,) or not permitted_E.any():
            raise ValueError(
                f"permitted_E is {permitted_E.dtype} {tuple(permitted_E.shape)}; give a bool mask "
                f"({args.moe_num_experts},) with at least one expert"
            )
        self.router.permitted = permitted_E.to(self.router.layer.weight.device)
