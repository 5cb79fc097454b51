"""The shapes and cases that every benchmark of the experts runs, and the data they run on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmoe_kernels.activations import width


@dataclass(frozen=True)
class Shape:
    """One MoE layer: T tokens, H hidden, I intermediate, E experts, K top-k; its name says what it is like.

    F is the height of w_in, 2 * I for gated activations and I for the others; `bias` gives both matrices one.
    """

    name: str
    T: int
    H: int
    I: int  # noqa: E741 - the house's letter for the intermediate size
    E: int
    K: int
    activation: str = "swiglu"
    bias: bool = False

    @property
    def F(self) -> int:
        return width(self.activation, self.I)

    @property
    def flops(self) -> int:
        """Forward + backward of T * K rows through all (F + I) * H weights, all trained: 6 a weight and row."""
        return 6 * self.T * self.K * self.H * (self.F + self.I)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.T, self.H, self.I, self.E, self.K


EDGE = Shape("edge", 512, 512, 256, 16, 2)

# What a CPU runs in reasonable time.
SHAPES = (
    Shape("demo", 4096, 256, 512, 16, 2),
    EDGE,
    Shape("fine", 2048, 256, 128, 64, 8),
    Shape("large", 4096, 512, 1024, 8, 2),
)

# The layers a GPU is measured on, the one that most others publish first. 128 does not divide gpt-oss's 2880.
STANDARD = (
    Shape("qwen3-30b-a3b", 32768, 2048, 768, 128, 8),
    Shape("mixtral-8x7b", 8192, 4096, 14336, 8, 2),
    Shape("olmoe-1b-7b", 16384, 2048, 1024, 64, 8),
    Shape("deepseek-moe-16b", 16384, 2048, 1408, 64, 6),
    Shape("deepseek-v3-slice", 8192, 7168, 2048, 32, 8),  # 32 of its 256 experts
    Shape("gpt-oss-20b", 16384, 2880, 2880, 32, 4, "swiglu_oai", bias=True),
    Shape("switch-base-8", 16384, 768, 3072, 8, 1, "relu"),
    EDGE,
)

# Layers of 2026, and one that fills a GPU; measured when they are asked for by name.
RECENT = (
    Shape("qwen3.5-35b-a3b", 32768, 2048, 512, 256, 8),
    Shape("gemma4-26b", 16384, 2816, 704, 128, 8, "geglu"),
    Shape("deepseek-v3", 8192, 7168, 2048, 256, 8),
)

# The same kinds, small enough to rehearse a whole GPU run on two cores of a CPU.
TINY = (
    Shape("tiny", 96, 32, 16, 8, 2),
    Shape("tiny-oai", 64, 24, 16, 8, 2, "swiglu_oai", bias=True),
    Shape("tiny-relu", 64, 16, 24, 8, 1, "relu"),
)


@dataclass(frozen=True)
class Case:
    """Which experts a client holds and trains, how many tokens it has and where they go.

    Attributes:
        permitted: share of the experts permitted, at least K of them.
        trainable: share of the permitted experts that train; at least one, or none at 0.
        tokens: T instead of the shape's, None = the shape's.
        routes: "uniform"; "zipf", expert of rank i chosen in proportion to 1 / i; "empty", 30 % of the permitted
            experts never chosen (as many as leave K). For tests of correctness also "one", all rows to one expert
            (K = 1), "gaps", a third of the places without a row, and "nowhere", no row at all.
    """

    name: str
    permitted: float = 1.0
    trainable: float = 1.0
    tokens: int | None = None
    routes: str = "uniform"

    def held(self, shape: Shape) -> int:
        """Return B, how many experts are permitted."""
        return max(shape.K, int(shape.E * self.permitted))

    def learning(self, shape: Shape) -> int:
        """Return Bt, how many of them are trainable."""
        return max(1, int(self.held(shape) * self.trainable)) if self.trainable else 0

    def shaped(self, shape: Shape) -> Shape:
        """Return the shape with this case's tokens; never more than it has."""
        return shape if self.tokens is None else replace(shape, T=min(self.tokens, shape.T))


CASES = (Case("all"), Case("permitted", permitted=0.25), Case("trainable", trainable=0.25))

SMALL_TOKENS = 1024
GRAPHED_TOKENS = 2048  # up to which the host takes longer to queue a step than the device to run it: graphs are timed
CLIENT_CASES = (
    Case("all"),
    Case("eighth-quarter", permitted=1 / 8, trainable=0.25),
    Case("small", tokens=SMALL_TOKENS),
    Case("small-eighth-quarter", permitted=1 / 8, trainable=0.25, tokens=SMALL_TOKENS),
    Case("quarter", trainable=0.25),
    Case("none", trainable=0.0),
    Case("eighth", permitted=1 / 8),
    Case("eighth-none", permitted=1 / 8, trainable=0.0),
    Case("zipf", routes="zipf"),
    Case("empty", routes="empty"),
)

# The same layer with ever other numbers of tokens, the most telling first; measured when they are asked for by name.
# At 32768 they are "quarter" and "all".
SWEEP_CASES = tuple(
    Case(f"{name}-{tokens}", trainable=share, tokens=tokens)
    for tokens in (2048, 512, 128, 8192)
    for name, share in (("quarter", 0.25), ("all", 1.0))
)


@dataclass(frozen=True, eq=False)
class Problem:
    """The tensors of one (shape, case): what each contender gets, full storage in expert order.

    With a part of the experts permitted the ids in `experts_TK` are restricted to them, so fedmoe and its peers run
    exactly the same rows; a peer holds all E experts (it has no compact form), fedmoe only the permitted ones.
    Weights are named as `moe_mlp` names them; biases are there where the shape has them.
    """

    shape: Shape
    case: Case
    x_TH: Tensor
    dy_TH: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    stacks: dict[str, Tensor]  # w_in (E, F, H), w_out (E, H, I), bias_in (E, F), bias_out (E, H)
    permitted_E: Tensor
    trainable_E: Tensor

    @property
    def tau(self) -> float:
        """The share of the rows that belong to trainable experts; waits for the device."""
        rows_E = torch.bincount(self.experts_TK.flatten(), minlength=self.shape.E)
        return float(rows_E[self.trainable_E].sum() / rows_E.sum())

    @property
    def flops(self) -> float:
        """What the case has to compute: the weight gradients of frozen experts' rows are not counted."""
        return self.shape.flops * (2 + self.tau) / 3


def problem(
    shape: Shape, case: Case, *, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Problem:
    """Draw one problem: O(1) data, K different experts a token; the routing weights stay float32."""
    shape = case.shaped(shape)
    draw = torch.Generator(device).manual_seed(seed)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=draw, device=device).mul_(scale).to(dtype)

    held = case.held(shape)
    permitted_E = torch.zeros(shape.E, dtype=torch.bool, device=device)
    permitted_E[torch.randperm(shape.E, generator=draw, device=device)[:held]] = True
    ids = permitted_E.nonzero().flatten()
    trainable_E = torch.zeros_like(permitted_E)
    trainable_E[ids[torch.randperm(held, generator=draw, device=device)[: case.learning(shape)]]] = True
    stacks = {
        "w_in": randn(shape.E, shape.F, shape.H, scale=shape.H**-0.5),
        "w_out": randn(shape.E, shape.H, shape.I, scale=shape.I**-0.5),
    }
    if shape.bias:
        stacks |= {"bias_in": randn(shape.E, shape.F), "bias_out": randn(shape.E, shape.H)}
    tokens = _tokens(shape, case, permitted_E, draw, dtype)
    return Problem(shape=shape, case=case, stacks=stacks, permitted_E=permitted_E, trainable_E=trainable_E, **tokens)


def redrawn(task: Problem, seed: int) -> Problem:
    """Draw other tokens for the same experts, sent elsewhere by the same rule: what a measurement rotates through."""
    draw = torch.Generator(task.x_TH.device).manual_seed(seed)
    return replace(task, **_tokens(task.shape, task.case, task.permitted_E, draw, task.x_TH.dtype))


def _tokens(
    shape: Shape, case: Case, permitted_E: Tensor, draw: torch.Generator, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Draw the fields of `Problem` that depend on the tokens; in skewed routing low ids are busy, or empty."""
    device = permitted_E.device
    ids = permitted_E.nonzero().flatten()
    chance = torch.ones(len(ids), device=device)
    if case.routes == "zipf":
        chance = 1 / torch.arange(1, len(ids) + 1, device=device)
    if case.routes == "empty":
        chance[: min(int(0.3 * len(ids)), len(ids) - shape.K)] = 0
    if case.routes == "one":
        chance[1:] = 0
    # The K largest of log p + Gumbel noise are K draws without replacement.
    noise = -torch.empty(shape.T, len(ids), device=device).exponential_(generator=draw).log()
    experts_TK = ids[(chance.log() + noise).topk(shape.K).indices]
    if case.routes in ("gaps", "nowhere"):
        kept = torch.rand(experts_TK.shape, generator=draw, device=device) * (case.routes == "gaps") > 1 / 3
        experts_TK = experts_TK.where(kept, -1)
    size = shape.T, shape.H
    return {
        "experts_TK": experts_TK,
        "x_TH": torch.randn(size, generator=draw, device=device).to(dtype),
        "dy_TH": torch.randn(size, generator=draw, device=device).to(dtype),
        "weights_TK": torch.rand(shape.T, shape.K, generator=draw, device=device).softmax(-1),
    }
