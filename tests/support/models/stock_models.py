"""Tiny stock models of the three families, batches for them, and ways to compare with them; no test lives here."""

import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fedmoe_core.config.run_config import ModelConfig
from fedmoe_core.data.batches import Batch

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
