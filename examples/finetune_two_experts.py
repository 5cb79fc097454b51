"""Fine-tune two experts of each layer of a Qwen3-MoE; nothing else moves, and what it does not use is not held.

python examples/finetune_two_experts.py [OUT]
"""

import sys

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from fedmoe_bindings.transformers import TransformersAdapter
from fedmoe_core.base.show import size
from fedmoe_core.budget.peak_memory import resident_bytes
from fedmoe_core.data.batches import Batch
from fedmoe_core.model.submodel import SubModel

# A fresh model, small enough for any machine. A real one: Qwen3MoeForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B").
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
SIZES = Qwen3MoeConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, **HEADS, **EXPERTS)
RUNS, TRAINS = [0, 1, 2, 5], [2, 5]  # four experts run, and two of them learn


def mask(experts: list[int]) -> np.ndarray:
    """Bool (layers, experts). It is the same row here for every layer; each may have its own."""
    return np.tile(np.isin(np.arange(SIZES.num_experts), experts), (SIZES.num_hidden_layers, 1))


def main() -> None:
    torch.manual_seed(0)
    model = TransformersAdapter(Qwen3MoeForCausalLM(SIZES))  # its MoE blocks are fedmoe's layers now
    text = torch.tensor(list(b"the two experts learn this sentence by heart. ")).repeat(2, 3)
    batch = Batch(text, torch.ones_like(text, dtype=torch.bool))
    before, whole = model.state(), resident_bytes(model.model)
    model.configure(before, SubModel(permitted_LE=mask(RUNS), trainable_LE=mask(TRAINS), train_router=False))
    print(f"weights held: {size(resident_bytes(model.model))} of {size(whole)}")
    optimizer = torch.optim.AdamW([p for p in model.model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(20):
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 19 == 0:
            print(f"step {step:2d}: loss {loss.item():.3f}")
    print(f"with gradients and moments: {size(resident_bytes(model.model, optimizer))}")

    after = {key: value.clone() for key, value in before.items()}
    for key, rows in model.trained().items():  # the two experts go back to where they came from
        after[key][TRAINS] = rows
    for key, old in before.items():
        if not torch.equal(after[key], old):
            print(f"moved: rows {(after[key] != old).flatten(1).any(1).nonzero().flatten().tolist()} of {key}")
    model.configure(after)
    model.export().save_pretrained(sys.argv[1] if len(sys.argv) > 1 else "runs/two-experts")  # a stock model again


if __name__ == "__main__":
    main()
