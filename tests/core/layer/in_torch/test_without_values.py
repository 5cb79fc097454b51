"""Layers whose values are not there yet, or not here: on meta, fake, offloaded; and how they get fresh ones."""

from __future__ import annotations

import pytest
import torch
from layer_cases import E, H, I, K, mask
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fedmoe_core import SharedExpert
from fedmoe_core.layer.moe import MoE
from fedmoe_kernels.formats import FORMATS
from fedmoe_kernels.slot_map import SlotMap

ODD = {"trainable": mask(1, 3), "permitted": mask(1, 2, 3, 5)}  # rows of the router are not in expert order
X = torch.randn(7, H, generator=torch.Generator().manual_seed(0))


def source() -> MoE:
    torch.manual_seed(0)
    return MoE(H, I, E, K, **ODD)


def built(way: str) -> MoE:
    if way == "device=":
        return MoE(H, I, E, K, device="meta", **ODD)
    with torch.device("meta"):
        return MoE(H, I, E, K, **ODD)


@pytest.mark.parametrize("way", ["device=", "with torch.device"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_made_on_meta_and_filled_is_the_layer(way: str, assign: bool) -> None:
    """Under the context the order of the router's rows stayed on meta, and the first forward failed for good."""
    layer = built(way)
    y = layer(X.to("meta"), torch.ones(7, dtype=torch.bool, device="meta"))
    assert (y.device.type, y.shape) == ("meta", X.shape)
    if not assign:
        layer.to_empty(device="cpu")
    layer.load_state_dict(source().state_dict(), assign=assign)
    assert torch.equal(layer(X), source()(X))


def test_to_meta_and_back() -> None:
    layer = source()
    state = layer.state_dict()
    layer(X)
    layer.to("meta")(X.to("meta"))
    layer.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(layer(X), source()(X))


def test_a_cohort_s_map_on_meta_is_not_read() -> None:
    table = torch.empty(2, 4, dtype=torch.int64, device="meta")
    assert SlotMap(table, 5).num_clients == 2
    with pytest.raises(ValueError, match="int64"):
        SlotMap(table.float(), 5)


@pytest.mark.parametrize("where", ["made inside", "given fake values"])
def test_fake_tensors_run_forward_and_backward(where: str) -> None:
    real = MoE(H, I, E, K, with_stats=True, **ODD)
    with FakeTensorMode() as mode:
        if where == "made inside":
            layer = MoE(H, I, E, K, with_stats=True, with_scores=True, **ODD)
        else:
            layer = real
            values = {n: mode.from_tensor(t) for n, t in [*real.named_parameters(), *real.named_buffers()]}
        x = torch.empty(7, H, requires_grad=True)
        y = torch.func.functional_call(layer, values, (x,)) if where == "given fake values" else layer(x)
        y.sum().backward()
    assert isinstance(y, FakeTensor)
    assert (y.shape, x.grad.shape) == ((7, H), (7, H))
    assert real(X).isfinite().all()  # nothing fake was left in it


def test_offloaded_layers_run() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(H, H), source(), nn.Linear(H, H))
    want = model(X)
    model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model[1].w_in.device.type == "meta"
    for _ in range(2):
        assert torch.equal(model(X), want)


def test_a_layer_made_empty_with_its_buffers_is_filled() -> None:
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights(include_buffers=True):
        layer = MoE(H, I, E, K, **ODD)
    layer.load_state_dict(source().state_dict(), assign=True)
    assert torch.equal(layer(X), source()(X))


def test_reset_parameters_draws_what_a_new_layer_draws() -> None:
    """Without it the usual loop over modules left what was in memory, outputs of 9e30."""
    options = dict(expert_bias=True, router_bias=True)
    torch.manual_seed(3)
    want = MoE(H, I, E, K, **options)
    with torch.device("meta"):
        model = nn.Sequential(MoE(H, I, E, K, shared=SharedExpert(H, I, gated=True), **options))
    model.to_empty(device="cpu")
    poison(model)
    torch.manual_seed(3)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    found, wanted = model[0].state_dict(), want.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert all(0.01 < value.std() < 0.03 for name, value in found.items() if name.startswith("shared"))


@pytest.mark.parametrize("form", [None, *FORMATS])
def test_reset_parameters_reaches_what_does_not_train(form: str | None) -> None:
    layer = MoE(64, 32, 4, 2, permitted=[True] * 3 + [False], trainable=[True] + [False] * 3, frozen_format=form)
    layer.start_out_scale(0.5)
    poison(layer)
    layer.reset_parameters()
    assert layer.out_scale == 1
    state = layer.global_state()
    assert all(0.01 < t.std() < 0.03 for t in (state.router, *state.w_in, *state.w_out))
    assert len({float(w.abs().sum()) for w in state.w_in}) == 3
    assert layer(torch.randn(5, 64)).isfinite().all()


def poison(module: nn.Module) -> None:
    def spoilt(tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, 9e30) if tensor.itemsize > 1 else tensor

    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.copy_(spoilt(tensor))
