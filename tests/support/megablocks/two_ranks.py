"""One rank of two: megablocks' expert parallelism on our stand-ins gives what one process with all experts gives.

Called with the rank and a folder that both ranks meet in; prints the largest relative error.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from dmoe_truth import relative
from ranks import RANKS, process_group

from fedmoe_bindings.megablocks import install_backend

RANK, FOLDER = int(sys.argv[1]), Path(sys.argv[2])


def main() -> None:
    """Run a whole layer and this rank's part of it on this rank's tokens, and compare."""
    install_backend()
    import megablocks

    setting = dict(hidden_size=12, ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2, mlp_type="glu", bias=False)
    setting |= dict(mlp_impl="grouped", return_bias=False, fp16=False, device="cpu")
    parallel = dict(moe_expert_model_parallelism=True, expert_parallel_group=dist.group.WORLD)
    torch.manual_seed(0)
    whole = megablocks.dMoE(megablocks.Arguments(**setting)).double()
    part = megablocks.dMoE(megablocks.Arguments(**setting, **parallel)).double()
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    own = {name: t if name.startswith("router") else t.chunk(RANKS)[RANK] for name, t in whole.state_dict().items()}
    part.load_state_dict(own)
    torch.manual_seed(10 + RANK)
    x, dy = torch.randn(2, 5 + RANK, 3, 12, dtype=torch.float64)  # the ranks have unlike numbers of tokens
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(leaf) for layer, leaf in zip((whole, part), inputs, strict=True)]
    for y in outputs:
        y.backward(dy)
    errors = [relative(outputs[1], outputs[0]), relative(inputs[1].grad, inputs[0].grad)]
    for name in ("w1", "v1", "w2"):
        summed = getattr(whole.experts.mlp, name).grad.clone()
        dist.all_reduce(summed)
        # megablocks divides the gradients of its parts by the number of ranks.
        errors.append(relative(getattr(part.experts.mlp, name).grad * RANKS, summed.chunk(RANKS)[RANK]))
    print(max(errors))
    megablocks.layers.moe.clear_load_balancing_loss()  # its list in the module holds graphs, and they hold the group


if __name__ == "__main__":
    with process_group(RANK, FOLDER):
        main()
