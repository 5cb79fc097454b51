"""Fused adapters under the trainers that people use: the same adapters after some steps as peft's own forward gives."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from stock_models import relative, stock_model
from torch import nn
from transformers import Trainer, TrainingArguments

from fedmoe_bindings.peft.fuse import fuse_lora

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def trained(model: nn.Module, out: Path) -> dict[str, torch.Tensor]:
    """Four steps of SGD, whose steps are as large as the gradients; with clipping and accumulation."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(1, 61, (12,), generator=generator).tolist()} for _ in range(32)]
    data = [row | {"labels": row["input_ids"]} for row in rows]
    settings = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=0.5,
        optim="sgd",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    Trainer(model=model, args=settings, train_dataset=data).train()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_the_trainer_of_transformers_reaches_the_same_adapters(tmp_path: Path) -> None:
    config = LoraConfig(r=3, lora_alpha=4, target_modules=[], target_parameters=TARGETS)
    torch.manual_seed(0)
    peft = get_peft_model(stock_model("olmoe"), config)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:  # zeros, at which lora_A gets no gradient
            nn.init.normal_(parameter, std=0.2)
    ours = fuse_lora(copy.deepcopy(peft))
    start = {name: p.detach().clone() for name, p in peft.named_parameters() if p.requires_grad}
    want, got = trained(peft, tmp_path / "peft"), trained(ours, tmp_path / "ours")
    assert list(got) == list(want)
    for name, value in want.items():
        assert relative(value, start[name]) > 1e-3, name  # it has learnt something
        assert relative(got[name] - start[name], value - start[name]) < 1e-3, name
