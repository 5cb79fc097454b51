"""QLoRA on a budget: adapters over nf4 experts, as many as a number of bytes allows, saved in the form that peft reads.

python examples/qlora_on_a_budget.py [OUT]
"""

import sys

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
BUDGET, LORA = Budget.parse("memory=10MiB"), LoraSpec(rank=8, alpha=16, frozen_format="nf4")


def main() -> None:
    torch.manual_seed(0)
    model = TransformersAdapter(Qwen3MoeForCausalLM(SIZES))
    text = torch.tensor(list(b"many experts, few bytes. ")).repeat(2, 2)
    batch = Batch(text, torch.ones_like(text, dtype=torch.bool))
    model.loss(batch).backward()  # a machine that holds the whole model says which experts matter to the text
    scores_LE = torch.stack([layer.scores.taylor_abs_B for layer in model.moe]).double().numpy()
    state = model.state() | model.add_lora(LORA, seed=0)
    for form in (None, LORA.frozen_format):  # experts as they are, and in four bits
        costs = calibrate(model, state, TrainConfig(), batch, padding=False, lora_rank=LORA.rank, frozen_format=form)
        held_LE, trained_LE = choose(BUDGET, costs, scores_LE)
        count, need = held_LE.sum(), costs.memory(held_LE, trained_LE) / 2**20
        print(f"LoRA on {form or 'float32'}: {count} of {held_LE.size} experts in {need:.2f} of 10 MiB")

    model.configure(state, SubModel(held_LE, trained_LE, train_router=False, lora_rank=LORA.rank))
    optimizer = torch.optim.AdamW([p for p in model.model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(21):
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:2d}: loss {loss.item():.3f}")
    # Adapters of experts that were not held stay as they were, which changes nothing. peft reads the folder.
    for key, rows in model.trained().items():
        state[key][trained_LE[int(key.split(".")[1])]] = rows
    layers, out = lora_of_state(state, LORA.scale), sys.argv[1] if len(sys.argv) > 1 else "runs/qlora"
    save_adapter(Qwen3MoeForCausalLM(SIZES), layers, out)


if __name__ == "__main__":
    main()
