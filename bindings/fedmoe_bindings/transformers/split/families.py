"""Which stock MoE family holds a dense model exactly, and the configuration of the one that a split writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import MixtralConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

# The key of the configuration that marks a split model, and says how it was made.
SPLIT = "fedmoe_split"
DENSE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# What every one of these families and of the MoE families has under one name.
_ALIKE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "use_cache",
)


def check_dense(config: PreTrainedConfig, name: str) -> None:
    """Refuse a dense model that no stock MoE family holds exactly.

    Raises:
        ValueError: another family, another activation, biases that the MoE families lack, or windows of attention.
    """
    kind, model = config.model_type, f"model {name!r} ({config.model_type})"
    if kind not in DENSE_FAMILIES:
        raise ValueError(f"{model} cannot be split; fedmoe splits {', '.join(DENSE_FAMILIES)}")
    if config.hidden_act != "silu":
        raise ValueError(f"{model} has hidden_act={config.hidden_act!r}, and split experts run silu; use another model")
    for key in ("mlp_bias", "attention_bias"):
        if getattr(config, key, False) and (key, kind) != ("attention_bias", "qwen3"):
            raise ValueError(f"{model} has {key}=true, which no MoE family of its form has; use another model")
    windows = [n for n in getattr(config, "layer_types", None) or () if n != "full_attention"]
    if windows or (kind == "mistral" and config.sliding_window):
        raise ValueError(f"{model} attends in windows, which the split does not carry over; use another model")


def moe_config(
    config: PreTrainedConfig, *, experts: int, top_k: int, layers: Sequence[int], told: dict[str, Any]
) -> PreTrainedConfig:
    """Return the configuration of the MoE model that holds a dense one with these layers split.

    Llama and Mistral with every layer split are Mixtral. With some layers dense they are Qwen2-MoE without biases, and
    with a shared expert of width 1 whose weights are 0, for that family cannot be without one. Qwen2 is Qwen2-MoE,
    Qwen3 is Qwen3-MoE.

    Args:
        config: of the dense model.
        experts, top_k: E and k of a layer.
        layers: numbers of the layers that are split.
        told: how the model was made, for the key ``fedmoe_split``.
    """
    width = config.intermediate_size // experts
    shared = {key: getattr(config, key) for key in _ALIKE if hasattr(config, key)} | {SPLIT: told}
    if (head_dim := getattr(config, "head_dim", None)) is not None:
        shared["head_dim"] = head_dim
    if config.model_type in ("llama", "mistral") and len(layers) == config.num_hidden_layers:
        return MixtralConfig(
            **shared, intermediate_size=width, num_local_experts=experts, num_experts_per_tok=top_k, sliding_window=None
        )
    mixed = {
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": width,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "mlp_only_layers": sorted(set(range(config.num_hidden_layers)) - set(layers)),
    }
    if config.model_type == "qwen3":
        return Qwen3MoeConfig(**shared, **mixed, attention_bias=config.attention_bias)
    return Qwen2MoeConfig(**shared, **mixed, qkv_bias=config.model_type == "qwen2", shared_expert_intermediate_size=1)
