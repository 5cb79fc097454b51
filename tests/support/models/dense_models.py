"""Tiny dense models of the families that split, with a tokenizer; no test lives here."""

import json
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

WIDTH, LAYERS, EXPERTS, K = 32, 4, 4, 2
WORDS = ["river", "stone", "light", "winter", "garden", "letter", "music", "paper"]
_CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig,
    "mistral": lambda **sizes: MistralConfig(sliding_window=None, **sizes),
    "qwen2": Qwen2Config,
    "qwen3": lambda **sizes: Qwen3Config(head_dim=8, **sizes),
}
FAMILIES = sorted(_CONFIGS)


def dense_model(family: str, *, vocab_size: int = 61, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A model whose weights are large enough for its MLPs to matter."""
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    }
    config = _CONFIGS[family](**{**sizes, **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):  # transformers starts them at 0, which would hide a lost one
                torch.nn.init.normal_(parameter)
    return model.eval()


def save_dense(folder: Path, family: str = "llama", **more: Any) -> PreTrainedModel:
    """Save such a model with a tokenizer of its own."""
    tokenizer = byte_tokenizer(WORDS)
    model = dense_model(family, vocab_size=tokenizer.get_vocab_size(), **more)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return model


def some_tokens(count: int = 6, length: int = 24, *, vocab_size: int = 61, seed: int = 0) -> torch.Tensor:
    """Random ids (S, N)."""
    return torch.randint(1, vocab_size, (count, length), generator=torch.Generator().manual_seed(seed))
