"""The splitter that the simulator and the command ask: dense transformers models in, stock MoE checkpoints out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedmoe_bindings.transformers.live.load import HUB_ID, one_sentence, quiet
from fedmoe_bindings.transformers.split.families import SPLIT, check_dense
from fedmoe_bindings.transformers.split.measure import all_experts, largest_difference, next_token_loss
from fedmoe_bindings.transformers.split.named import smollm2, smollm2_digest
from fedmoe_bindings.transformers.split.split import moe_of, part, split_layers
from fedmoe_core.base.files import making
from fedmoe_core.base.wording import unknown
from fedmoe_core.config.sections import SplitConfig
from fedmoe_core.simulation.identity import model_digest
from fedmoe_core.simulation.worlds.dense import SplitReport

# What a checkpoint has beside weights and sizes, and the split model has too.
BESIDE = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*")


class TransformersSplitter:
    """Splits Llama, Mistral, Qwen2 and Qwen3; implements ``Splitter``."""

    def folder(self, name: str, cache: Path) -> Path:
        """Return the directory of ``smollm2``, unpacked into ``cache``, or of ``dense:DIR``; as the protocol.

        ``dense:owner/name`` fetches the model from the hub, unless HF_HUB_OFFLINE is set or it is there already.
        """
        if name == "smollm2":
            return smollm2(cache)
        folder = _given(name)
        with quiet(), one_sentence(str(folder)):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_dense(config, str(folder))
        return folder

    def digest(self, name: str) -> str:
        """Return the sha256 of the weights' files, as the protocol."""
        return smollm2_digest() if name == "smollm2" else model_digest(str(_given(name)))

    def split(self, folder: Path, out: Path, settings: SplitConfig, tokens_SN: Tensor) -> None:
        """Write the split model into ``out`` in the dtype of the dense one, as the protocol."""
        dense = _load(folder)
        layers = split_layers(settings.layers, dense.config.num_hidden_layers)
        parts = part(dense, tokens_SN, experts=settings.experts, top_k=settings.top_k, layers=layers)
        made = moe_of(dense, parts, told={"from": dense.config.model_type, "sha256": model_digest(str(folder))})
        with making(out) as partial, quiet():
            partial.mkdir()
            made.save_pretrained(partial)
            for pattern in BESIDE:
                for file in sorted(folder.glob(pattern)):
                    shutil.copyfile(file, partial / file.name)

    @torch.no_grad()
    def measure(self, folder: Path, out: Path, tokens_SN: Tensor, held_out_SN: Tensor) -> SplitReport:
        """Compare a split model with the dense one and with a split at random, as the protocol."""
        dense, moe = _load(folder), _load(out)
        made: dict[str, Any] = getattr(moe.config, SPLIT)
        layers, experts, top_k = tuple(made["layers"]), made["experts"], made["top_k"]
        few_loss = next_token_loss(moe, held_out_SN)
        with all_experts(moe, layers):
            all_loss = next_token_loss(moe, held_out_SN)
        with all_experts(moe, layers, equally=True):
            difference = largest_difference(dense, moe, held_out_SN)
        del moe
        at_random = part(dense, tokens_SN, experts=experts, top_k=top_k, layers=layers, at_random=True)
        random_loss = next_token_loss(moe_of(dense, at_random, told={}), held_out_SN)
        return SplitReport(
            dense=dense.config.model_type,
            moe=AutoConfig.from_pretrained(out, local_files_only=True).model_type,
            layers=layers,
            experts=experts,
            top_k=top_k,
            difference=difference,
            dense_loss=next_token_loss(dense, held_out_SN),
            all_loss=all_loss,
            few_loss=few_loss,
            random_loss=random_loss,
            tokens=tokens_SN.numel(),
            held_out=held_out_SN[:, 1:].numel(),
        )


def _given(name: str) -> Path:
    kind, _, place = name.partition(":")
    if kind != "dense" or not place:
        raise unknown(f"model {name!r}", name, ("smollm2", "dense:DIR", "dense:owner/name"))
    folder = Path(place)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(place):
        raise FileNotFoundError(f"{folder} is not a directory; give dense: the folder of a saved transformers model")
    with quiet(), one_sentence(place):
        return Path(snapshot_download(place, allow_patterns=["*.safetensors", "*.json", *BESIDE]))


def _load(folder: Path) -> PreTrainedModel:
    with quiet(), one_sentence(str(folder)):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    return model.eval()


splitter = TransformersSplitter()
