"""peft's layout of experts' adapters and ours: the same change of every weight, and both ways round without loss."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn

from fedmoe_bindings.peft.factors import Factors, expert_lora, joined, layer_lora, of_layer_lora, paired

E, H, WIDE = 3, 5, 4  # WIDE is I, the intermediate size
SHAPES = (E, 2 * WIDE, H), (E, H, WIDE)
MATRICES = ("gate_up_proj", "down_proj")


class Experts(nn.Module):
    """Stacked experts as transformers keeps them, (E, N, C), or (E, C, N) where ``is_transposed``."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        for name, shape in zip(MATRICES, ((2 * WIDE, H), (H, WIDE)), strict=True):
            drawn = torch.randn(E, *(reversed(shape) if transposed else shape), dtype=torch.float64)
            setattr(self, name, nn.Parameter(drawn))


class Model(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.experts = Experts(transposed)


def wrappers(transposed: bool = False, **settings: object) -> dict[str, ParamWrapper]:
    """peft's wrappers by parameter, their factors drawn at random."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=[], target_parameters=[f"experts.{m}" for m in MATRICES], **settings)
    model = get_peft_model(Model(transposed), config)
    found = {m.parameter_name: m for m in model.modules() if isinstance(m, ParamWrapper)}
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    assert set(found) == set(MATRICES)
    return found


def ours(wrapper: ParamWrapper, *, adapter: str = "default", interleaved: bool = False) -> Factors:
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    return Factors.from_peft(a, b, E, scale=wrapper.scaling[adapter], interleaved=interleaved)


def change(factors: Factors) -> Tensor:
    return factors.scale * factors.b @ factors.a


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        dict(r=2, lora_alpha=3),
        dict(r=2, lora_alpha=3, use_rslora=True),
        dict(r=2, lora_alpha=3, rank_pattern={"experts.down_proj": 5}, alpha_pattern={"experts.gate_up_proj": 7}),
    ],
    ids=["alpha", "rslora", "patterns"],
)
def test_the_change_is_pefts_and_the_factors_come_back(transposed, settings):
    for name, wrapper in wrappers(transposed, **settings).items():
        factors = ours(wrapper)
        want = wrapper.get_delta_weight("default")
        got = change(factors)
        assert (got - (want.mT if transposed else want)).abs().max() < 1e-12, name
        a, b = factors.to_peft()
        assert torch.equal(a, wrapper.lora_A["default"].weight)
        assert torch.equal(b, wrapper.lora_B["default"].weight)


def test_rows_of_gate_and_up_in_turn_are_sorted_and_come_back():
    wrapper = wrappers(transposed=True, r=2)["gate_up_proj"]
    factors = ours(wrapper, interleaved=True)
    want = wrapper.get_delta_weight("default").mT
    assert (change(factors) - torch.cat([want[:, ::2], want[:, 1::2]], 1)).abs().max() < 1e-12
    a, b = factors.to_peft(interleaved=True)
    assert torch.equal(a, wrapper.lora_A["default"].weight)
    assert torch.equal(b, wrapper.lora_B["default"].weight)


def test_a_pair_has_one_rank_and_one_scale_and_changes_the_same():
    found = wrappers(r=2, rank_pattern={"experts.down_proj": 5}, alpha_pattern={"experts.gate_up_proj": 7})
    each = [ours(found[name]) for name in MATRICES]
    assert each[0].rank != each[1].rank
    assert each[0].scale != each[1].scale
    pair = paired(*each, *SHAPES)
    lora = layer_lora(*pair)
    assert lora.rank == 5
    for before, after, name in zip(each, of_layer_lora(lora), ("w_in", "w_out"), strict=True):
        assert (change(after) - change(before)).abs().max() < 1e-12
        assert (lora.change(name, 1) - change(before)[1]).abs().max() < 1e-12
    for missing in (0, 1):
        half = paired(*(None if side == missing else f for side, f in enumerate(each)), *SHAPES)
        assert not change(half[missing]).any()
        assert (change(half[1 - missing]) - change(each[1 - missing])).abs().max() < 1e-12
    with pytest.raises(ValueError, match=r"the adapters of w_out .* are of another model"):
        paired(*each, SHAPES[0], (E, H, WIDE + 1))
    with pytest.raises(ValueError, match="neither w_in nor w_out"):
        paired(None, None, *SHAPES)


def test_several_adapters_add_up_and_gradients_reach_pefts_own_parameters():
    first, second = (wrappers(r=rank, lora_alpha=alpha)["down_proj"] for rank, alpha in ((2, 3), (4, 1)))
    both = joined([ours(first), ours(second)])
    want = first.get_delta_weight("default") + second.get_delta_weight("default")
    assert (change(both) - want).abs().max() < 1e-12
    upstream = torch.randn_like(want)
    leaves = [w.lora_A["default"].weight for w in (first, second)] + [
        w.lora_B["default"].weight for w in (first, second)
    ]
    truth = torch.autograd.grad(want, leaves, upstream)
    lora = expert_lora(*paired(None, both, *SHAPES))
    assert all(factor.is_contiguous() for factor in (lora.a_in, lora.b_in, lora.a_out, lora.b_out))
    for got, true in zip(
        torch.autograd.grad(lora.scale * lora.b_out @ lora.a_out, leaves, upstream), truth, strict=True
    ):
        assert (got - true).abs().max() < 1e-12


def test_factors_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"lora_A \(7, 5\) and lora_B \(4, 7\) are not adapters of 3 experts"):
        Factors.from_peft(torch.zeros(7, 5), torch.zeros(4, 7), 3, scale=1.0)
