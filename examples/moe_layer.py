"""Train one MoE layer that stores a quarter of its experts, and see what the rest would have cost.

python examples/moe_layer.py
"""

import torch

from fedmoe_core import MoE

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 128, 256, 16, 2


def stored_bytes(layer: torch.nn.Module) -> int:
    """Bytes of parameters and buffers; what is not here does not exist on the device."""
    return sum(tensor.nbytes for tensor in [*layer.parameters(), *layer.buffers()])


def main() -> None:
    torch.manual_seed(0)
    whole = MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K)
    quarter = [expert < EXPERTS // 4 for expert in range(EXPERTS)]
    half_of_those = [expert < EXPERTS // 8 for expert in range(EXPERTS)]
    # Four experts are stored and run. Two of them train; the other two are frozen and have no gradient at all.
    layer = MoE(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, permitted=quarter, trainable=half_of_those, with_scores=True)
    print(f"all experts: {stored_bytes(whole) / 1e6:.2f} MB, a quarter: {stored_bytes(layer) / 1e6:.2f} MB")

    x, target = torch.randn(2, 4, 64, HIDDEN).unbind()  # any leading shape; the last dimension is the hidden size
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    for step in range(30):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == 29:
            print(f"step {step:2d}: loss {loss.item():.4f}")

    # The same backward passes measured how much each stored expert matters to the loss.
    for expert, score in enumerate(layer.scores.taylor_abs_B.tolist()):
        print(f"expert {expert}: importance {score:.4f}")


if __name__ == "__main__":
    main()
