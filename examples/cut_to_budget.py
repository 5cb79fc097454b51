"""Cut a model to a budget: the experts that matter most to a text and fit in so many bytes, as a plain model on disk.

python examples/cut_to_budget.py [OUT]
"""

import math
import sys
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from fedmoe_bindings.transformers import TransformersAdapter, extract_submodel, use_fedmoe
from fedmoe_core.base.show import size
from fedmoe_core.data.batches import Batch

# A fresh model, small enough for any machine. A real one: Qwen3MoeForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B").
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
SIZES = Qwen3MoeConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, **HEADS, **EXPERTS)
BUDGET = 1_500_000  # bytes of weights


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/cut")
    torch.manual_seed(0)
    text = torch.tensor([list(b"Keep what this text needs, and leave the rest on the shelf.")])

    # fedmoe's layers score the experts in one pass; the model goes in as a stock model and comes out as one.
    scored = TransformersAdapter(Qwen3MoeForCausalLM(SIZES))
    scored.loss(Batch(text, torch.ones_like(text, dtype=torch.bool))).backward()
    scores_LE = torch.stack([layer.scores.taylor_abs_B for layer in scored.moe])
    model = scored.export().eval()

    # Every layer of a transformers model has equally many experts; `one` is what one of each layer weighs.
    whole = weight_bytes(model)
    one = whole - weight_bytes(extract_submodel(model, torch.arange(SIZES.num_experts) > 0))
    keep = min(SIZES.num_experts, SIZES.num_experts - math.ceil((whole - BUDGET) / one))
    if keep < SIZES.num_experts_per_tok:
        raise SystemExit(f"{size(BUDGET)} holds {max(keep, 0)} experts a layer, fewer than a token needs")
    best_LE = torch.zeros(scores_LE.shape, dtype=torch.bool).scatter(1, scores_LE.topk(keep).indices, True)

    extract_submodel(model, best_LE).save_pretrained(out)
    small = Qwen3MoeForCausalLM.from_pretrained(out).eval()  # needs transformers alone
    print(f"{size(whole)} -> {size(weight_bytes(small))}, budget {size(BUDGET)}: {keep} experts a layer")
    print(f"kept: {small.config.fedmoe_kept_experts}")
    with torch.no_grad():
        masked = use_fedmoe(model, permitted=best_LE)(text).logits
        print(f"from the masked model it differs by {(small(text).logits - masked).abs().max().item():.1e}")
        print(f"same to the bit on fedmoe: {torch.equal(use_fedmoe(small)(text).logits, masked)}")


if __name__ == "__main__":
    main()
