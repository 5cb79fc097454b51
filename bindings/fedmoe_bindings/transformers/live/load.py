"""Models by name: the small default one from its configuration, others from a directory or the hub."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    SwitchTransformersEncoderModel,
)
from transformers.utils import logging

from fedmoe_bindings.transformers.stock.blocks import check_config, configs_of
from fedmoe_core.config.run_config import ModelConfig
from fedmoe_core.data.batches import Task
from fedmoe_core.layer.state import INIT_STD

Pool = Literal["mean", "last"]
# Of models with an encoder and a decoder: the class that has the encoder alone.
_ENCODERS = {"switch_transformers": SwitchTransformersEncoderModel}
_CHANCE = re.compile("dropout|pdrop|layerdrop|drop_path|jitter")
# Called like chance, yet a threshold: logits that far below the largest do not enter a choice's softmax.
_NO_CHANCE = {"phimoe": "router_jitter_noise"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class SequenceClassifier(nn.Module):
    """A transformers trunk and a linear head over one pooled state per sequence.

    The names ``model`` and ``score`` are those of transformers' own sequence classifiers, so keys agree.

    Attributes:
        model: the trunk, without a language-model head.
        score: Linear(H, classes), no bias.
        pool: "mean" over the real tokens, or the "last" real token as transformers does.
    """

    def __init__(self, model: PreTrainedModel, score: nn.Linear, pool: Pool) -> None:
        super().__init__()
        self.model, self.score, self.pool = model, score, pool

    @classmethod
    def over(cls, model: PreTrainedModel, *, num_classes: int, pool: Pool, seed: int) -> SequenceClassifier:
        """Wrap a bare trunk with a fresh head, or transformers' own classifier with the head it has.

        Raises:
            ValueError: the classifier has another number of classes, or the model another head.
        """
        if pool not in ("mean", "last"):
            raise ValueError(f"pool={pool!r} is unknown; use 'mean' or 'last'")
        head = getattr(model, "score", None)
        if isinstance(head, nn.Linear):
            if head.out_features != num_classes:
                raise ValueError(
                    f"the model's head has {head.out_features} classes, the task {num_classes}; load its trunk instead"
                )
            return cls(cast(PreTrainedModel, model.base_model), head, pool)
        if model.base_model is not model:
            raise ValueError(f"{type(model).__name__} is not a classifier; pass its trunk, model.base_model")
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}; classification needs at least two")
        score = nn.Linear(model.config.hidden_size, num_classes, bias=False, device="meta")
        score = score.to_empty(device=model.device).to(model.dtype)
        generator = torch.Generator().manual_seed(seed)
        fresh = torch.empty(score.weight.shape).normal_(
            std=getattr(model.config, "initializer_range", INIT_STD), generator=generator
        )
        with torch.no_grad():
            score.weight.copy_(fresh)
        return cls(model, score, pool)

    def forward(self, tokens_SN: Tensor, mask_SN: Tensor, **trunk_options: object) -> Tensor:
        """Return logits (S, classes) of token ids and their mask (bool, True = real), both (S, N)."""
        hidden_SNH = self.model(
            input_ids=tokens_SN, attention_mask=mask_SN.long(), use_cache=False, **trunk_options
        ).last_hidden_state
        if self.pool == "mean":
            share_SN = mask_SN / mask_SN.sum(dim=1, keepdim=True).clamp(min=1)
            pooled_SH = torch.einsum("snh,sn->sh", hidden_SNH, share_SN.to(hidden_SNH.dtype))
        else:
            last_S = (torch.arange(mask_SN.shape[1], device=mask_SN.device) * mask_SN).argmax(dim=1)
            pooled_SH = hidden_SNH[torch.arange(len(last_S), device=last_S.device), last_S]
        return self.score(pooled_SH)


def small_model(config: ModelConfig, *, vocab_size: int, task: Task, seed: int) -> PreTrainedModel:
    """Make the default small Qwen3-MoE: tied embeddings, renormalised top-k, SwiGLU experts, fresh weights by ``seed``.

    Two layers were measured better than four at equal tokens, and 16 experts with top-2 show the choice of experts
    best at this size. The global random state is left as it was.

    Raises:
        ValueError: k above the number of experts, or heads that key-value heads do not divide.
    """
    if config.top_k > config.experts:
        raise ValueError(f"model_config.top_k={config.top_k} exceeds experts={config.experts}; lower top_k")
    if config.heads % config.kv_heads:
        raise ValueError(f"model_config.heads={config.heads} is not a multiple of kv_heads={config.kv_heads}")
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "num_experts": config.experts,
        "num_experts_per_tok": config.top_k,
        "moe_intermediate_size": config.expert_width,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
        "use_cache": False,
    }
    stock = Qwen3MoeConfig(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3MoeForCausalLM(stock) if task == "causal_lm" else Qwen3MoeModel(stock)


def load_model(name: str, *, task: Task, num_classes: int, dtype: torch.dtype | None) -> PreTrainedModel:
    """Load a stock model from a directory, or from the hub when ``name`` is owner/name and not a directory.

    Only safetensors are read and no remote code runs. HF_HUB_OFFLINE is respected; a directory never needs a network.
    Dropout and router jitter are switched off, with a warning: a step of the simulator does not depend on chance, so
    that clients may run in any order.

    Returns:
        A causal LM, or for classification a classifier if the checkpoint is one, else the bare trunk (of a model with
        an encoder and a decoder, its encoder).

    Raises:
        ValueError: the name is neither of these, or the family is not served.
        OSError: the checkpoint cannot be read, lacks weights or has others (transformers would fill in random ones).
    """
    local = Path(name).is_dir()
    if not local and not HUB_ID.fullmatch(name):
        raise ValueError(
            f"model {name!r} is not 'tiny', 'smollm2', dense:DIR, a directory that exists, or a hub id owner/name"
        )
    with quiet(), torch.random.fork_rng(devices=[]):
        with one_sentence(name):
            config = AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)
        check_config(config, name)
        if config.is_encoder_decoder and task == "causal_lm":
            raise ValueError(
                f"model {name!r} ({config.model_type}) has an encoder and a decoder; fedmoe trains its encoder, as a "
                "classifier, so choose data with labels"
            )
        without_chance(config, name)
        with one_sentence(name):
            model, report = _auto_class(config, task).from_pretrained(
                name,
                config=config,
                dtype=dtype,
                local_files_only=local,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told below, in one sentence
            )
    if report["mismatched_keys"]:
        key, stored, wanted = min(report["mismatched_keys"])
        raise OSError(
            f"model {name!r} has {key} of shape {tuple(stored)}, and its config.json asks for {tuple(wanted)}; "
            "get files that belong together"
        )
    if report["missing_keys"]:
        raise OSError(f"model {name!r} lacks the weight {min(report['missing_keys'])}; get a complete checkpoint")
    if task == "classification" and hasattr(model, "score") and model.score.out_features != num_classes:
        return model.base_model  # a head of another task is of no use here
    return model


def without_chance(config: PreTrainedConfig, name: str) -> None:
    """Set what a configuration drops or shakes at random to 0."""
    found: dict[str, float] = {}
    for part in configs_of(config):
        for key, value in list(vars(part).items()):
            by_chance = _CHANCE.search(key) and _NO_CHANCE.get(part.model_type) != key
            if by_chance and isinstance(value, int | float) and value:
                found[key] = value
                setattr(part, key, type(value)(0))
    if found:
        told = ", ".join(f"{key}={value}" for key, value in sorted(found.items()))
        warnings.warn(f"model {name!r} is trained without {told}: a simulated step has no chance in it", stacklevel=3)


def _auto_class(config: PreTrainedConfig, task: Task) -> Any:
    if config.is_encoder_decoder and config.model_type in _ENCODERS and task == "classification":
        return _ENCODERS[config.model_type]
    if task == "causal_lm":
        return AutoModelForCausalLM
    classifier = any("ForSequenceClassification" in name for name in config.architectures or ())
    return AutoModelForSequenceClassification if classifier else AutoModel


def is_encoder(model: PreTrainedModel) -> bool:
    """Say whether this is the encoder alone of a model with both: its last state is like any other."""
    return isinstance(model, tuple(_ENCODERS.values()))


@contextmanager
def one_sentence(name: str) -> Iterator[None]:
    """transformers' pages of advice as one OSError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        remedy = "check the path, the network and the files"
        raise OSError(f"model {name!r} cannot be loaded ({reason}); {remedy}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block let transformers report errors only, without progress bars; then as it was."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
