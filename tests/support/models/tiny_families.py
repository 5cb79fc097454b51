"""A tiny random model of every MoE family of the installed transformers: its default configuration, made small."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.models
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from fedmoe_bindings.transformers.stock.blocks import counts_experts, stock_blocks

VOCAB, EXPERTS = 96, 8
# What a number of a configuration becomes, by the first pattern that its name has.
SIZES = [
    (r"vocab_size", VOCAB),
    (r"^(hidden_size|d_model|moe_hidden_size|n_embd)$", 32),
    (r"^(d_ff|d_kv)$", 24),
    (r"^(num_hidden_layers|num_layers|n_layers|num_decoder_layers)$", 2),
    (r"^num_sparse_(en|de)coder_layers$", 1),
    (r"^(num_attention_heads|n_heads)$", 4),
    (r"^num_key_value_heads$", 2),
    (r"head_dim$", 8),
    (r"intermediate_size", 24),
    (r"shared_experts$", 1),
    (r"per_tok(en)?$|^moe_topk$|^moe_k$|^top_k_experts$|router_topk$|^moe_top_k$", 2),
    (r"lora_rank$", 8),
    (r"^(first_k_dense_replace|num_dense_layers|moe_layer_start_index)$", 0),
    (r"^(n_group|topk_group|num_expert_group)$", 1),
    (r"^(pad_token_id|bos_token_id)$", 0),
    (r"^eos_token_id$", 1),
    (r"max_position_embeddings", 128),
    (r"^hidden_size_per_layer_input$", 8),
]
ATTENDING: dict[str, Any] = {"layer_types": ["full_attention"] * 2}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
SPARSE: dict[str, Any] = {"mlp_layer_types": ["sparse"] * 2}
# What the patterns do not say, by family.
MORE: dict[str, dict[str, Any]] = {
    "beam": SPARSE,
    "bailing_hybrid": ATTENDING,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 24, "hidden_size": 32, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "deepseek_ocr2": SPARSE,
    "diffusion_gemma": {"num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 24},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 0},
    "ernie4_5_vl_moe": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
    "flint": {"mlp_only_layers": []},
    "gemma4": {"enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 24},
    "glm4v_moe": {"head_dim": 16, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
    "glm5_next": {"qk_rope_head_dim": 0, "layer_types": ["indexed_attention"] * 2} | SPARSE,
    "granitemoehybrid": ATTENDING | {"mamba_n_heads": 4},
    "hy_v4_vl": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "jamba": {"attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0},
    "kimi_linear": ATTENDING | SPARSE,
    "lfm2_moe": ATTENDING,
    "llama4": {"intermediate_size_mlp": 24, "interleave_moe_layer_step": 1},
    "qwen3_5_moe": ATTENDING,
    "qwen3_next": ATTENDING,
    "qwen4_exp": {
        "layer_types": ["full_attention"] * 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "switch_transformers": {"router_jitter_noise": 0.0, "dropout_rate": 0.0, "decoder_start_token_id": 0},
    "zaya": {"num_experts_per_tok": 1},
}
# Families that cannot be cut to fewer experts, with a word of the reason.
UNCUT = {
    "deepseek_v4": "input_ids",  # its first layers choose experts by a table of token ids
    "jetmoe": "beside its MoE layers would change",  # its attention has experts, too
}
# Families whose blocks the simulator's layer cannot stand for, with a word of the reason.
OWN_ACTIVATION, OWN_RULE = "an activation or a norm that fedmoe's layer does not have", "follows none of the rules"
OWN_TENSOR, OWN_SUM = "which a router of fedmoe's layer does not have", "computes something else than fedmoe's layer"
NOT_SIMULATED = {
    **dict.fromkeys(("dbrx", "jetmoe", "llama4"), "do not run through transformers"),
    "afmoe": "cannot be tried by itself",
    "axk1": "shared_experts, post_mlp_layernorm beside its experts",
    "beam": OWN_SUM,
    "cohere2_moe": OWN_SUM,
    "deepseek_v4": OWN_TENSOR,
    "diffusion_gemma": OWN_TENSOR,
    "ernie4_5_moe": OWN_TENSOR,
    "ernie4_5_vl_moe": OWN_TENSOR,
    "gemma4": OWN_TENSOR,
    "hy_v3": OWN_RULE,
    "inkling": OWN_TENSOR,
    "inkling2": OWN_ACTIVATION,
    "inkling2_loop": OWN_ACTIVATION,
    "kolibri1": OWN_RULE,
    "minimax_m3_vl": OWN_SUM,
    "muse_spark": OWN_ACTIVATION,
    "openai_privacy_filter": OWN_RULE,
    "phimoe": OWN_RULE,
    "switch_transformers": "the encoder alone, as a classifier",  # which test_switch.py does
    "zaya": OWN_TENSOR,
}


def moe_families() -> list[str]:
    """Every folder of transformers' models in which some module is marked as experts."""
    root = Path(transformers.models.__path__[0])
    found = (name for _, name, _ in pkgutil.iter_modules([str(root)]))
    return sorted(f for f in found if _marked(root / f / f"modeling_{f}.py"))


def _marked(source: Path) -> bool:
    return source.exists() and "@use_experts_implementation" in source.read_text("utf-8")


def classes_of(family: str) -> list[type[PreTrainedModel]]:
    """The classes to try for a family: a causal LM, else a text trunk, else whatever there is."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    models = [c for c in own if issubclass(c, PreTrainedModel) and getattr(c, "config_class", None)]
    ends = ("ForCausalLM", "TextModel", "ForTokenClassification", "ForConditionalGeneration")
    return sorted(
        (c for c in models if not c.__name__.endswith("PreTrainedModel")),
        key=lambda c: (next((n for n, end in enumerate(ends) if c.__name__.endswith(end)), len(ends)), c.__name__),
    )


def tiny_config(cls: type[PreTrainedModel], family: str) -> Any:
    """The default configuration of a class with small numbers."""
    default = cls.config_class()
    numbers: dict[str, Any] = {}
    for key, value in vars(default).items():
        if type(value) is int or (value is None and re.search("head_dim|key_value|per_tok|n_routed_experts", key)):
            small = next((size for pattern, size in SIZES if re.search(pattern, key)), None)
            if counts_experts(key) or small is not None:
                numbers[key] = EXPERTS if counts_experts(key) else small
    if "kv_lora_rank" in numbers:  # latent attention has no groups of heads
        numbers["num_key_value_heads"] = 4
        numbers.pop("head_dim", None)
    return cls.config_class(**numbers | MORE.get(family, {}))


@cache
def class_of(family: str) -> type[PreTrainedModel]:
    """The first class of a family that can be built small and runs on token ids."""
    reasons = []
    for cls in classes_of(family)[:3]:
        try:
            config = tiny_config(cls, family)
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(config).parameters())
            if size > 3_000_000:
                raise ValueError(f"{size} parameters")
            model = cls(config)
            stock_blocks(model)
            model(**inputs_of(family))
            return cls
        except Exception as error:
            reasons.append(f"{cls.__name__}: {error}")
    raise ValueError(f"no tiny {family}: {'; '.join(reasons)}")


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random model in evaluation mode; weights are large enough for a wrong activation or rule to be seen."""
    cls = class_of(family)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = cls(tiny_config(cls, family)).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(std=0.15)
                    elif name.endswith("bias"):
                        parameter.normal_(std=0.1)
                for name, buffer in model.named_buffers():
                    if name.endswith(("correction_bias", "expert_bias")):
                        buffer.normal_(std=0.1)
    finally:
        logging.set_verbosity(verbosity)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config._fedmoe_family = family
    return model


def inputs_of(family: str) -> dict[str, Tensor]:
    """Token ids of two sequences of unlike length, padded on the left."""
    tokens = torch.randint(2, VOCAB - 4, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :3] = 0
    inputs = {"input_ids": tokens * mask, "attention_mask": mask}
    return inputs | {"decoder_input_ids": tokens[:, :5]} if family == "switch_transformers" else inputs


def mask_of(model: Any) -> np.ndarray:
    """Four of eight experts, other ones in every layer."""
    layers = len(stock_blocks(model))
    return np.stack([(np.arange(EXPERTS) + layer) % 2 == 0 for layer in range(layers)])


OUTSIDE = ["dbrx", "jetmoe", "llama4", "switch_transformers"]  # their experts do not use the experts interface
FAMILIES = sorted(moe_families() + OUTSIDE)
