"""The job in pfl: its backend, federated averaging and PyTorch model; torchrun runs it in an environment with pfl."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

# As in bare.py: imported later, it would keep the group beyond its end.
import torch.distributed.nn.functional
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor

from bench.fedavg.job import BATCH, CURRENT, LR, judge, loss_of, make_data, make_model, places

NOW = {"round": 0, "began": time.perf_counter()}


class Ordered(Dataset):
    """A user's rows, in the batches that every engine uses."""

    def iter(self, batch_size: int | None) -> Iterator[Any]:
        """Yield the batches of all passes at once; pfl is told of one pass."""
        inputs, labels = self.raw_data
        for place in places(NOW["round"], int(self.user_id)):  # type: ignore[arg-type]
            yield inputs[place], labels[place]


class Printed(TrainingProcessCallback):
    """Judges the model after every round, as the other engines do."""

    def __init__(self, test: tuple[Tensor, ...], leads: bool) -> None:
        self.test, self.leads = test, leads

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        """Print the line of a round."""
        if self.leads:
            loss, accuracy = judge(model.pytorch_model, self.test)
            seconds = time.perf_counter() - NOW["began"]
            print(json.dumps({"loss": loss, "accuracy": accuracy, "seconds": seconds, "at": time.time()}), flush=True)
        NOW.update(round=central_iteration + 1, began=time.perf_counter())
        return False, Metrics()


def main() -> None:
    """Run the job."""
    torch.set_num_threads(1)
    np.random.seed(0)
    model, (clients, test) = make_model(), make_data()
    leads = os.environ.get("RANK", "0") == "0"
    model.loss = lambda inputs, labels, eval=False: loss_of(model, (inputs, labels))  # type: ignore[assignment]
    model.metrics = lambda inputs, labels, eval=False: {"n": Weighted(0.0, len(inputs))}  # type: ignore[assignment]
    wrapped = PyTorchModel(
        model, lambda parameters, lr: torch.optim.SGD(parameters, lr), torch.optim.SGD(model.parameters(), 1.0)
    )

    def dataset(user: str) -> Ordered:
        return Ordered(raw_data=list(clients[int(user)]), user_id=user)

    users = [str(client) for client in range(CURRENT.clients)]
    data = FederatedDataset(dataset, MinimizeReuseUserSampler(users))
    backend = SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()])
    algorithm = NNAlgorithmParams(
        central_num_iterations=CURRENT.rounds,
        evaluation_frequency=10**6,
        train_cohort_size=CURRENT.clients,
        val_cohort_size=0,
    )
    # One pass, for ``Ordered`` yields the batches of all of them.
    train = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=LR, local_batch_size=BATCH)
    FederatedAveraging().run(
        algorithm, backend, wrapped, train, NNEvalHyperParams(local_batch_size=BATCH), [Printed(test, leads)]
    )
    if dist.is_initialized():  # pfl leaves its group to Python's end, and now and then a rank aborts there
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
