"""The job: an MLP over synthetic classes with skewed labels, the same data, weights and batches for every engine.

Sizes come from the environment (``FEDAVG_JOB``), because an engine imports this in every process that it starts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmoe_core.data.rows import Rows, draw_places

ENVIRONMENT = "FEDAVG_JOB"
FEATURES, CLASSES, TEST_ROWS, ALPHA, LR, BATCH = 64, 10, 2000, 0.5, 0.05, 32


@dataclass(frozen=True)
class Job:
    """Sizes of one job.

    Attributes:
        clients: all take part in every round.
        hidden: H of the MLP 64-H-H-10.
        rows: of each client.
        epochs: passes over them in a round.
        rounds: rounds.
    """

    clients: int = 8
    hidden: int = 256
    rows: int = 512
    epochs: int = 2
    rounds: int = 20

    @property
    def steps(self) -> int:
        """Local steps of a client in a round."""
        return self.epochs * self.rows // BATCH

    def environment(self) -> dict[str, str]:
        """Return the variable that hands this job to other processes."""
        return {ENVIRONMENT: json.dumps(asdict(self))}


JOBS = {
    "small": Job(),
    "large": Job(hidden=4096, rows=64, epochs=1, rounds=8),
    "many": Job(clients=100, rows=64, epochs=1, rounds=12),
}
CURRENT = Job(**json.loads(os.environ.get(ENVIRONMENT, "{}")))


def make_model() -> nn.Module:
    """Make the MLP with the weights that every engine starts from."""
    torch.manual_seed(0)
    hidden = CURRENT.hidden
    return nn.Sequential(
        nn.Linear(FEATURES, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, CLASSES),
    )


def loss_of(model: nn.Module, batch: Rows) -> Tensor:
    """Return the mean cross entropy of a batch."""
    return functional.cross_entropy(model(batch[0]), batch[1])


def correct_of(model: nn.Module, batch: Rows) -> Tensor:
    """Count the right predictions of a batch."""
    return (model(batch[0]).argmax(1) == batch[1]).sum()


def make_data() -> tuple[list[Rows], Rows]:
    """Draw each client's rows, its classes in shares from Dir(0.5), and balanced test rows."""
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(CLASSES, FEATURES, generator=generator)
    # Dir(a) as gamma variables over their sum; torch's generator has no gamma, so the shares have a seed of their own.
    with torch.random.fork_rng([]):
        torch.manual_seed(2)
        shares = torch.distributions.Dirichlet(torch.full((CLASSES,), ALPHA)).sample((CURRENT.clients,))

    def rows_of(labels: Tensor) -> Rows:
        noise = torch.randn(len(labels), FEATURES, generator=generator)
        return centers[labels] + 3.0 * noise, labels

    clients = [
        rows_of(torch.multinomial(share, CURRENT.rows, replacement=True, generator=generator)) for share in shares
    ]
    return clients, rows_of(torch.randint(CLASSES, (TEST_ROWS,), generator=generator))


def places(round: int, client: int) -> Iterable[Tensor]:
    """Draw the batches of a client's round as fedmoe draws them, from places 0..rows-1."""
    own = torch.arange(CURRENT.rows)
    return draw_places(own, (0, round, client), steps=CURRENT.steps, batch_size=BATCH, by_epoch=True)


def sgd(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """Make the optimizer of every engine."""
    return torch.optim.SGD(parameters, lr)


def train_client(model: nn.Module, rows: Rows, round: int, client: int) -> None:
    """Train the live ``model`` for one client's round: what every engine but fedmoe calls."""
    optimizer = sgd(model.parameters(), LR)
    for place in places(round, client):
        loss_of(model, tuple(tensor[place] for tensor in rows)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def judge(model: nn.Module, test: Rows) -> tuple[float, float]:
    """Return loss and accuracy on the test rows."""
    with torch.no_grad():
        return float(loss_of(model, test)), float(correct_of(model, test)) / len(test[0])


def adapter_of() -> object:
    """Make what fedmoe runs."""
    from fedmoe_core.model.plain import plain  # here, so that an environment of another engine needs none of it

    train, test = make_data()
    return plain(make_model, loss_of, train=train, test=test, correct_fn=correct_of, optimizer_fn=sgd)


def __getattr__(name: str) -> object:
    """Make ``adapter`` where fedmoe asks for it: other engines need no data of it."""
    if name == "adapter":
        return adapter_of()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
