"""Work that an algorithm makes a client do besides training: profiling, scoring, forward-only estimates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from fedmoe_core.adapter import ModelAdapter
from fedmoe_core.batch import Batch
from fedmoe_core.plan import ExpertPlan

Batches = Callable[[], Iterable[Batch]]  # from the start at every call

if TYPE_CHECKING:
    from fedmoe_core.config import TrainConfig


@dataclass(frozen=True)
class Bench:
    """What a probe may use; it is the client's, so nothing of it but the probe's answer reaches the server.

    Attributes:
        adapter: the live model. Before training it may be configured in any way (all experts, quantised rows, other
            masks), as local training configures it again; after training it holds the trained sub-model.
        params: the global model, read only.
        plan: the client's plan; its ``seed`` is the source of anything random.
        train: settings of local training, for batches and losses alike.
        batches: the batches of this round's local training, from the start at every call.
        validation: the client's validation batches; none where the algorithm does not need them.
        log_prior_C: what the client's logit-adjusted training adds to a classifier's logits. An evaluation of its own
            model has to add it too; None where nothing is adjusted.
    """

    adapter: ModelAdapter
    params: Mapping[str, Tensor]
    plan: ExpertPlan
    train: TrainConfig
    batches: Batches
    validation: Batches
    log_prior_C: Tensor | None = None


class Probe(Protocol):
    """A client's measurement: tensors by name, for the algorithm's ``client`` to read in ``LocalResult.probed``.

    Its operations and traffic are declared by the plan's ``surcharge``; ``CostModel.forward_flops`` and
    ``forward_memory`` have the closed forms. Its peak memory is measured, so a surcharge that understates it shows as
    a broken budget. Gradients that it leaves are cleared.
    """

    def __call__(self, bench: Bench) -> Mapping[str, Tensor]: ...
