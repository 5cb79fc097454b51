"""The adapter against the stock models: loss, gradients, padding, classification, checkpointing, configuration."""

import copy

import numpy as np
import pytest
import torch
from stock_models import (
    FAMILIES,
    SMALL,
    STOCK_NAMES,
    VOCAB,
    E,
    K,
    batch_of,
    moe_names,
    named_grads,
    relative,
    stock_loss,
    stock_model,
)
from transformers import MixtralForSequenceClassification, OlmoeModel, Qwen3MoeForSequenceClassification

from fedmoe_bindings.transformers import TransformersAdapter, extract_submodel, load_adapter
from fedmoe_core.data.batches import Batch
from fedmoe_core.layer.recording import recording
from fedmoe_core.layer.router_loss import balance_loss
from fedmoe_core.model.submodel import SubModel


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
    adapter.configure(adapter.state(), SubModel(permitted_LE=permitted_LE))
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
    adapter.configure(state, SubModel(permitted_LE=permitted, train_dense=True))
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
    adapter.configure(state, SubModel(permitted_LE=permitted, trainable_LE=trainable))
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
    adapter.configure(state, SubModel(train_head=False, train_router=False))
    assert not any(key.startswith("dense.") or "router" in key for key in adapter.trained())
    adapter.configure(state, SubModel(train_dense=True))
    assert set(adapter.trained()) == set(state)


def test_configure_lowers_top_k_and_gives_it_back():
    adapter = load_adapter("tiny", model_config=SMALL, vocab_size=VOCAB)
    state, batch = adapter.state(), batch_of()
    full = adapter.evaluate(batch).loss_sum
    adapter.configure(state, SubModel(top_k=1))
    adapter.loss(batch).backward()
    assert adapter.moe[0].scores.rows_B.sum() == batch.mask_SN.sum()
    adapter.configure(state)
    assert adapter.evaluate(batch).loss_sum == full


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"state": {k: v for k, v in s.items() if k != "moe.1.w_in"}}, "no moe.1.w_in"),
        (lambda s: {"state": s | {"moe.0.router": torch.zeros(1, 16)}}, r"moe.0.router has shape \(1, 16\)"),
        (lambda s: {"state": s, "submodel": SubModel(top_k=3)}, "top_k=3 is outside 1 to 2"),
        (lambda s: {"state": s, "submodel": SubModel(np.ones((3, E), dtype=bool))}, "3 and 2 rows"),
        (lambda s: {"state": s, "submodel": SubModel(np.zeros((2, E), dtype=bool))}, "no expert is permitted"),
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
    stock = stock_model("qwen3_moe", cls=Qwen3MoeForSequenceClassification, num_labels=3)
    adapter = TransformersAdapter(stock, task="classification", num_classes=3)
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
        generator = torch.Generator().manual_seed(seed)
        return adapter.loss(batch, token_dropout=probability, generator=generator).item()

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


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_smoothed_labels_mix_the_target_with_all_classes_alike(task):
    classes = {"num_classes": 3} if task == "classification" else {}
    adapter = load_adapter("tiny", task=task, model_config=SMALL, vocab_size=VOCAB, **classes)
    batch = batch_of(lengths=(10, 9, 4))
    outputs = []
    target = adapter.model.score if task == "classification" else adapter.model.lm_head
    hook = target.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    plain, smoothed = adapter.loss(batch), adapter.loss(batch, label_smoothing=0.3)
    hook.remove()
    log_p = outputs[0].double().log_softmax(dim=-1)
    if task == "classification":
        even = -log_p.mean()
    else:
        real_SN = batch.mask_SN[:, 1:] & batch.mask_SN[:, :-1]
        even = -log_p[:, :-1].mean(dim=-1)[real_SN].mean()
    assert relative(smoothed, 0.7 * plain + 0.3 * even) < 1e-5
    assert relative(smoothed, plain) > 1e-3


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
    assert result.loss_sum / result.count == pytest.approx(adapter.loss(batch_of(1), training=False).item(), rel=1e-6)


def test_balance_loss_reaches_the_routers_of_a_model():
    adapter = load_adapter("tiny", model_config=SMALL, vocab_size=VOCAB)
    with recording(adapter.model) as tape:
        (adapter.loss(batch_of()) + 0.1 * balance_loss(tape)).backward()
    assert tape.layers == tuple(adapter.moe)
    assert all(layer.router.grad.norm() > 0 for layer in adapter.moe)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_is_the_stock_model_again(family, tmp_path):
    stock = stock_model(family)
    adapter = TransformersAdapter(copy.deepcopy(stock))
    exported = adapter.export()
    assert type(exported) is type(stock)
    assert all(torch.equal(value, exported.state_dict()[name]) for name, value in stock.state_dict().items())
    exported.save_pretrained(tmp_path)
    again = type(stock).from_pretrained(tmp_path, dtype=torch.float32)
    assert relative(stock_loss(again, batch_of()), adapter.loss(batch_of())) < 1e-5
    adapter.configure(adapter.state(), SubModel(permitted_LE=np.tile(np.arange(E) < 3, (len(adapter.moe), 1))))
    with pytest.raises(ValueError, match="holds 3 of 6 experts"):
        adapter.export()


def test_classifiers_export_where_transformers_has_the_same_head():
    cls = Qwen3MoeForSequenceClassification
    stock = stock_model("qwen3_moe", cls=cls, num_labels=3)
    exported = TransformersAdapter(copy.deepcopy(stock), task="classification", num_classes=3, pool="last").export()
    assert isinstance(exported, cls)
    assert all(torch.equal(value, exported.state_dict()[name]) for name, value in stock.state_dict().items())
    with pytest.raises(ValueError, match="pool='last'"):
        TransformersAdapter(stock, task="classification", num_classes=3, pool="mean").export()
    trunk = stock_model("olmoe", cls=OlmoeModel)
    state = trunk.state_dict()
    adapter = TransformersAdapter(trunk, task="classification", num_classes=3, pool="last")
    with pytest.raises(ValueError, match="no classifier for 'olmoe'"):
        adapter.export()
    bare = adapter.export(head=False)
    assert type(bare) is OlmoeModel
    assert bare.state_dict().keys() == state.keys()
    assert all(torch.equal(value, bare.state_dict()[name]) for name, value in state.items())


def test_generation_is_that_of_the_stock_model():
    stock, batch = stock_model("qwen3_moe").eval(), batch_of(lengths=(6, 6))
    adapter = TransformersAdapter(copy.deepcopy(stock))
    options = {"attention_mask": batch.mask_SN.long(), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(adapter.model.generate(batch.tokens_SN, **options), stock.generate(batch.tokens_SN, **options))
