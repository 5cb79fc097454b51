"""A plain torch model as the engine takes it: a module, its loss and its data; every tensor of it is dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fedmoe_core.base.rng import counter_seed
from fedmoe_core.base.tensor_key import DENSE, TensorKey
from fedmoe_core.data.rows import Rows
from fedmoe_core.model.spec import Kind, ModelSpec, ParamSpec

LossFn = Callable[[Any, Rows], Tensor]
OptimizerFn = Callable[[Iterable[Tensor], float], torch.optim.Optimizer]


@dataclass(frozen=True, eq=False)
class PlainModel:
    """What ``plain`` was given; one run makes one live module of it in every process.

    Attributes:
        model_fn: makes the module; its weights are the ones that federation starts from.
        loss_fn: (model, batch) -> mean loss of the batch, a scalar.
        train, test: as ``data.rows.deal_rows``.
        correct_fn: (model, batch) -> how many predictions are right; None = the run reports no accuracy.
        optimizer_fn: (parameters, learning rate) -> a fresh optimizer; None = AdamW by ``[train]``.
    """

    model_fn: Callable[[], nn.Module]
    loss_fn: LossFn
    train: Rows | Sequence[Rows]
    test: Rows
    correct_fn: LossFn | None = None
    optimizer_fn: OptimizerFn | None = None

    def build(self, seed: int) -> nn.Module:
        """Make the module, in training mode; what it draws comes from the run's seed.

        Raises:
            ValueError: ``model_fn`` returns something else, or nothing in it can train.
        """
        with torch.random.fork_rng():
            torch.manual_seed(counter_seed(seed, "plain model"))
            model = self.model_fn()
        if not isinstance(model, nn.Module):
            raise ValueError(f"model_fn returned {type(model).__name__}; return a torch.nn.Module")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("the model has no parameter that requires a gradient; let some of them train")
        return model.train()


def plain(
    model_fn: Callable[[], nn.Module],
    loss_fn: LossFn,
    *,
    train: Rows | Sequence[Rows],
    test: Rows,
    correct_fn: LossFn | None = None,
    optimizer_fn: OptimizerFn | None = None,
) -> PlainModel:
    """Let the engine train any torch module by federated averaging: sampling, exact sums, checkpoints and report.

    Args:
        model_fn: makes the module.
        loss_fn: takes the module and a batch, which is a tuple of tensors; returns the batch's mean loss.
        train: tensors with a row for each sample, which ``Config.partition`` deals to the clients by the last tensor if
            that holds labels; or a list with one such tuple for each client.
        test: held-out rows, in the same form.
        correct_fn: takes the module and a batch; returns how many predictions are right.
        optimizer_fn: takes the parameters and the learning rate of the round; returns an optimizer. The default is the
            AdamW of ``[train]``.

    Example:
        >>> import torch
        >>> from fedmoe_core import Config, plain, simulate
        >>> inputs, labels = torch.randn(600, 8), torch.randint(3, (600,))
        >>> adapter = plain(
        ...     lambda: torch.nn.Linear(8, 3),
        ...     lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1]),
        ...     train=(inputs[:500], labels[:500]),
        ...     test=(inputs[500:], labels[500:]),
        ... )
        >>> config = Config.load(overrides=["adapter=own", "clients=5", "rounds=3"])
        >>> config.algorithm, config.budgets
        ('fedavg', ('unlimited',))
        >>> summary = simulate.run(config, adapter=adapter)  # doctest: +SKIP

    Raises:
        ValueError: what is to be called is not callable.
    """
    for name, given in (("model_fn", model_fn), ("loss_fn", loss_fn)):
        if not callable(given):
            raise ValueError(f"{name} is a {type(given).__name__}; give a function")
    return PlainModel(model_fn, loss_fn, train, test, correct_fn, optimizer_fn)


def find_plain(place: str) -> PlainModel:
    """Import what ``MODULE:NAME`` names.

    Raises:
        ValueError: it cannot be imported, or was not made by ``plain``.
    """
    module, _, name = place.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"adapter={place!r} cannot be loaded ({error}); check the module and the name") from error
    if not isinstance(found, PlainModel):
        raise ValueError(f"adapter={place!r} is a {type(found).__name__}; make it with fedmoe_core.plain(...)")
    return found


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the live tensors of a model by the keys of its state: parameters, then buffers; tied ones once."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {str(TensorKey(DENSE, name)): tensor.detach() for name, tensor in named}


def plain_spec(model: nn.Module) -> ModelSpec:
    """List the tensors of a model: what trains and what moves with it is dense, the rest is frozen.

    Buffers of floats, such as running means, are averaged as weights are.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}

    def kind(name: str, tensor: Tensor) -> Kind:
        return "dense" if tensor.is_floating_point() and name not in frozen else "frozen"

    params = tuple(
        ParamSpec(key, kind(TensorKey.parse(key).name, tensor), tuple(tensor.shape), tensor.dtype)
        for key, tensor in plain_tensors(model).items()
    )
    return ModelSpec(
        family=type(model).__name__,
        task="plain",
        num_layers=0,
        num_experts=0,
        top_k=0,
        hidden_size=0,
        intermediate_size=0,
        activation="",
        params=params,
    )
