"""QLoRA on a budget: adapters over nf4 experts, as many as a number of bytes allows, saved in the form that peft reads.

python examples/qlora_on_a_budget.py [OUT]
"""

import sys
from dataclasses import replace

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from fedmoe_bindings.peft.state import lora_of_state, save_adapter
from fedmoe_bindings.transformers import TransformersAdapter
from fedmoe_core import Budget
from fedmoe_core.config.run_config import TrainConfig
from fedmoe_core.data.batches import Batch
from fedmoe_core.layer.lora import LoraSpec
from fedmoe_core.model.submodel import SubModel
from fedmoe_core.selection.within_budget import choose
from fedmoe_core.simulation.calibrate import calibrate

# A fresh model, small enough for any machine. A real one: Qwen3MoeForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B").
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
SIZES = Qwen3MoeConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, **HEADS, **EXPERTS)
LORA = LoraSpec(rank=8, alpha=16, frozen_format="nf4")


def main() -> None:
    torch.manual_seed(0)
    model = TransformersAdapter(Qwen3MoeForCausalLM(SIZES))
    text = torch.tensor(list(b"many experts, few bytes. ")).repeat(2, 2)
    batch, train = Batch(text, torch.ones_like(text, dtype=torch.bool)), TrainConfig()
    model.loss(batch).backward()  # whoever has the whole model says which experts matter to the text
    scores_LE = np.stack([layer.scores.taylor_abs_B.double().numpy() for layer in model.moe])
    model.model.zero_grad()

    # Three ways to train, and how many experts each can hold: one dry step measures what no formula knows.
    budget, state = Budget.parse("memory=10MiB"), model.state()
    ways = {"whole experts": {}, "LoRA": {"lora_rank": LORA.rank}}
    ways["LoRA on nf4"] = {"lora_rank": LORA.rank, "frozen_format": LORA.frozen_format}
    for name, how in ways.items():
        model.configure(state)
        if name == "LoRA":
            state |= model.add_lora(LORA, seed=0)
        costs = replace(calibrate(model, state, train, batch, padding=False, **how), train_router=False)
        held_LE, trained_LE = choose(budget, costs, scores_LE)
        need = costs.memory(held_LE, trained_LE)
        print(f"{name:14} {held_LE.sum():3d} of {held_LE.size} experts in {need / 2**20:.2f} of {budget}")

    sub = SubModel(permitted_LE=held_LE, trainable_LE=trained_LE, train_router=False, lora_rank=LORA.rank)
    model.configure(state, sub)
    optimizer = torch.optim.AdamW([p for p in model.model.parameters() if p.requires_grad], lr=1e-2)
    first = model.loss(batch).item()
    for _ in range(20):
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {first:.3f} -> {loss.item():.3f}")

    # The adapters of absent experts stay as they were, which is zero change. PeftModel.from_pretrained reads the folder.
    for key, rows in model.trained().items():
        state[key][torch.from_numpy(held_LE[int(key.split(".")[1])])] = rows
    out = sys.argv[1] if len(sys.argv) > 1 else "runs/qlora"
    save_adapter(Qwen3MoeForCausalLM(SIZES), lora_of_state(state, LORA.scale), out)


if __name__ == "__main__":
    main()
