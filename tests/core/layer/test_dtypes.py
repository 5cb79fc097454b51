"""Dtypes of a layer: float32 routers, parameters cast without their buffers, and errors that name what was passed."""

from __future__ import annotations

import pytest
import torch
from layer_cases import E, H, I, K, dense, mask, relative
from torch import Tensor

from fedmoe_core.layer.graft import GraftSpec, fresh_graft
from fedmoe_core.layer.lora import LayerLora
from fedmoe_core.layer.moe import MoE
from fedmoe_core.layer.recording import recording
from fedmoe_core.layer.router_loss import balance_loss

HALF = torch.bfloat16
KINDS = {
    "all train": {},
    "some train": {"permitted": mask(0, 2, 3, 4), "trainable": mask(2, 4)},
    "none": {"trainable": mask()},
}


def made(dtype: torch.dtype = torch.float32, **options: object) -> MoE:
    return MoE.from_dense(*(w.to(dtype) for w in dense()), K, **options)


def tokens(dtype: torch.dtype = HALF, count: int = 9) -> Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_in_bfloat16_beside_buffers_in_float32_run(kind: str) -> None:
    """As under FSDP2, which casts parameters only: it was "expected m1 and m2 to have the same dtype"."""
    layer, low = made(**KINDS[kind]), made(HALF, **KINDS[kind])
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(HALF)
    x, x_low = tokens().requires_grad_(), tokens().requires_grad_()
    y, y_low = layer(x), low(x_low)
    assert y.dtype == HALF
    y.float().square().sum().backward()
    y_low.float().square().sum().backward()
    # Frozen weights are rounded in the forward; rest rows of the router stay exact only where no row of it trains.
    assert relative(y.float(), y_low.float()) < (1e-6 if kind != "none" else 0.05)
    assert relative(x.grad.float(), x_low.grad.float()) < (1e-6 if kind != "none" else 0.05)
    assert all(p.grad.dtype == HALF for p in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_float32_router_in_a_bfloat16_layer(kind: str) -> None:
    """Each half of the router, bias included, may be float32; its product is float32 anyway."""
    layer = made(HALF, **KINDS[kind])
    layer.router.data, layer.router_rest = layer.router.data.float(), layer.router_rest.float()
    want = layer(tokens())
    layer.router_rest = layer.router_rest.to(HALF)  # bfloat16 numbers are float32 numbers
    x = tokens().requires_grad_()
    assert torch.equal(layer(x), want)
    layer(x).float().sum().backward()
    if len(layer.router):
        assert layer.router.grad.dtype == torch.float32


@pytest.mark.parametrize("autocast", [False, True])
def test_the_router_computes_in_float32(autocast: bool) -> None:
    """Under autocast its product was bfloat16: 2.6 % of the tokens went to other experts (E = 64, k = 8)."""
    torch.manual_seed(0)
    layer, x = MoE(64, 32, 32, 4), torch.randn(512, 64)
    if not autocast:
        layer, x = layer.to(HALF), x.to(HALF)
    exact = (x.double() @ layer.router.double().T).detach()
    plain = MoE(64, 32, 32, 4, float32_router=False)
    plain.load_state_dict(layer.state_dict())
    plain.to(layer.router.dtype)
    logits = []
    for one in (layer, plain):
        with recording(one) as tape, torch.autocast("cpu", HALF, enabled=autocast):
            one(x)
            logits.append(tape.take_logits(0).detach())
    assert [t.dtype for t in logits] == [torch.float32, HALF]
    assert relative(logits[0].double(), exact) < 1e-6
    assert relative(logits[1].double(), exact) > 1e-4


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_the_gradients_of_the_router_are_those_of_a_float32_linear(masked: bool, dtype: torch.dtype) -> None:
    layer, x = made(dtype), tokens(dtype, 40).requires_grad_()
    real = torch.arange(40) < 33 if masked else torch.ones(40, dtype=torch.bool)
    weight_TE = torch.randn(40, E, generator=torch.Generator().manual_seed(1))
    with recording(layer) as tape:
        layer(x, real if masked else None)
        (tape.take_logits(0) * weight_TE[real]).sum().backward()
    router, x_true = layer.router.detach().float().requires_grad_(), x.detach().float().requires_grad_()
    ((x_true @ router.T)[real] * weight_TE[real]).sum().backward()
    assert torch.equal(layer.router.grad, router.grad.to(dtype))
    assert torch.equal(x.grad, x_true.grad.to(dtype))


def test_float32_layers_keep_their_bits_with_and_without_the_float32_router() -> None:
    outputs = []
    for wide in (True, False):
        layer, x = made(float32_router=wide), tokens(torch.float32).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        outputs.append((y, x.grad, layer.router.grad, layer.w_in.grad))
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))


def test_nothing_but_x_itself_is_kept_for_the_router() -> None:
    """A float32 copy of bfloat16 tokens would be 268 MB at 32768 tokens of 2048."""
    layer, x, kept = MoE(64, 32, 8, 2, dtype=HALF), torch.randn(256, 64, dtype=HALF), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x, torch.arange(256) < 200)
    assert (HALF, (256, 64)) in kept
    assert (torch.float32, (256, 64)) not in kept


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("how", ["argument", "attribute", "autocast", "narrow router"])
def test_padding_may_hold_anything(value: float, dtype: torch.dtype, how: str) -> None:
    """0 x NaN is NaN: every row of the router's gradient was, and clipping by norm then spoilt all else."""
    layer = made(dtype, float32_router=how != "narrow router", with_scores=True, with_stats=True)
    clean, x = tokens(dtype), tokens(dtype)
    real = torch.arange(9) > 2
    clean[~real], x[~real] = 0.0, value
    results = []
    for given in (clean, x):
        layer.zero_grad()
        layer.scores.reset()
        leaf = given.clone().requires_grad_()
        layer.token_mask = real if how == "attribute" else None
        with torch.autocast("cpu", HALF, enabled=how == "autocast"):
            y = layer(leaf, None if how == "attribute" else real)
        y[real].float().square().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in layer.parameters()), layer.scores.leaf_B7.grad])
        results[-1].append(layer.last_stats.prob_sum_E)
    for with_zeros, with_value in zip(*results, strict=True):
        assert with_value.isfinite().all()
        assert torch.equal(with_zeros, with_value)


def test_frozen_experts_of_another_dtype_are_converted_and_it_is_said(recwarn: pytest.WarningsRecorder) -> None:
    layer = MoE(256, 512, 8, 2, trainable=[True] + [False] * 7)
    layer.w_in.data, layer.w_out.data = layer.w_in.data.to(HALF), layer.w_out.data.to(HALF)
    layer(torch.randn(3, 256).to(HALF))
    said = [str(w.message) for w in recwarn if "converted" in str(w.message)]
    assert len(said) == 2
    assert "layer.w_in_frozen = layer.w_in_frozen.to(torch.bfloat16)" in said[0]
    exec(said[0].split("store it so: ")[1], {"layer": layer, "torch": torch})
    assert layer.w_in_frozen.dtype == HALF


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (tokens(HALF), r"x is torch.bfloat16, the experts of this MoE layer are torch.float32; convert one of them"),
        (tokens(torch.float64), "x is torch.float64"),
        (torch.zeros(3, H, dtype=torch.int64), "x is torch.int64"),
        (torch.zeros(3, H, device="meta"), "x is on meta, this MoE layer on cpu; move one of them"),
    ],
)
def test_an_x_that_does_not_fit_is_named(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made()(x)


@pytest.mark.parametrize("name", ["token_mask", "token_mask_T"])
@pytest.mark.parametrize(
    "bad", [torch.ones(6, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool), torch.ones(5, dtype=torch.bool)]
)
def test_a_mask_is_named_as_it_was_given(name: str, bad: Tensor) -> None:
    """It was called valid_T, a name that no user of the layer knows."""
    layer, given = made(), None
    if name == "token_mask":
        layer.token_mask = bad
    else:
        given = bad
    with pytest.raises(ValueError, match=rf"^{name} is .*must be torch.bool \(6,\) on cpu, one entry for each token"):
        layer(torch.zeros(2, 3, H), given)


@pytest.mark.parametrize("to", [HALF, torch.float16, torch.float64])
def test_to_casts_what_is_learnt_and_keeps_what_decides(to: torch.dtype) -> None:
    layer = made(**KINDS["some train"]).to(to)
    assert {t.dtype for t in layer.own_tensors()} == {to}
    x = tokens(to).requires_grad_()
    layer(x).float().sum().backward()
    assert x.grad.dtype == layer.w_in.grad.dtype == to
    assert I > H


@pytest.mark.parametrize("default", [HALF, torch.float64])
def test_torch_s_default_dtype_changes_no_draw_and_no_sum(default: torch.dtype) -> None:
    """Sums that follow it stall in bfloat16, and adapters of one seed would differ."""
    results, weights, x = [], [w.float() for w in dense()], tokens(torch.float32)
    for now in (torch.float32, default):
        torch.set_default_dtype(now)
        try:
            layer = made(with_scores=True, with_stats=True)
            with recording(layer) as tape:
                layer(x).square().sum().backward()
                loss = balance_loss(tape)
            lora = LayerLora.fresh(*weights[1:], rank=3, scale=1.0, seed=0)
            sums, stats = layer.scores.leaf_B7.grad, layer.last_stats.prob_sum_E
            experts = fresh_graft(layer, GraftSpec(3, 4, 2), seed=0).experts
        finally:
            torch.set_default_dtype(torch.float32)
        results.append([sums, stats, loss, lora.a_in, experts.w_in])
    for name, one, other in zip(("sums", "stats", "loss", "adapters", "graft"), *results, strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name
