"""The transformers binding against the stock models: the adapter, the drop-in, sub-models, names and refusals."""

import copy
import json

import numpy as np
import pytest
import torch
from fedmoe_bindings.transformers import TransformersAdapter, extract_submodel, load_adapter, merge_submodel, use_fedmoe
from fedmoe_bindings.transformers_experts import fedmoe_experts
from fedmoe_bindings.transformers_load import SequenceClassifier
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    OlmoeConfig,
    OlmoeForCausalLM,
    OlmoeModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeForSequenceClassification,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fedmoe_core.adapter import Batch
from fedmoe_core.balance import balance_loss
from fedmoe_core.config import ModelConfig

VOCAB, E, K, LAYERS = 61, 6, 2, 3
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": K,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # router scores that differ; at 0.02 every expert looks alike
    "experts_implementation": "eager",
}
SMALL = ModelConfig(hidden_size=16, layers=2, heads=2, kv_heads=1, head_dim=8, experts=E, top_k=K, expert_width=12)


def config_of(family):
    if family == "mixtral":
        return MixtralConfig(intermediate_size=12, num_local_experts=E, **SIZES)
    if family == "olmoe":  # the one that does not renormalise
        return OlmoeConfig(intermediate_size=12, num_experts=E, norm_topk_prob=False, **SIZES)
    extra = {"moe_intermediate_size": 12, "intermediate_size": 20, "head_dim": 8, "num_experts": E}
    # layer 1 is a dense one: decoder stacks with and without experts in turn are Qwen's own
    return Qwen3MoeConfig(norm_topk_prob=True, tie_word_embeddings=True, mlp_only_layers=[1], **extra, **SIZES)


CAUSAL = {"mixtral": MixtralForCausalLM, "olmoe": OlmoeForCausalLM, "qwen3_moe": Qwen3MoeForCausalLM}
FAMILIES = sorted(CAUSAL)


def stock_model(family, seed=0, cls=None, **options):
    config = config_of(family)
    for key, value in options.items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return (cls or CAUSAL[family])(config)


def batch_of(seed=0, lengths=(11, 7, 4)):
    """Right-padded random tokens; ids from 1, since 0 is the padding id of the stock classifier."""
    generator = torch.Generator().manual_seed(seed)
    tokens_SN = torch.randint(1, VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask_SN = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Batch(tokens_SN * mask_SN, mask_SN, torch.arange(len(lengths)) % 3)


def stock_loss(model, batch):
    labels = batch.tokens_SN.masked_fill(~batch.mask_SN, -100)
    return model(input_ids=batch.tokens_SN, attention_mask=batch.mask_SN.long(), labels=labels).loss


def relative(value, truth):
    return float(((value - truth).norm() / truth.norm().clamp(min=1e-30)).detach())


def named_grads(adapter):
    """Gradients of an adapter that holds and trains everything, under the keys of its state."""
    inside = {id(p) for layer in adapter.moe for p in layer.parameters()}
    grads = {f"dense.{name}": p.grad for name, p in adapter.model.named_parameters() if id(p) not in inside}
    for number, layer in enumerate(adapter.moe):
        grads |= {f"moe.{number}.{name}": getattr(layer, name).grad for name in ("router", "w_in", "w_out")}
    return grads


def moe_names(model):
    return [name for name, module in model.named_modules() if hasattr(module, "experts")]


STOCK_NAMES = {"router": "gate.weight", "w_in": "experts.gate_up_proj", "w_out": "experts.down_proj"}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_equals_the_stock_model_in_logits_loss_and_every_gradient(family):
    stock, batch = stock_model(family), batch_of()
    names = moe_names(stock)
    adapter = TransformersAdapter(copy.deepcopy(stock))
    adapter_logits = adapter.model(input_ids=batch.tokens_SN, attention_mask=batch.mask_SN.long()).logits
    stock_logits = stock(input_ids=batch.tokens_SN, attention_mask=batch.mask_SN.long()).logits
    # without our keyword the mask stays out of the routing, as in the stock model: even padding places agree
    assert relative(adapter_logits, stock_logits) < 1e-5
    loss, want = adapter.loss(batch), stock_loss(stock.train(), batch)
    assert relative(loss, want) < 1e-5
    loss.backward()
    want.backward()
    truth = dict(stock.named_parameters())
    found = named_grads(adapter)
    for key, grad in found.items():
        place, _, name = key.rpartition(".")
        stock_key = key.removeprefix("dense.")
        if key.startswith("moe."):
            stock_key = f"{names[int(place.removeprefix('moe.'))]}.{STOCK_NAMES[name]}"
        assert relative(grad, truth.pop(stock_key).grad) < 1e-5, key
    assert not truth, f"parameters without a counterpart: {sorted(truth)}"


@pytest.mark.parametrize("family", FAMILIES)
def test_inv3_masked_adapter_equals_the_extracted_submodel(family):
    stock, batch = stock_model(family), batch_of()
    adapter = TransformersAdapter(copy.deepcopy(stock))
    permitted_LE = np.zeros((len(adapter.moe), E), dtype=bool)
    for row, ids in zip(permitted_LE, ([0, 2, 5], [1, 3, 4], [0, 1, 2]), strict=False):
        row[ids] = True
    adapter.configure(adapter.state(), permitted_LE=permitted_LE)
    sub = extract_submodel(stock, permitted_LE).train()
    loss, want = adapter.loss(batch), stock_loss(sub, batch)
    assert relative(loss, want) < 1e-5
    loss.backward()
    want.backward()
    grads, names = dict(sub.named_parameters()), moe_names(sub)
    for number, layer in enumerate(adapter.moe):
        for name, stock_name in STOCK_NAMES.items():
            truth = grads[f"{names[number]}.{stock_name}"].grad
            assert relative(getattr(layer, name).grad, truth) < 1e-5, (number, name)


def test_spec_names_every_tensor_once_and_tied_embeddings_once():
    adapter = TransformersAdapter(stock_model("qwen3_moe"))
    keys = [spec.key for spec in adapter.spec.params]
    assert len(keys) == len(set(keys))
    assert "dense.model.embed_tokens.weight" in keys
    assert "dense.lm_head.weight" not in keys
    assert (adapter.spec.num_layers, adapter.spec.num_experts, adapter.spec.top_k) == (2, E, K)
    assert (adapter.spec.hidden_size, adapter.spec.intermediate_size) == (16, 12)
    assert adapter.spec.family == "qwen3_moe"
    state = adapter.state()
    assert {spec.key: (spec.shape, spec.dtype) for spec in adapter.spec.params} == {
        key: (tuple(value.shape), value.dtype) for key, value in state.items()
    }
    total = sum(p.numel() for p in stock_model("qwen3_moe").parameters())
    assert sum(value.numel() for value in state.values()) == total
    assert "dense.lm_head.weight" in TransformersAdapter(stock_model("mixtral")).state()


def test_state_and_configure_round_trip_bit_for_bit_and_never_alias():
    adapter = TransformersAdapter(stock_model("qwen3_moe"))
    state = adapter.state()
    kept = {key: value.clone() for key, value in state.items()}
    permitted = np.zeros((2, E), dtype=bool)
    permitted[:, [1, 4]] = True
    adapter.configure(state, permitted_LE=permitted, train_dense=True)
    with torch.no_grad():
        for tensor in [*adapter.model.parameters(), *(b for layer in adapter.moe for b in layer.buffers())]:
            tensor.add_(1.0)
    with pytest.raises(ValueError, match="layer 0 holds 2 of 6 experts"):
        adapter.state()
    assert all(torch.equal(state[key], kept[key]) for key in kept), "configure aliased the state"
    adapter.configure(state)
    again = adapter.state()
    assert set(again) == set(kept)
    assert all(torch.equal(again[key], kept[key]) for key in kept)


def test_inv5_only_what_the_plan_trains_moves_and_trained_says_so():
    adapter = load_adapter("tiny", task="classification", model_config=SMALL, vocab_size=VOCAB, num_classes=3)
    state = adapter.state()
    permitted, trainable = np.zeros((2, E), dtype=bool), np.zeros((2, E), dtype=bool)
    permitted[:, [0, 2, 3]] = True
    trainable[0, [0, 3]] = True  # layer 1 trains nothing
    adapter.configure(state, permitted_LE=permitted, trainable_LE=trainable)
    before = {key: value.clone() for key, value in adapter.trained().items()}
    assert {key: tuple(value.shape) for key, value in before.items()} == {
        "moe.0.router": (2, 16),
        "moe.0.w_in": (2, 24, 16),
        "moe.0.w_out": (2, 16, 12),
        "dense.score.weight": (3, 16),
    }
    assert torch.equal(before["moe.0.w_in"], state["moe.0.w_in"][[0, 3]])
    params = [p for p in adapter.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=0.1, weight_decay=0.3)
    frozen = {name: b.clone() for name, b in adapter.model.named_buffers()}
    frozen |= {name: p.detach().clone() for name, p in adapter.model.named_parameters() if not p.requires_grad}
    adapter.loss(batch_of()).backward()
    optimizer.step()
    assert all(not torch.equal(before[key], value) for key, value in adapter.trained().items())
    now = dict(adapter.model.named_buffers()) | dict(adapter.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    adapter.configure(state, train_head=False, train_router=False)
    assert not any(key.startswith("dense.") or "router" in key for key in adapter.trained())
    adapter.configure(state, train_dense=True)
    assert set(adapter.trained()) == set(state)


def test_configure_lowers_top_k_and_gives_it_back():
    adapter = load_adapter("tiny", model_config=SMALL, vocab_size=VOCAB)
    state, batch = adapter.state(), batch_of()
    full = adapter.evaluate(batch).loss_sum
    adapter.configure(state, top_k=1)
    adapter.loss(batch).backward()
    assert adapter.moe[0].scores.rows_B.sum() == batch.mask_SN.sum()
    adapter.configure(state)
    assert adapter.evaluate(batch).loss_sum == full


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"state": {k: v for k, v in s.items() if k != "moe.1.w_in"}}, "no moe.1.w_in"),
        (lambda s: {"state": s | {"moe.0.router": torch.zeros(1, 16)}}, r"moe.0.router has shape \(1, 16\)"),
        (lambda s: {"state": s, "top_k": 3}, "top_k=3 is outside 1 to 2"),
        (lambda s: {"state": s, "permitted_LE": np.ones((3, E), dtype=bool)}, "3 and 2 rows"),
        (lambda s: {"state": s, "permitted_LE": np.zeros((2, E), dtype=bool)}, "no expert is permitted"),
    ],
)
def test_configure_refuses_by_name_and_changes_nothing(change, message):
    adapter = load_adapter("tiny", model_config=SMALL, vocab_size=VOCAB)
    before = adapter.state()
    with pytest.raises(ValueError, match=message):
        adapter.configure(**change(adapter.state()))
    after = adapter.state()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_for_real_tokens(family):
    adapter = TransformersAdapter(stock_model(family))
    whole = batch_of(lengths=(9, 5))
    alone = Batch(whole.tokens_SN[1:, :5], whole.mask_SN[1:, :5])
    garbage = torch.where(whole.mask_SN, whole.tokens_SN, 7)
    sums = [adapter.evaluate(Batch(tokens, whole.mask_SN)).loss_sum for tokens in (whole.tokens_SN, garbage)]
    assert sums[0] == sums[1], "the ids under the padding matter"
    both = adapter.evaluate(whole)
    first = adapter.evaluate(Batch(whole.tokens_SN[:1], whole.mask_SN[:1]))
    second = adapter.evaluate(alone)
    assert both.count == first.count + second.count == 8 + 4
    assert both.loss_sum == pytest.approx(first.loss_sum + second.loss_sum, rel=1e-5)
    adapter.loss(whole)
    assert [float(layer.last_stats.tokens) for layer in adapter.moe] == [14.0] * len(adapter.moe)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masked_first_tokens_leave_no_nan(attention):
    # token dropout can mask the first places, whose attention rows then have nothing to attend to
    adapter = TransformersAdapter(
        stock_model("qwen3_moe", cls=Qwen3MoeForSequenceClassification, num_labels=3),
        task="classification",
        num_classes=3,
    )
    adapter.model.model.set_attn_implementation(attention)
    batch = batch_of(lengths=(8, 8, 8))
    mask_SN = batch.mask_SN.clone()
    mask_SN[:, :3] = False
    loss = adapter.loss(Batch(batch.tokens_SN, mask_SN, batch.labels_S))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in adapter.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("cls", [Qwen3MoeForSequenceClassification, MixtralForSequenceClassification])
def test_last_pooling_equals_the_stock_classifier(cls):
    family = "mixtral" if cls is MixtralForSequenceClassification else "qwen3_moe"
    stock, batch = stock_model(family, cls=cls, num_labels=3), batch_of()
    want = stock.train()(
        input_ids=batch.tokens_SN, attention_mask=batch.mask_SN.long(), labels=batch.labels_S, use_cache=False
    )
    adapter = TransformersAdapter(copy.deepcopy(stock), task="classification", num_classes=3, pool="last")
    loss = adapter.loss(batch)
    assert relative(loss, want.loss) < 1e-5
    loss.backward()
    want.loss.backward()
    assert relative(adapter.model.score.weight.grad, stock.score.weight.grad) < 1e-5
    result = adapter.evaluate(batch)
    assert result.count == 3
    assert result.correct == int((want.logits.argmax(-1) == batch.labels_S).sum())
    assert result.loss_sum == pytest.approx(3 * float(want.loss.detach()), rel=1e-5)


def test_mean_pooling_is_the_mean_over_real_tokens_and_olmoe_gets_a_head():
    trunk, batch = stock_model("olmoe", cls=OlmoeModel), batch_of()
    adapter = TransformersAdapter(copy.deepcopy(trunk), task="classification", num_classes=3, pool="mean", seed=4)
    hidden_SNH = trunk(input_ids=batch.tokens_SN, attention_mask=batch.mask_SN.long()).last_hidden_state
    means = torch.stack([h[m].mean(dim=0) for h, m in zip(hidden_SNH, batch.mask_SN, strict=True)])
    logits = means @ adapter.model.score.weight.T
    assert relative(adapter.loss(batch), torch.nn.functional.cross_entropy(logits, batch.labels_S)) < 1e-5
    twin = TransformersAdapter(trunk, task="classification", num_classes=3, pool="mean", seed=4)
    assert torch.equal(twin.model.score.weight, adapter.model.score.weight)


def test_token_dropout_is_seeded_and_spares_one_token():
    adapter = load_adapter("tiny", task="classification", model_config=SMALL, vocab_size=VOCAB, num_classes=3)
    batch = batch_of(lengths=(10, 9, 1))

    def loss(seed, probability=0.5):
        return float(adapter.loss(batch, token_dropout=probability, generator=torch.Generator().manual_seed(seed)))

    state = torch.get_rng_state()
    assert loss(1) == loss(1) != loss(2)
    assert loss(1, 0.0) == loss(2, 0.0)
    assert torch.equal(torch.get_rng_state(), state)
    loss(3)
    assert 3 <= float(adapter.moe[0].last_stats.tokens) < 20  # some of 20 dropped, none of the sequences empty
    assert np.isfinite(loss(1, 1.0))
    language = load_adapter("tiny", model_config=SMALL, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="token_dropout is for classification"):
        language.loss(batch, token_dropout=0.5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_keeps_gradients_and_counts_once(family, reentrant):
    results = []
    for enabled in (False, True):
        adapter = TransformersAdapter(stock_model(family))
        if enabled:
            adapter.model.enable_input_require_grads()
            enable = getattr(adapter.model, "activation_checkpointing_enable", None)
            (enable or adapter.model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
        batch = batch_of()
        adapter.loss(batch).backward()
        # with padding in the batch: a mask lost in the repeated forward would show in the counts and the gradients
        assert [float(layer.last_stats.tokens) for layer in adapter.moe] == [22.0] * len(adapter.moe)
        results.append((named_grads(adapter), [layer.scores.taylor_abs_B.clone() for layer in adapter.moe]))
    for key, grad in results[0][0].items():
        assert torch.equal(grad, results[1][0][key]), key
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_evaluate_leaves_statistics_and_gradients_alone():
    adapter = load_adapter("tiny", model_config=SMALL, vocab_size=VOCAB)
    adapter.loss(batch_of()).backward()
    stats, rows = adapter.moe[0].last_stats, adapter.moe[0].scores.rows_B.clone()
    result = adapter.evaluate(batch_of(1))
    assert adapter.moe[0].last_stats is stats
    assert torch.equal(adapter.moe[0].scores.rows_B, rows)
    assert result.count == 19
    assert result.loss_sum / result.count == pytest.approx(float(adapter.loss(batch_of(1), training=False)), rel=1e-6)


def test_balance_loss_reaches_the_routers_of_a_model():
    adapter = load_adapter("tiny", model_config=SMALL, vocab_size=VOCAB)
    for layer in adapter.moe:
        layer.keep_logits = True
    (adapter.loss(batch_of()) + 0.1 * balance_loss(adapter.moe)).backward()
    assert all(layer.router.grad.norm() > 0 for layer in adapter.moe)


@pytest.mark.parametrize("family", FAMILIES)
def test_use_fedmoe_equals_eager_and_really_runs(family, monkeypatch):
    stock, batch = stock_model(family), batch_of()
    ours = use_fedmoe(copy.deepcopy(stock))
    calls = []

    def counted(*arguments):
        calls.append(1)
        return fedmoe_experts(*arguments)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "fedmoe", counted)
    loss, want = stock_loss(ours, batch), stock_loss(stock, batch)
    assert len(calls) == len(moe_names(stock))
    assert relative(loss, want) < 1e-5
    loss.backward()
    want.backward()
    truth = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, truth[name].grad) < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_inv3_use_fedmoe_under_a_mask_equals_the_submodel(family):
    stock, batch = stock_model(family), batch_of()
    plain = stock_loss(stock, batch)
    ours = use_fedmoe(copy.deepcopy(stock), permitted=np.arange(E) % 2 == 0)
    permitted = np.tile(np.arange(E) % 2 == 0, (len(moe_names(stock)), 1))
    loss = stock_loss(ours, batch)
    assert relative(loss, stock_loss(extract_submodel(stock, permitted), batch)) < 1e-5
    loss.backward()
    for name in moe_names(stock):
        block = ours.get_submodule(name)
        for grad in (block.gate.weight.grad, block.experts.gate_up_proj.grad, block.experts.down_proj.grad):
            assert not grad[1::2].any()
            assert grad[0::2].any()
    one = np.arange(E) == 4  # fewer permitted than k: transformers' own "no expert" mark, which eager skips as well
    use_fedmoe(ours, permitted=one)
    under_fedmoe = stock_loss(ours, batch)
    ours.set_experts_implementation("eager")
    assert relative(under_fedmoe, stock_loss(ours, batch)) < 1e-5
    assert relative(stock_loss(use_fedmoe(ours), batch), plain) < 1e-5, "the mask was not lifted"


TINY_OTHERS = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama():
    return LlamaForCausalLM(LlamaConfig(intermediate_size=16, **TINY_OTHERS))


def deepseek():
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **TINY_OTHERS,
            intermediate_size=16,
            moe_intermediate_size=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=4,
        )
    )


def dbrx():
    """A family without transformers' decorator: set_experts_implementation is silently without effect there."""
    ffn = {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16}
    attention = {"kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 1e4}
    return DbrxForCausalLM(
        DbrxConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=32, ffn_config=ffn, attn_config=attention)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [(llama, "'llama' model has no MoE layers"), (deepseek, "'deepseek_v3' is not supported"), (dbrx, "'dbrx'")],
)
def test_other_families_are_refused_by_name(make, message):
    model = make()
    for serve in (use_fedmoe, TransformersAdapter, lambda m: extract_submodel(m, np.ones(4, dtype=bool))):
        with pytest.raises(ValueError, match=message):
            serve(model)


def test_the_silent_trap_of_transformers_is_there_and_is_refused():
    model = dbrx()
    use_fedmoe(stock_model("mixtral"))  # so that the name is known
    model.set_experts_implementation("fedmoe")  # says nothing, does nothing
    with pytest.raises(ValueError, match="dbrx"):
        use_fedmoe(model)


def test_a_family_member_without_moe_layers_or_with_unserved_options_is_refused():
    dense = stock_model("qwen3_moe", mlp_only_layers=[0, 1, 2])
    with pytest.raises(ValueError, match="'qwen3_moe' model has no MoE layers; check mlp_only_layers"):
        TransformersAdapter(dense)
    with pytest.raises(ValueError, match="router jitter"):
        TransformersAdapter(stock_model("mixtral", router_jitter_noise=0.1))
    with pytest.raises(ValueError, match="hidden_act='gelu'"):
        TransformersAdapter(stock_model("mixtral", hidden_act="gelu"))
    with pytest.raises(ValueError, match="no language-model head"):
        TransformersAdapter(stock_model("olmoe", cls=OlmoeModel))


@pytest.mark.parametrize("family", FAMILIES)
def test_submodel_saves_loads_trains_and_merges_back(family, tmp_path):
    stock, batch = stock_model(family), batch_of()
    layers = len(moe_names(stock))
    permitted_LE = np.stack([np.isin(np.arange(E), ids) for ids in ([0, 2], [1, 5], [3, 4])])[:layers]
    sub = extract_submodel(stock, permitted_LE)
    assert sub.num_parameters() < stock.num_parameters()
    sub.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["fedmoe_kept_experts"] == [[0, 2], [1, 5], [3, 4]][:layers]
    loaded = type(stock).from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), sub.state_dict().values(), strict=True))
    assert relative(stock_loss(loaded, batch), stock_loss(sub, batch)) < 1e-6
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1.0)
    assert merge_submodel(stock, loaded) is stock
    for name, value in stock.state_dict().items():
        if ".gate.weight" in name or ".experts." in name:
            number = [block + "." in name for block in moe_names(stock)].index(True)
            moved = [not torch.equal(value[e], before[name][e]) for e in range(E)]
            assert moved == permitted_LE[number].tolist(), name
        else:
            assert torch.equal(value, before[name] + 1.0), name


def test_submodels_that_cannot_be_are_refused():
    stock = stock_model("mixtral")
    uneven = np.ones((LAYERS, E), dtype=bool)
    uneven[1, :3] = False
    with pytest.raises(ValueError, match="layers keep 3 to 6 experts"):
        extract_submodel(stock, uneven)
    with pytest.raises(ValueError, match="layer 2 has no permitted expert"):
        extract_submodel(stock, np.arange(LAYERS * E).reshape(LAYERS, E) < 12)
    with pytest.raises(ValueError, match=r"permitted is int64 of shape \(6,\)"):
        use_fedmoe(stock, permitted=np.arange(E))
    sub = extract_submodel(stock, np.arange(E) < 3)
    with pytest.raises(ValueError, match="another mask"):
        merge_submodel(stock, sub, np.arange(E) > 2)
    with pytest.raises(ValueError, match="pass the mask"):
        merge_submodel(stock, stock_model("mixtral", seed=1))


def test_tiny_is_the_small_qwen3_moe_and_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    one, same, other = (load_adapter("tiny", vocab_size=300, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    spec = one.spec
    assert (spec.hidden_size, spec.num_layers, spec.num_experts, spec.top_k, spec.intermediate_size) == (
        128,
        2,
        16,
        2,
        64,
    )
    assert all(torch.equal(a, b) for a, b in zip(one.state().values(), same.state().values(), strict=True))
    assert not torch.equal(one.state()["moe.0.w_in"], other.state()["moe.0.w_in"])
    millions = sum(p.numel() for p in load_adapter("tiny").model.parameters()) / 1e6
    assert round(millions, 2) == 1.15  # the model that was measured


@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_load_adapter_reads_a_directory_without_network_or_noise(task, tmp_path, capfd):
    stock = stock_model("olmoe")
    stock.save_pretrained(tmp_path)
    capfd.readouterr()
    adapter = load_adapter(str(tmp_path), task=task, num_classes=3, vocab_size=VOCAB)
    assert capfd.readouterr() == ("", "")
    held = adapter.state()
    assert torch.equal(held["moe.1.w_in"], stock.state_dict()["model.layers.1.mlp.experts.gate_up_proj"])
    assert ("dense.score.weight" in held) == (task == "classification")
    if task == "classification":
        assert adapter.model.pool == "last"


def test_a_saved_classifier_keeps_its_head_when_the_classes_agree(tmp_path):
    stock = stock_model("qwen3_moe", cls=Qwen3MoeForSequenceClassification, num_labels=3)
    stock.save_pretrained(tmp_path)
    same = load_adapter(str(tmp_path), task="classification", num_classes=3)
    assert torch.equal(same.model.score.weight, stock.score.weight)
    assert load_adapter(str(tmp_path), task="classification", num_classes=5).model.score.weight.shape == (5, 16)


def test_names_and_files_that_cannot_be_loaded_are_named(tmp_path):
    with pytest.raises(ValueError, match="'nowhere' is not 'tiny', an existing directory, or a hub id"):
        load_adapter("nowhere")
    with pytest.raises(ValueError, match="not 'tiny', an existing directory"):
        load_adapter(str(tmp_path / "missing"))
    with pytest.raises(OSError, match="cannot be loaded") as raised:
        load_adapter(str(tmp_path))
    assert "\n" not in str(raised.value)
    LlamaConfig(**TINY_OTHERS).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="'llama' model has no MoE layers"):
        load_adapter(str(tmp_path / "llama"))
    stock_model("mixtral").save_pretrained(tmp_path / "mixtral")
    with pytest.raises(ValueError, match="61 token ids, the tokenizer 2048"):
        load_adapter(str(tmp_path / "mixtral"), vocab_size=2048)
    with pytest.raises(ValueError, match="num_classes=1"):
        load_adapter(str(tmp_path / "mixtral"), task="classification", num_classes=1)
    (tmp_path / "mixtral" / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(OSError, match="cannot be loaded"):
        load_adapter(str(tmp_path / "mixtral"))


def test_an_incomplete_checkpoint_is_not_filled_with_random_weights(tmp_path):
    from safetensors.torch import load_file, save_file

    stock_model("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"lacks the weight model.layers.1.self_attn.q_proj.weight"):
        load_adapter(str(tmp_path))


def test_pickled_weights_are_not_read(tmp_path):
    stock = stock_model("mixtral")
    stock.config.save_pretrained(tmp_path)
    torch.save(stock.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="cannot be loaded"):
        load_adapter(str(tmp_path))


def test_a_hub_id_respects_the_offline_switch():
    # HF_HUB_OFFLINE is read when the hub library is imported, hence another process
    import os
    import subprocess
    import sys

    script = "from fedmoe_bindings.transformers import load_adapter; load_adapter('some-owner/some-model')"
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "OSError: model 'some-owner/some-model' cannot be loaded" in run.stderr.splitlines()[-1]


def test_classifier_options_that_cannot_be_are_named():
    trunk = stock_model("olmoe", cls=OlmoeModel)
    with pytest.raises(ValueError, match="pool='max'"):
        SequenceClassifier.over(trunk, num_classes=3, pool="max", seed=0)
    with pytest.raises(ValueError, match="not a classifier"):
        SequenceClassifier.over(stock_model("olmoe"), num_classes=3, pool="mean", seed=0)
    adapter = TransformersAdapter(trunk, task="classification", num_classes=3)
    with pytest.raises(ValueError, match="needs labels_S"):
        adapter.loss(Batch(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool)))
    with pytest.raises(ValueError, match="top_k=9 exceeds experts=4"):
        load_adapter("tiny", model_config=ModelConfig(experts=4, top_k=9))
