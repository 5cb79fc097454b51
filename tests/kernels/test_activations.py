"""Names of activations with a limit of their own, and what such a name may not say."""

import pytest
import torch

from fedmoe_kernels import reference
from fedmoe_kernels.activations import ACTIVATIONS, DEFAULT_LIMITS, is_gated, named, parts, width


@pytest.mark.parametrize("name", ["swiglu_oai:3", "swiglu_clamped:0.5", "swiglu_clamped:12"])
def test_a_limit_of_its_own_clamps_there_forward_and_backward(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    z_nF = (8 * torch.randn(40, 12, dtype=torch.float64, generator=generator)).requires_grad_()
    d_nI = torch.randn(40, 6, dtype=torch.float64, generator=generator)
    want_nI = reference.activate(z_nF, name)
    (want_nF,) = torch.autograd.grad(want_nI, z_nF, d_nI)
    act, h_nI, dz_nF = named(name), d_nI.new_full((40, 6), torch.nan), d_nI.new_full((40, 12), torch.nan)
    act.forward(z_nF.detach(), h_nI)
    torch.testing.assert_close(h_nI, want_nI.detach(), rtol=1e-12, atol=1e-12)
    act.prepare(z_nF.detach(), h_nI.fill_(torch.nan), dz_nF)
    torch.testing.assert_close(h_nI, want_nI.detach(), rtol=1e-12, atol=1e-12)
    act.backward(z_nF.detach(), d_nI.clone(), dz_nF)
    torch.testing.assert_close(dz_nF, want_nF, rtol=1e-12, atol=1e-12)
    limit = float(name.partition(":")[2])
    assert 0 < int((z_nF.abs() > limit).sum()) < z_nF.numel(), "one side of the clamps was not met"


def test_the_gradient_passes_at_the_limit_itself() -> None:
    for name, limit in DEFAULT_LIMITS.items():
        z_nF = torch.tensor([[limit, limit], [limit, -limit]], dtype=torch.float64, requires_grad=True)
        (want_nF,) = torch.autograd.grad(reference.activate(z_nF, name).sum(), z_nF)
        assert want_nF.count_nonzero() == 4
        dz_nF = torch.empty(2, 2, dtype=torch.float64)
        ACTIVATIONS[name].backward(z_nF.detach(), torch.ones(2, 1, dtype=torch.float64), dz_nF)
        torch.testing.assert_close(dz_nF, want_nF)


def test_names_with_and_without_a_limit() -> None:
    assert parts("swiglu_clamped") == ("swiglu_clamped", 10.0)
    assert parts("swiglu_oai:20") == ("swiglu_oai", 20.0)
    assert parts("gelu") == ("gelu", 0.0)
    assert (width("swiglu_oai:20", 5), width("gelu", 5)) == (10, 5)
    assert is_gated("swiglu_clamped:1e3")
    assert not is_gated("relu2")
    assert named("gelu") is ACTIVATIONS["gelu"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tanh", "activation is 'tanh'; choose one of swiglu"),
        ("swiglu:7", "swiglu has no limit, only swiglu_oai, swiglu_clamped have"),
        ("swiglu_oai:", "its limit must be a positive number, as in 'swiglu_oai:10'"),
        ("swiglu_oai:wide", "its limit must be a positive number"),
        ("swiglu_clamped:0", "its limit must be a positive number"),
        ("swiglu_clamped:inf", "its limit must be a positive number"),
        ("swiglu_clamped:nan", "its limit must be a positive number"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name: str, words: str) -> None:
    for ask in (parts, named, is_gated, lambda name: width(name, 4)):
        with pytest.raises(ValueError, match=words):
            ask(name)
