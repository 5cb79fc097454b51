"""Models on fedmoe under unmodified trainers: transformers' Trainer, TRL's SFTTrainer, accelerate."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, disk_offload, dispatch_model
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from stock_models import VOCAB, E, batch_of, relative, stock_loss, stock_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from fedmoe_bindings.peft.fuse import fuse_lora
from fedmoe_bindings.transformers import extract_submodel, hold_still, merge_submodel, use_fedmoe
from fedmoe_bindings.transformers.stock.blocks import stock_blocks

HALF = np.arange(E) % 2 == 0
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    "warmup_steps": 2,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 0,
}


@pytest.fixture(autouse=True)
def own_accelerator() -> Iterator[None]:
    """accelerate keeps its precision for the whole process; leave none to the next test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def rows(count: int = 32) -> list[dict[str, Any]]:
    """Random texts of one length: labels are the tokens themselves."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(1, VOCAB, (12,), generator=generator).tolist() for _ in range(count)]
    return [{"input_ids": tokens, "labels": tokens} for tokens in drawn]


def losses(trainer: Trainer) -> list[float]:
    """The loss of each step, as the trainer logs it."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(model: nn.Module, out: Path, **options: Any) -> list[float]:
    callbacks = options.pop("callbacks", None)
    settings = TrainingArguments(output_dir=str(out), **SETTINGS | options)
    trainer = Trainer(model=model, args=settings, train_dataset=rows(), callbacks=callbacks)
    trainer.train()
    return losses(trainer)


def close(found: list[float], want: list[float]) -> bool:
    """Whether as many losses agree to 1e-4, and they have moved."""
    assert len(found) == len(want) > 1
    assert max(want) - min(want) > 1e-2, "nothing was learnt, so nothing was compared"
    return bool(np.allclose(found, want, rtol=1e-4, atol=0.0))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_trainer_sees_the_losses_of_eager_experts(family: str, tmp_path: Path) -> None:
    stock = stock_model(family, output_router_logits=True)
    ours = use_fedmoe(copy.deepcopy(stock))
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "gradient_checkpointing": family == "mixtral"}
    want = train(stock, tmp_path / "eager", **options)
    assert close(train(ours, tmp_path / "ours", **options), want)
    assert all(relative(p, q) < 1e-3 for p, q in zip(ours.parameters(), stock.parameters(), strict=True))


class HoldStill(TrainerCallback):
    """What the guide shows: absent experts stay as they are, whatever the optimizer."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.held = hold_still(kwargs["optimizer"], kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.held.remove()


def test_under_a_mask_the_trainer_trains_the_submodel(tmp_path: Path) -> None:
    model = stock_model("qwen3_moe", output_router_logits=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    small = extract_submodel(model, HALF)  # on eager experts
    masked = use_fedmoe(model, permitted=HALF)
    options = {"max_grad_norm": 0.5}
    want = train(small, tmp_path / "small", **options)
    assert close(train(masked, tmp_path / "masked", callbacks=[HoldStill()], **options), want)
    merged = merge_submodel(stock_model("qwen3_moe"), small)
    for (name, found), value in zip(masked.named_parameters(), merged.parameters(), strict=True):
        assert relative(found - before[name], value - before[name]) < 2e-2, name
    for block in stock_blocks(masked):
        for name, parameter in block.experts.named_parameters():
            old = before[f"{block.name}.{block.experts_name}.{name}"]
            assert torch.equal(parameter[~HALF], old[~HALF]), name
            assert not torch.equal(parameter[HALF], old[HALF]), name


def test_without_hold_still_weight_decay_moves_absent_experts(tmp_path: Path) -> None:
    model = use_fedmoe(stock_model("qwen3_moe"), permitted=HALF)
    experts = stock_blocks(model)[0].experts.down_proj
    old = experts.detach().clone()
    train(model, tmp_path, max_steps=2, warmup_steps=0)
    assert not torch.equal(experts[~HALF], old[~HALF])


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """transformers 5.24 resumes without the stacked experts, whoever runs them; the guide says to load them first."""
    settings = TrainingArguments(output_dir=str(tmp_path), **SETTINGS | {"save_strategy": "steps", "save_steps": 3})
    whole = Trainer(model=use_fedmoe(stock_model("qwen3_moe")), args=settings, train_dataset=rows())
    whole.train()
    third = tmp_path / "checkpoint-3"
    model = use_fedmoe(type(whole.model).from_pretrained(third))
    again = Trainer(model=model, args=settings, train_dataset=rows())
    again.train(resume_from_checkpoint=str(third))
    assert losses(again) == losses(whole)
    for found, want in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, want)
    plain = type(whole.model).from_pretrained(tmp_path / "checkpoint-6", experts_implementation="eager")
    assert relative(stock_loss(plain, batch_of()), stock_loss(whole.model, batch_of())) < 1e-5


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of VOCAB words, w2 to w60; it needs no file."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{number}": number for number in range(2, VOCAB)}
    inside = Tokenizer(WordLevel(words, unk_token="<pad>"))
    inside.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inside, pad_token="<pad>", eos_token="<eos>")


def fine_tune(model: nn.Module, out: Path, **options: Any) -> SFTTrainer:
    """Train by TRL on random words of unlike number, so that batches are padded."""
    draw = np.random.default_rng(0)
    texts = [" ".join(f"w{w}" for w in draw.integers(2, VOCAB, size=draw.integers(4, 14))) for _ in range(24)]
    more = {"max_length": 16, "bf16": False}  # TRL's default is bfloat16, in which 1e-4 says nothing
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(out), **SETTINGS | more | options.pop("settings", {})),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=word_tokenizer(),
        **options,
    )
    trainer.train()
    return trainer


def test_trl_sees_the_losses_of_eager_experts(tmp_path: Path) -> None:
    stock = stock_model("qwen3_moe")
    ours = use_fedmoe(copy.deepcopy(stock))
    want = losses(fine_tune(stock, tmp_path / "eager"))
    assert close(losses(fine_tune(ours, tmp_path / "ours")), want)


def test_trl_trains_the_submodel_under_a_mask_where_it_adds_no_auxiliary_loss(tmp_path: Path) -> None:
    """TRL 1.16 computes that loss itself, from the configuration's number of experts, which is the whole model's."""
    stock = stock_model("qwen3_moe")
    small, masked = extract_submodel(stock, HALF), use_fedmoe(stock, permitted=HALF)
    with pytest.raises(RuntimeError, match=rf"size of tensor a \({E}\) must match the size of tensor b \({E // 2}\)"):
        fine_tune(copy.deepcopy(masked), tmp_path / "refused")
    settings = {"router_aux_loss_coef": 0.0}
    want = losses(fine_tune(small, tmp_path / "small", settings=settings))
    assert close(losses(fine_tune(masked, tmp_path / "masked", settings=settings)), want)


def lora() -> LoraConfig:
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return LoraConfig(r=2, lora_alpha=8, target_modules=[], target_parameters=names, init_lora_weights=False)


@pytest.mark.parametrize("fused", ["before the trainer", "by the trainer's model"])
def test_trl_trains_fused_adapters_as_peft_does(fused: str, tmp_path: Path) -> None:
    settings = {"learning_rate": 3e-2}
    torch.manual_seed(0)
    stock = fine_tune(stock_model("olmoe"), tmp_path / "peft", peft_config=lora(), settings=settings)
    torch.manual_seed(0)
    if fused == "before the trainer":
        model = fuse_lora(get_peft_model(stock_model("olmoe"), lora()))
        ours = fine_tune(model, tmp_path / "ours", settings=settings)
    else:
        ours = fine_tune(
            use_fedmoe(stock_model("olmoe")),
            tmp_path / "ours",
            peft_config=lora(),
            settings=settings,
            callbacks=[Fuse()],
        )
    assert close(losses(ours), losses(stock))
    assert "_fedmoe_lora" in vars(stock_blocks(ours.model.get_base_model())[0].experts)


class Fuse(TrainerCallback):
    """The adapters that the trainer made run on fedmoe."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        fuse_lora(kwargs["model"])


def test_accelerate_prepares_a_model_as_it_is() -> None:
    found = []
    for ours in (False, True):
        accelerator = Accelerator(cpu=True)
        model = stock_model("qwen3_moe")
        model = use_fedmoe(model) if ours else model
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        steps = []
        for _ in range(4):
            loss = stock_loss(model, batch_of())
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            steps.append(loss.item())
        found.append(steps)
    assert close(found[1], found[0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("where", ["cpu", "disk", "both"])
def test_accelerate_dispatches_before_and_after(where: str, masked: bool, tmp_path: Path) -> None:
    permitted = HALF if masked else None
    stock = stock_model("mixtral")
    want = use_fedmoe(copy.deepcopy(stock), permitted=permitted)(batch_of().tokens_SN).logits

    def away(model: Any, name: str) -> Any:
        parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
        parts += [f"model.layers.{number}" for number in range(len(model.model.layers))]
        places = {part: where if where != "both" else ("cpu", "disk")[part.endswith("1")] for part in parts}
        if where == "cpu":
            return dispatch_model(model, {"": "cpu"}, force_hooks=True)
        if where == "disk":
            return disk_offload(model, tmp_path / name, execution_device=torch.device("cpu"))
        return dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / name, force_hooks=True)

    first = away(use_fedmoe(copy.deepcopy(stock), permitted=permitted), "first")
    later = use_fedmoe(away(copy.deepcopy(stock), "later"), permitted=permitted)
    for model in (first, later):
        assert torch.equal(model(batch_of().tokens_SN).logits, want)
