"""Heterogeneous LoRA against plain re-statements, and the bias of averaging A and B apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lora_restated import adapter_sum, flame_weights, hetlora_weights, pruned_rank, separate_mean
from torch import Tensor

from fedmoe_core.algorithms.lora.factors import Factors, flame_rescale, resize, tail_penalty

IN, OUT = 9, 7


def draw(seed: int, ranks: list[int], *lead: int) -> list[Factors]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [Factors(normal(*lead, r, IN), normal(*lead, OUT, r)) for r in ranks]


def test_padding_keeps_the_product_and_truncation_drops_the_last_ranks() -> None:
    (one,) = draw(0, [3], 2)
    wide = resize(one, 5)
    assert (wide.a.shape, wide.b.shape) == ((2, 5, IN), (2, OUT, 5))
    assert torch.equal(wide.product(), one.product())
    narrow = resize(one, 2)
    expected = sum(one.b[..., :, r, None] * one.a[..., None, r, :] for r in range(2))
    assert torch.allclose(narrow.product(), torch.as_tensor(expected))
    assert torch.equal(resize(wide, 3).a, one.a)
    with pytest.raises(ValueError, match="rank 0 leaves no adapter"):
        resize(one, 0)


def test_hetlora_weights_are_shares_of_the_product_norm() -> None:
    adapters = draw(1, [1, 4, 2], 3)
    found = hetlora_weights(adapters)
    for e in range(3):
        norms = [float(torch.linalg.matrix_norm(one.b[e] @ one.a[e])) for one in adapters]
        assert found[:, e].tolist() == pytest.approx([norm / sum(norms) for norm in norms])
    zero = [Factors(one.a, torch.zeros_like(one.b)) for one in adapters]
    assert hetlora_weights(zero).unique().tolist() == pytest.approx([1 / 3])  # a fresh LoRA has B = 0


def test_hetlora_mean_by_loops() -> None:
    adapters = draw(2, [1, 3], 2)
    weights = hetlora_weights(adapters)
    found = separate_mean(adapters, weights)
    for e in range(2):
        a = torch.zeros(3, IN).double()
        for k, one in enumerate(adapters):
            a[: one.rank] += weights[k, e] * one.a[e]
        assert torch.allclose(found.a[e], a)
    assert found.b.shape == (2, OUT, 3)


def test_averaging_a_and_b_apart_is_biased() -> None:
    """avg(B) avg(A) != avg(B A): half the energy of independent adapters goes, two opposed ones vanish or remain."""
    adapters, half = draw(3, [2, 2]), torch.tensor([0.5, 0.5])
    true = sum(0.5 * one.product() for one in adapters)
    apart = separate_mean(adapters, half).product()
    assert float((apart - true).norm() / torch.as_tensor(true).norm()) > 0.3
    assert torch.allclose(adapter_sum(adapters, half).truncate(4).product(), torch.as_tensor(true), atol=1e-12)
    # The same change of weights written with both signs flipped: the true mean is the change, the separate one is zero.
    (one,) = draw(4, [2])
    flipped = Factors(-one.a, -one.b)
    assert separate_mean([one, flipped], half).product().abs().max() == 0
    assert torch.allclose(adapter_sum([one, flipped], half).truncate(2).product(), one.product(), atol=1e-12)
    # Equal A (frozen, as in FFA-LoRA) takes the bias away.
    shared = [Factors(one.a, b) for _, b in draw(5, [2, 2])]
    exact = sum(0.5 * other.product() for other in shared)
    assert torch.allclose(separate_mean(shared, half).product(), torch.as_tensor(exact))


@pytest.mark.parametrize("ranks", [[2, 1, 3], [8, 4], [1]])
def test_flexlora_error_is_the_tail_of_the_singular_values(ranks: list[int]) -> None:
    adapters = draw(6, ranks, 2)
    weights = torch.rand(len(ranks), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    true = torch.stack(
        [sum(weights[k, e] * (one.b[e] @ one.a[e]) for k, one in enumerate(adapters)) for e in range(2)]  # type: ignore[misc]
    )
    found = adapter_sum(adapters, weights)
    plain = torch.linalg.svd(true)[1]
    depth = min(found.s.shape[-1], plain.shape[-1])
    assert torch.allclose(found.s[..., :depth], plain[..., :depth], atol=1e-10)
    for rank in range(1, 9):
        sent = found.truncate(rank)
        assert sent.rank == rank
        error = torch.linalg.matrix_norm(sent.product() - true)
        assert torch.allclose(error, plain[..., rank:].square().sum(-1).sqrt(), atol=1e-10)
        assert torch.allclose(error, torch.linalg.vector_norm(found.s[..., rank:], dim=-1), atol=1e-10)


def test_hetlora_prunes_only_where_the_tail_faded() -> None:
    (before,) = draw(7, [4], 2)
    shrink = torch.tensor([1.0, 1.0, 0.5, 0.5]).double()
    after = Factors(before.a * shrink[:, None], before.b)
    expected = [float(b[:, 2:].norm() * a[2:].norm()) for a, b in zip(after.a, after.b, strict=True)]
    assert tail_penalty(after, 2).tolist() == pytest.approx(expected)
    assert pruned_rank(before, after, keep_share=0.5) == 2
    assert pruned_rank(after, before, keep_share=0.5) == 4
    assert pruned_rank(before, before, keep_share=0.5) == 4
    assert pruned_rank(before, after, keep_share=0.1) in (1, 4)
    assert pruned_rank(before, Factors(0 * after.a, after.b), keep_share=0.1) == 1
    with pytest.raises(ValueError, match=r"keep_share=1\.5 is outside"):
        pruned_rank(before, after, keep_share=1.5)


def test_flame_weights_by_loops() -> None:
    rng = np.random.default_rng(8)
    a, steps, samples = rng.integers(0, 9, (3, 2, 4)), np.array([2, 5, 4]), np.array([10, 30, 20])
    a[:, 0, 0] = 0  # nobody
    for t in (0, 1, 3):
        found = flame_weights(a, steps, samples, temperature=t)
        for layer in range(2):
            for e in range(4):
                gamma = [(a[i, layer, e] / steps[i]) ** t * samples[i] for i in range(3)]
                expected = [g / sum(gamma) if sum(gamma) else 0.0 for g in gamma]
                assert found[:, layer, e].tolist() == pytest.approx(expected)
    fedavg = flame_weights(a, steps, samples, temperature=0)
    assert np.allclose(fedavg, (samples / 60)[:, None, None])
    assert np.isfinite(flame_weights(np.full((2, 1, 1), 1e200), np.ones(2), np.ones(2), temperature=4)).all()


def test_flame_starts_at_k_over_ki() -> None:
    assert [flame_rescale(8, k) for k in (8, 4, 2, 1)] == [1, 2, 4, 8]
    with pytest.raises(ValueError, match=r"9 experts per token is outside 1\.\.8"):
        flame_rescale(8, 9)
