"""A live model as it is configured, written as files that transformers or peft loads without fedmoe."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from fedmoe_bindings.transformers.live.export import stock_of
from fedmoe_bindings.transformers.live.families import Family
from fedmoe_bindings.transformers.live.load import SequenceClassifier, quiet
from fedmoe_bindings.transformers.live.losses import class_logits, token_logits
from fedmoe_bindings.transformers.stock.submodel import extract_submodel
from fedmoe_core.base.tensor_key import of_layer, to_keys
from fedmoe_core.data.batches import Batch
from fedmoe_core.layer.lora import end_to_end
from fedmoe_core.layer.moe import MoE
from fedmoe_core.model.submodel import SubModel
from fedmoe_core.model.writer import Wording
from fedmoe_kernels.quantized import Quantized

# Files of a tokenizer beside a model, taken over as they are.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("chat_template.jinja", "chat_template.json"),
)
SAME = 1e-4  # relative norm of the difference of float32 logits; two orders of a sum differ by some 1e-6
SAME_16_BITS = 5e-2


def own_model(
    root: nn.Module, state: Mapping[str, Tensor], family: Family, layers: Sequence[MoE], submodel: SubModel
) -> PreTrainedModel:
    """Build the stock model of the sub-model that the live one is configured as: its experts alone, on their own.

    Args:
        root: the live model.
        state: that it was configured from.
        family: how its MoE blocks are made.
        layers: its MoE layers.
        submodel: that it was configured to.

    Raises:
        ValueError: transformers has no such model: grafts, a head that pools the mean, layers that hold different
            numbers of experts, or groups of experts that do not survive the cut.
    """
    served_LE, top_k = submodel.permitted_LE, layers[0].top_k
    if served_LE is not None and submodel.alias_LE is not None:
        served_LE = served_LE | (submodel.alias_LE >= 0)
    if served_LE is not None:
        top_k = min(top_k, int(served_LE.sum(axis=1).max()))
    whole = stock_of(root, as_run(state, layers, submodel), family, layers, top_k=top_k)
    if served_LE is None or served_LE.all():
        return whole
    return extract_submodel(whole, torch.from_numpy(np.asarray(served_LE)))


@torch.no_grad()
def as_run(state: Mapping[str, Tensor], layers: Sequence[MoE], submodel: SubModel) -> dict[str, Tensor]:
    """Return a state in which every expert that is served has the weights with which the live layers run it.

    These are its own rows and its adapters merged, few bits decoded, the layer's output factor multiplied in; an expert
    that another one serves gets a copy of that one's. Where weights are shares, outputs are as much smaller as the sum
    of fewer than k shares is, for a stock router renormalises. Experts that are absent stay as they are in ``state``.
    """
    found = dict(state)
    for number, layer in enumerate(layers):
        own = dict(of_layer(number, state))
        slot_of = {expert: slot for slot, expert in enumerate(layer.experts)}
        if submodel.alias_LE is not None:
            served = ((e, int(by)) for e, by in enumerate(submodel.alias_LE[number]) if by >= 0)
            slot_of |= {expert: slot_of[by] for expert, by in served}
        experts, slots = torch.tensor(list(slot_of)), torch.tensor(list(slot_of.values()))
        shares = 1.0
        if layer.rule.renormalize == "share":
            shares = min(layer.top_k, len(slot_of)) / (layer.rule.of or layer.top_k)
        for name in layer.slot_names:
            rows_B = _slots(layer, name)
            if layer.out_scale is not None and name in ("w_out", "bias_out"):
                rows_B = rows_B * layer.out_scale.detach().to(rows_B.dtype)
            if name in ("w_out", "bias_out"):
                rows_B = rows_B * shares
            whole_E = own[name].clone()
            whole_E[experts] = rows_B[slots].to(whole_E)
            own[name] = whole_E
        own["router"] = layer.router_EH().detach().to(own["router"])
        if (bias_E := layer.router_bias_E()) is not None:
            own["router_bias"] = bias_E.detach().to(own["router_bias"])
        found |= to_keys(number, own)
    return found


def _slots(layer: MoE, name: str) -> Tensor:
    """A matrix or bias of all slots, (B, ...), decoded and with the adapters that its slots run with."""
    learning_B, frozen_B = layer.stored(name)
    if isinstance(frozen_B, Quantized):
        frozen_B = frozen_B.dequantize(learning_B.dtype)
    rows_B = torch.cat([learning_B, frozen_B.to(learning_B.dtype)])
    if layer.lora_scale is None or name not in ("w_in", "w_out"):
        return rows_B
    side = name.removeprefix("w_")
    a_B, b_B = (
        end_to_end(getattr(layer, f"{factor}_{side}").detach(), getattr(layer, f"{factor}_{side}_frozen"))
        for factor in "ab"
    )
    rows_B[: len(a_B)] += (layer.lora_scale * (b_B @ a_B)).to(rows_B.dtype)  # the other slots have merged theirs
    return rows_B


@torch.no_grad()
def require_same(model: PreTrainedModel, root: nn.Module, batch: Batch) -> None:
    """Refuse a stock model that answers a batch otherwise than the live one: its family has a rule that was missed.

    Raises:
        ValueError: the logits differ by more than rounding.
    """
    root.eval()
    batch = batch.to(model.device)
    if isinstance(root, SequenceClassifier):
        want, _ = class_logits(root, batch, batch.mask_SN, log_prior=None)
        # Row by row, without padding: where a row ends, transformers tells by a padding token that it may not have.
        rows = [tokens_N[mask_N][None] for tokens_N, mask_N in zip(batch.tokens_SN, batch.mask_SN, strict=True)]
        found = torch.cat([model(input_ids=row).logits for row in rows]).float()
    else:
        want = token_logits(root, batch, batch.mask_SN)[batch.mask_SN].float()
        mask_SN = batch.mask_SN.long()
        found = model(input_ids=batch.tokens_SN, attention_mask=mask_SN, use_cache=False).logits[batch.mask_SN].float()
    unlike = float((found - want).norm() / want.norm())
    if not unlike < (SAME if model.dtype.itemsize > 2 else SAME_16_BITS):
        raise ValueError(
            f"{type(model).__name__} of transformers answers otherwise than the model that was judged (logits differ "
            f"by {unlike:.1e} of their norm), so it is not written; export another client, or keep the run's state"
        )


def write_files(model: PreTrainedModel, folder: Path, wording: Wording, *, text: Batch) -> None:
    """Write a model, its generation settings and its tokenizer as transformers loads them.

    Args:
        model: a stock model.
        folder: there already.
        wording: the tokenizer of the run, and where its files may lie.
        text: tokens on which the tokenizer that was written has to agree with the run's.
    """
    end = wording.tokenizer.end_id
    settings: list[Any] = [model.config, model.generation_config] if model.can_generate() else [model.config]
    for each in settings:
        each.use_cache = True  # training did without
        if each.eos_token_id is None:
            each.eos_token_id = end
    if model.can_generate() and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = end
    with quiet():
        model.save_pretrained(folder)
    write_tokenizer(folder, wording, text)


def write_tokenizer(folder: Path, wording: Wording, text: Batch | None = None) -> None:
    """Write a tokenizer that AutoTokenizer loads: the model's own files where they do, else the run's tokenizer."""
    tokenizer = wording.tokenizer
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.model, eos_token=tokenizer.end, pad_token=tokenizer.end)
    sample = "The brown fox, 3 dogs: jumped!\n" if text is None else tokenizer.model.decode(text.tokens_SN[0].tolist())
    for path in _own_files(wording.source):
        shutil.copyfile(path, folder / path.name)
    if _reads_alike(folder, tokenizer.encode([sample])[0], sample):
        return
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    plain.save_pretrained(folder)


def _own_files(source: str) -> list[Path]:
    """A tokenizer's files in a model's directory, or those of a hub model that lie in its cache; nothing is fetched."""
    home = Path(source.partition(":")[2] or source)
    if home.is_dir():
        return [home / name for name in TOKENIZER_FILES if (home / name).is_file()]
    if source.count("/") != 1:
        return []
    found = [try_to_load_from_cache(source, name) for name in TOKENIZER_FILES]
    return [Path(path) for path in found if isinstance(path, str)]


def _reads_alike(folder: Path, want: list[int], sample: str) -> bool:
    """Whether AutoTokenizer loads the files in a folder, and encodes a text so."""
    if not (folder / "tokenizer.json").exists():
        return False
    try:
        with quiet():
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # files that transformers cannot make sense of
        return False
    return bool(found(sample, add_special_tokens=False).input_ids == want)


def write_peft(
    model: PreTrainedModel, state: Mapping[str, Tensor], scale: float, folder: Path, wording: Wording, *, base: str
) -> None:
    """Write a state's adapters over ``model``, which others find under ``base``, and the tokenizer.

    Raises:
        ValueError: peft is not installed, or the adapters do not fit.
    """
    try:
        from fedmoe_bindings.peft.export import trained_in, write_trained
    except ImportError as error:
        raise ValueError(f"--format peft needs peft ({error}); install fedmoe-core[peft]") from error
    write_trained(trained_in(state, scale), model, folder, base=base)
    write_tokenizer(folder, wording)
