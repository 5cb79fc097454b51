"""Which experts of a model does your text need? One pass, and a ranking for each layer.

python examples/score_experts.py [FILE]
"""

import sys
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from fedmoe_bindings.transformers import TransformersAdapter
from fedmoe_core.client.profiling import ProfileSums
from fedmoe_core.data.batches import Batch
from fedmoe_core.selection.importance import cumulative, expert_scores

# A fresh model, small enough for any machine, that reads bytes. A real one, and its own tokens instead of bytes:
# Qwen3MoeForCausalLM.from_pretrained(NAME), AutoTokenizer.from_pretrained(NAME)(text)["input_ids"].
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
SIZES = Qwen3MoeConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, initializer_range=0.1, **HEADS, **EXPERTS)
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 8
LENGTH = 128  # tokens of a sequence


def main() -> None:
    torch.manual_seed(0)
    text = Path(sys.argv[1]).read_text("utf-8") if len(sys.argv) > 1 else TEXT
    tokens = list(text.encode())
    model = TransformersAdapter(Qwen3MoeForCausalLM(SIZES))
    sums = ProfileSums(model)
    for start in range(0, len(tokens), LENGTH):  # one sequence a pass; the sums do not depend on how it is cut
        piece = torch.tensor([tokens[start : start + LENGTH]])
        model.loss(Batch(piece, torch.ones_like(piece, dtype=torch.bool))).backward()  # the backward adds up the scores
        sums.add_batch()
        model.model.zero_grad()
    profile = sums.finish()

    # taylor: how much the loss depends on the expert; used: the mean probability that the router gives it.
    scores_LE = expert_scores(profile, "taylor", lam=0.5, beta=0.0)
    used_LE = cumulative(profile.prob_sum_LE, profile.tokens_L)
    for layer, scores_E in enumerate(scores_LE):
        print(f"layer {layer}: expert  importance  used  tokens")
        for expert in (-scores_E).argsort():
            rows = int(profile.rows_LE[layer, expert])
            print(f"{expert:15d} {scores_E[expert]:11.1%} {used_LE[layer, expert]:5.0%} {rows:7d}")


if __name__ == "__main__":
    main()
