"""A split model is the dense one when all experts run, and its parts are what a client's few experts compute."""

import warnings

import numpy as np
import pytest
import torch
from dense_models import EXPERTS, FAMILIES, LAYERS, WIDTH, K, dense_model, some_tokens
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

from fedmoe_bindings.transformers import use_fedmoe
from fedmoe_bindings.transformers.live.adapter import TransformersAdapter
from fedmoe_bindings.transformers.live.writing import own_model, require_same
from fedmoe_bindings.transformers.split.clusters import balanced_clusters, neurons_of, random_clusters
from fedmoe_bindings.transformers.split.families import SPLIT
from fedmoe_bindings.transformers.split.measure import all_experts, largest_difference, next_token_loss
from fedmoe_bindings.transformers.split.router import RouterFit
from fedmoe_bindings.transformers.split.split import TEMPERATURE, matrices, moe_of, part, split_layers
from fedmoe_core.data.batches import Batch
from fedmoe_core.model.submodel import SubModel

HELD = torch.tensor([[True, False, False, True], [False, True, False, False]])


def split_model(family="llama", layers="last:2", top_k=K, seed=0):
    dense = dense_model(family, seed=seed)
    numbers = split_layers(layers, LAYERS)
    parts = part(dense, some_tokens(), experts=EXPERTS, top_k=top_k, layers=numbers)
    return dense, parts, moe_of(dense, parts, told={})


@pytest.mark.parametrize(
    ("family", "layers", "made"),
    [
        *((family, "last:2", "qwen3_moe" if family == "qwen3" else "qwen2_moe") for family in FAMILIES),
        ("llama", "all", "mixtral"),
        ("mistral", "all", "mixtral"),
        ("qwen2", "all", "qwen2_moe"),
        ("qwen3", "all", "qwen3_moe"),
    ],
)
def test_all_experts_of_a_saved_split_are_the_dense_model(family, layers, made, tmp_path):
    dense, parts, moe = split_model(family, layers)
    moe.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert stock.config.model_type == made
    assert getattr(stock.config, SPLIT)["layers"] == list(split_layers(layers, LAYERS))
    tokens_SN, size = some_tokens(seed=1), float(dense(some_tokens(seed=1)).logits.detach().abs().max())
    apart = largest_difference(dense, stock, tokens_SN)
    assert apart > 1e-2 * size  # k of E is another function
    with all_experts(stock, parts.neurons, equally=True):
        assert largest_difference(dense, stock, tokens_SN) < 1e-5 * size
    with all_experts(stock, parts.neurons):
        assert largest_difference(dense, stock, tokens_SN) < 0.05 * apart
        assert abs(next_token_loss(stock, tokens_SN) - next_token_loss(dense, tokens_SN)) < 1e-2
    assert largest_difference(dense, stock, tokens_SN) == apart  # put back


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_live_model_is_the_stock_one_and_comes_back_to_the_bit(family):
    _, parts, moe = split_model(family)
    before = {name: value.clone() for name, value in moe.state_dict().items()}
    tokens_SN = some_tokens(seed=1)
    want = next_token_loss(moe, tokens_SN)
    adapter = TransformersAdapter(moe)
    assert [layer.rule.renormalize for layer in adapter.moe] == ["share", "share"]
    assert adapter.moe[0].rule.of == K
    assert adapter.moe[0].rule.temperature == TEMPERATURE
    first = min(parts.routers)
    torch.testing.assert_close(adapter.state()["moe.0.router"], parts.routers[first], rtol=1e-6, atol=0)
    found = adapter.evaluate(Batch(tokens_SN, torch.ones_like(tokens_SN, dtype=torch.bool)))
    assert found.loss_sum / found.count == pytest.approx(want, rel=1e-5)
    after = adapter.export().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def without_neurons(dense, parts, held_LE):
    """The dense model with the down projection of every absent expert's neurons at 0."""
    for row_E, (layer, neurons_EJ) in zip(held_LE, sorted(parts.neurons.items()), strict=True):
        dense.model.layers[layer].mlp.down_proj.weight.data[:, neurons_EJ[~row_E].flatten()] = 0.0
    return dense


@pytest.mark.parametrize(("absent", "right"), [("auto", True), ("share", True), ("renormalize", False)])
def test_a_client_with_fewer_experts_than_choices_keeps_the_scale_of_their_outputs(absent, right):
    dense, parts, moe = split_model(top_k=EXPERTS)
    adapter = TransformersAdapter(moe, absent=absent)
    submodel = SubModel(HELD.numpy(), HELD.numpy())
    if right:
        adapter.configure(adapter.state(), submodel)
    else:
        said = r"choose n < 4 experts of a split model, .* by 4 / n, so one expert by 4; set train\.absent"
        with pytest.warns(RuntimeWarning, match=said):
            adapter.configure(adapter.state(), submodel)
    tokens_SN = some_tokens(seed=1)
    batch = Batch(tokens_SN, torch.ones_like(tokens_SN, dtype=torch.bool))
    found = adapter.evaluate(batch)
    want = next_token_loss(without_neurons(dense, parts, HELD), tokens_SN)
    assert (abs(found.loss_sum / found.count - want) < 1e-2) == right


def test_share_is_refused_where_weights_do_not_sum_to_one():
    from stock_models import stock_model

    with pytest.raises(ValueError, match="absent='share' is for routers whose weights are a softmax that sums to 1"):
        TransformersAdapter(stock_model("olmoe"), absent="share")
    shared = TransformersAdapter(stock_model("mixtral"), absent="share")  # another split model, which does not say so
    assert shared.moe[0].rule.renormalize == "share"
    assert shared.moe[0].rule.temperature == 1.0


def test_clusters_are_equal_and_find_neurons_that_belong_together():
    generator = torch.Generator().manual_seed(0)
    centres_EF = torch.randn(EXPERTS, 24, generator=generator)
    kind_I = torch.randperm(WIDTH, generator=generator) % EXPERTS
    rows_IF = centres_EF[kind_I] + 0.1 * torch.randn(WIDTH, 24, generator=generator)
    expert_I = balanced_clusters(rows_IF[:, :12], rows_IF[:, 12:], EXPERTS, seed=1)
    assert torch.bincount(expert_I).tolist() == [WIDTH // EXPERTS] * EXPERTS
    assert {(int(a), int(b)) for a, b in zip(kind_I, expert_I, strict=True)} == {
        (kind, int(expert_I[kind_I == kind][0])) for kind in range(EXPERTS)
    }
    dealt_I = random_clusters(WIDTH, EXPERTS, seed=1)
    assert torch.bincount(dealt_I).tolist() == [WIDTH // EXPERTS] * EXPERTS
    assert sorted(neurons_of(dealt_I, EXPERTS).flatten().tolist()) == list(range(WIDTH))


def test_a_fitted_router_asks_for_the_experts_that_say_most():
    dense, parts, _ = split_model()
    layer = max(parts.neurons)
    gate_IH, up_IH, down_HI = matrices(dense, layer)
    x_TH = torch.randn(4000, 16, generator=torch.Generator().manual_seed(3)) + torch.randn(16)
    fit = RouterFit(gate_IH, up_IH, down_HI, parts.neurons[layer])
    for some_TH in x_TH[:3000].split(500):
        fit.add(some_TH)
    held_TH = x_TH[3000:]
    inside_TI = silu(held_TH @ gate_IH.T) * (held_TH @ up_IH.T)
    norms_TE = torch.stack([(inside_TI[:, n] @ down_HI[:, n].T).norm(dim=1) for n in parts.neurons[layer]], dim=1)
    chosen_TK = (held_TH @ fit.solve().T).topk(K, dim=1).indices
    caught, most = norms_TE.gather(1, chosen_TK).sum(), norms_TE.topk(K, dim=1).values.sum()
    by_chance = norms_TE.mean() * K * len(held_TH)
    assert caught > 0.5 * (most + by_chance)


def test_what_cannot_be_split_so_is_refused():
    dense = dense_model("llama")
    with pytest.raises(ValueError, match="5 experts do not divide the width 32 of the MLPs; give for example 4"):
        part(dense, some_tokens(), experts=5, top_k=2, layers=[3])
    with pytest.raises(ValueError, match="top_k=9 of 4 experts is impossible; choose 1 to 4"):
        part(dense, some_tokens(), experts=4, top_k=9, layers=[3])
    with pytest.raises(ValueError, match="layers='last:5' asks for 5 of 4 layers; give last:4 or all"):
        split_layers("last:5", LAYERS)


@pytest.mark.parametrize(("held", "top_k"), [([1, 3], K), ([2], K), ([0, 1, 2, 3], 1)])
def test_a_client_with_fewer_choices_is_exported_as_what_it_computes(held, top_k):
    _, _, moe = split_model()
    adapter = TransformersAdapter(moe)
    mask_LE = np.isin(np.arange(EXPERTS), held) & np.ones((2, 1), bool)
    submodel = SubModel(mask_LE, mask_LE, top_k=top_k)
    state = adapter.state()
    adapter.configure(state, submodel)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        stock = own_model(adapter.model, state, adapter._family, adapter.moe, submodel)
    tokens_SN = some_tokens(seed=1)
    require_same(stock, adapter.model, Batch(tokens_SN, torch.ones_like(tokens_SN, dtype=torch.bool)))
    assert stock.config.num_experts_per_tok == min(len(held), top_k)


def test_a_stock_router_that_renormalises_over_few_experts_says_by_how_much():
    _, _, moe = split_model()
    with pytest.warns(
        RuntimeWarning, match="1 of the k=2 experts .* multiplies what these add by 2; permit at least 2"
    ):
        use_fedmoe(moe, permitted=np.arange(EXPERTS) == 1)
