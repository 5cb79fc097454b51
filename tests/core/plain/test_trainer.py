"""Local training of a plain model: as a loop by hand, and many clients at once as each alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from small_plain import blobs, cross_entropy, dropping, made, momentum, network, normed, sgd
from torch import Tensor, nn

from fedmoe_core.client.plain.trainer import PlainTrainer
from fedmoe_core.config.sections import TrainConfig
from fedmoe_core.data.rows import Rows
from fedmoe_core.model.plain import PlainModel, plain_spec, plain_tensors

Params = dict[str, Tensor]


def trainer_of(model: PlainModel, *, double: bool = False) -> tuple[PlainTrainer, Params]:
    live = model.build(0)
    live = live.double() if double else live
    moving = frozenset(spec.key for spec in plain_spec(live).trained(train_dense=True))
    return PlainTrainer(model, live, moving), {key: tensor.clone() for key, tensor in plain_tensors(live).items()}


def batches_of(client: int, *, steps: int = 4, double: bool = False) -> list[Rows]:
    inputs, labels = blobs(6 * steps, seed=10 + client)
    inputs = inputs.double() if double else inputs
    return list(zip(inputs.split(6), labels.split(6), strict=True))


def test_one_client_is_the_loop_that_one_would_write() -> None:
    trainer, params = trainer_of(made())
    by_hand = made().build(0)
    optimizer = torch.optim.SGD(by_hand.parameters(), 0.1)
    losses = []
    for batch in batches_of(0):
        loss = cross_entropy(by_hand, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        optimizer.step()
        losses.append(float(loss.detach()))
    kept = {key: tensor.clone() for key, tensor in params.items()}
    found = trainer.train(params, iter(batches_of(0)), TrainConfig(lr=0.1, clip=0.5))
    assert list(found.losses) == losses
    for key, tensor in plain_tensors(by_hand).items():
        assert torch.equal(found.deltas[key], tensor - params[key]), key
        assert torch.equal(kept[key], params[key]), "the global model was changed"


def test_adamw_of_the_configuration_is_the_default() -> None:
    trainer, params = trainer_of(made(optimizer_fn=None))
    by_hand = made().build(0)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    for batch in batches_of(0):
        optimizer.zero_grad()
        cross_entropy(by_hand, batch).backward()
        optimizer.step()
    found = trainer.train(params, iter(batches_of(0)), TrainConfig(lr=0.01, weight_decay=0.1, clip=0.0))
    for key, tensor in plain_tensors(by_hand).items():
        assert torch.equal(found.deltas[key], tensor - params[key]), key


@pytest.mark.parametrize("optimizer_fn", [sgd, momentum, None], ids=["sgd", "momentum", "adamw"])
@pytest.mark.parametrize(
    "train",
    [TrainConfig(lr=0.05, clip=0.0), TrainConfig(lr=0.05, clip=0.3, prox=0.2, weight_decay=0.1)],
    ids=["bare", "clip, prox"],
)
def test_many_at_once_give_what_each_gives_alone(
    optimizer_fn: Callable[[Iterable[Tensor], float], torch.optim.Optimizer] | None, train: TrainConfig
) -> None:
    trainer, params = trainer_of(made(optimizer_fn=optimizer_fn), double=True)
    own = [batches_of(client, double=True) for client in range(3)]
    alone = [trainer.train(params, iter(batches), train) for batches in own]

    def together() -> Iterator[Rows]:
        for step in zip(*own, strict=True):
            yield tuple(torch.stack(columns) for columns in zip(*step, strict=True))

    found = trainer.train_many(params, together(), train, clients=3)
    for one, other in zip(alone, found, strict=True):
        assert other.losses == pytest.approx(one.losses, rel=1e-12)
        for key, delta in one.deltas.items():
            assert delta.norm() > 0
            assert (other.deltas[key] - delta).norm() <= 1e-10 * delta.norm(), key


def test_a_client_whose_loss_is_not_a_number_spoils_no_other() -> None:
    trainer, params = trainer_of(made())
    train = TrainConfig(lr=0.05)

    def together(poison: float) -> Iterator[Rows]:
        for step in zip(*[batches_of(client) for client in range(3)], strict=True):
            inputs, labels = (torch.stack(columns) for columns in zip(*step, strict=True))
            inputs[1] = inputs[1] * poison
            yield inputs, labels

    well, ill = (trainer.train_many(params, together(poison), train, clients=3) for poison in (1.0, torch.nan))
    assert ill[1].trouble == "the loss became nan at local step 1"
    for client in (0, 2):
        assert ill[client].trouble == ""
        assert all(torch.equal(ill[client].deltas[key], delta) for key, delta in well[client].deltas.items())


def test_deltas_of_a_client_lie_end_to_end() -> None:
    trainer, params = trainer_of(made())
    deltas = list(trainer.train(params, iter(batches_of(0)), TrainConfig()).deltas.values())
    assert len({delta.untyped_storage().data_ptr() for delta in deltas}) == 1
    assert [delta.storage_offset() for delta in deltas] == [0, 40, 48, 72]


def test_draws_come_from_the_seed_and_leave_the_generator_alone() -> None:
    trainer, params = trainer_of(made(dropping))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, same, other = (trainer.train(params, iter(batches_of(0)), TrainConfig(), seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.losses == same.losses != other.losses


def test_it_is_known_who_cannot_train_at_once() -> None:
    class Odd(torch.optim.SGD):
        pass

    def odd(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        return Odd(parameters, lr)

    assert trainer_of(made())[0].alone_because(TrainConfig()) == ""
    assert trainer_of(made(normed))[0].alone_because(TrainConfig()) == "its model has buffers"
    why = "its optimizer does not move each weight by itself"
    assert trainer_of(made(network, optimizer_fn=odd))[0].alone_because(TrainConfig()) == why
