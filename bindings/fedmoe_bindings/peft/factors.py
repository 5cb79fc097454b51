"""LoRA factors of stacked experts: peft's layout for ``target_parameters``, and ours, exactly in both directions.

Shapes: E experts, r rank, C columns and N rows of a matrix as ours lies, (E, N, C): N = F and C = H for w_in, N = H and
C = I for w_out. peft keeps one pair of plain matrices for all experts: ``lora_A`` (r * E, C), expert by expert, and
``lora_B`` (N, r * E), rank by rank. Both are the same for experts that are stored transposed, (E, C, N).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedmoe_core.layer.lora import LayerLora
from fedmoe_kernels.experts.weights import ExpertLora


@dataclass(frozen=True, eq=False)
class Factors:
    """The adapters of one stacked matrix: expert e changes by scale * b[e] @ a[e].

    Attributes:
        a: (E, r, C).
        b: (E, N, r); rows of w_in are all of gate, then all of up.
        scale: peft's scaling: alpha / r, or alpha / sqrt(r) with rslora.

    Example:
        >>> import torch
        >>> lora_A, lora_B = torch.randn(3 * 2, 8), torch.randn(5, 3 * 2)  # rank 3, two experts
        >>> ours = Factors.from_peft(lora_A, lora_B, 2, scale=0.5)
        >>> tuple(ours.a.shape), tuple(ours.b.shape)
        ((2, 3, 8), (2, 5, 3))
        >>> [torch.equal(*pair) for pair in zip(ours.to_peft(), (lora_A, lora_B))]
        [True, True]
    """

    a: Tensor
    b: Tensor
    scale: float

    @classmethod
    def from_peft(
        cls, lora_A: Tensor, lora_B: Tensor, num_experts: int, *, scale: float, interleaved: bool = False
    ) -> Factors:
        """View peft's pair as ours; gradients of the views reach the pair.

        Args:
            lora_A, lora_B: (r * E, C) and (N, r * E).
            num_experts: E.
            scale: what peft multiplies the product by.
            interleaved: the model stores rows of gate and up in turn, as gpt-oss does; they are sorted, a copy.

        Raises:
            ValueError: the two do not make adapters of so many experts.
        """
        if (
            lora_A.dim() != 2
            or lora_B.dim() != 2
            or lora_A.shape[0] != lora_B.shape[1]
            or lora_A.shape[0] % num_experts
        ):
            raise ValueError(
                f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} are not adapters of {num_experts} "
                "experts; they must be (r * E, columns) and (rows, r * E)"
            )
        a = lora_A.unflatten(0, (num_experts, -1))
        b = lora_B.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
        return cls(a, torch.cat([b[:, ::2], b[:, 1::2]], 1) if interleaved else b, scale)

    def to_peft(self, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
        """Return ``lora_A`` and ``lora_B``; the other way round of ``from_peft``."""
        b = torch.stack(self.b.chunk(2, 1), 2).flatten(1, 2) if interleaved else self.b
        return self.a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[1]

    def widened(self, rank: int) -> Factors:
        """Return the same change with further ranks of zeros."""
        more = rank - self.rank
        return Factors(pad(self.a, (0, 0, 0, more)), pad(self.b, (0, more)), self.scale) if more else self

    def rescaled(self, scale: float) -> Factors:
        """Return the same change under another scale: b takes up the difference."""
        return self if scale == self.scale else Factors(self.a, self.b * (self.scale / scale), scale)

    def to(self, like: Tensor) -> Factors:
        """Return the factors in the dtype and on the device of ``like``."""
        return Factors(self.a.to(like), self.b.to(like), self.scale)


def joined(adapters: Sequence[Factors]) -> Factors:
    """Lay several adapters of one matrix end to end along the rank: one adapter whose change is the sum of theirs."""
    first, *others = adapters
    if not others:
        return first
    alike = [first, *(other.rescaled(first.scale) for other in others)]
    return Factors(torch.cat([f.a for f in alike], 1), torch.cat([f.b for f in alike], 2), first.scale)


def paired(
    w_in: Factors | None, w_out: Factors | None, shape_in: Sequence[int], shape_out: Sequence[int]
) -> tuple[Factors, Factors]:
    """Bring the adapters of both matrices to one rank and one scale; one that is missing is zero.

    Args:
        w_in, w_out: at least one.
        shape_in, shape_out: of the matrices, (E, F, H) and (E, H, I).

    Raises:
        ValueError: both are missing, or one does not fit its matrix.
    """
    one = w_in or w_out
    if one is None:
        raise ValueError("neither w_in nor w_out has adapters; give those of one at least")
    pair = []
    for name, factors, (experts, rows, columns) in (("w_in", w_in, shape_in), ("w_out", w_out, shape_out)):
        shapes = (experts, one.rank, columns), (experts, rows, one.rank)
        made = factors or Factors(one.a.new_zeros(shapes[0]), one.b.new_zeros(shapes[1]), one.scale)
        if (made.a.shape[0], made.b.shape[1], made.a.shape[2]) != (experts, rows, columns):
            raise ValueError(
                f"the adapters of {name} have a {tuple(made.a.shape)} and b {tuple(made.b.shape)}; it is "
                f"{(experts, rows, columns)}, so they are of another model"
            )
        pair.append(made)
    rank = max(factors.rank for factors in pair)
    return pair[0].widened(rank), pair[1].widened(rank).rescaled(pair[0].scale)


def expert_lora(w_in: Factors, w_out: Factors) -> ExpertLora:
    """Return what ``moe_mlp`` takes, of a pair that ``paired`` made; slot e holds expert e."""
    # The kernels want rows end to end, and peft's lora_B has the experts innermost: a copy of the factors alone.
    a_in, b_in, a_out, b_out = (factor.contiguous() for factor in (w_in.a, w_in.b, w_out.a, w_out.b))
    return ExpertLora(a_in, b_in, a_out, b_out, scale=w_in.scale)


def layer_lora(w_in: Factors, w_out: Factors) -> LayerLora:
    """Return what the federated layer takes, of a pair that ``paired`` made; copies, without gradient."""
    a_in, b_in, a_out, b_out = (
        factor.detach().clone(memory_format=torch.contiguous_format) for factor in (w_in.a, w_in.b, w_out.a, w_out.b)
    )
    return LayerLora(a_in, b_in, a_out, b_out, w_in.scale)


def of_layer_lora(lora: LayerLora) -> tuple[Factors, Factors]:
    """Return the adapters of w_in and w_out of a federated layer."""
    return Factors(lora.a_in, lora.b_in, lora.scale), Factors(lora.a_out, lora.b_out, lora.scale)
