"""Any torch module by federated averaging: a small network on rows of numbers, eight clients with skewed classes.

python examples/plain_model.py [FOLDER]

The command takes the same model by its name: cd examples && fedmoe simulate adapter=plain_model:adapter clients=8
"""

import sys

import torch
from torch import nn

from fedmoe_core import Config, plain, simulate

CLASSES, FEATURES = 5, 16


def rows(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around one center for each class. Put your own tensors here: a row for each sample, labels last."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    centers = 2 * torch.eye(CLASSES, FEATURES)
    return centers[labels] + torch.randn(count, FEATURES, generator=draw), labels


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def correct(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).sum()


adapter = plain(network, loss, train=rows(2000, seed=0), test=rows(500, seed=1), correct_fn=correct)


def main() -> None:
    words = ["adapter=own", "clients=8", "rounds=5", "partition=dirichlet:0.5", "train.local_epochs=1"]
    out = sys.argv[1] if len(sys.argv) > 1 else "runs/plain-model"
    summary = simulate.run(Config.load(overrides=[*words, f"out={out}"]), adapter=adapter)
    print(f"accuracy {summary['accuracy_before']:.1%} -> {summary['accuracy_after']:.1%}")


if __name__ == "__main__":
    main()
