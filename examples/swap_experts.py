"""Swap the experts of a stock transformers model for fedmoe's: the same logits, then half of the experts, then back.

python examples/swap_experts.py
"""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from fedmoe_bindings.transformers import use_fedmoe

# A fresh model, small enough for any machine. A real one: Qwen3MoeForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B").
SIZES = Qwen3MoeConfig(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=96,
)


def main() -> None:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(SIZES).eval()
    model.set_experts_implementation("eager")  # the plain loop over experts; transformers' default is grouped_mm
    tokens = torch.randint(0, SIZES.vocab_size, (2, 24))
    with torch.no_grad():
        before = model(tokens).logits
        use_fedmoe(model)
        after = model(tokens).logits
        # The mask acts before the router's scores are normalised: this is the sub-model that has four experts a layer.
        use_fedmoe(model, permitted=torch.arange(8) < 4)
        half = model(tokens).logits
    print(f"largest difference of a logit: {(after - before).abs().max().item():.1e}")
    print(f"with half of the experts:      {(half - before).abs().max().item():.1e}")

    # It trains and generates as before; saved files keep transformers' own names.
    use_fedmoe(model)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    print(f"loss {loss.item():.3f}, gradients in {sum(p.grad is not None for p in model.parameters())} tensors")
    print(f"goes on with {model.generate(tokens[:1], max_new_tokens=6)[0, 24:].tolist()}")

    # Back to transformers' own experts. Nothing of fedmoe stays in the weights.
    model.set_experts_implementation("eager")
    with torch.no_grad():
        print(f"swapped back, the same to the bit: {torch.equal(model(tokens).logits, before)}")


if __name__ == "__main__":
    main()
