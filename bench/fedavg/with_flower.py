"""The job in Flower: its simulation runtime, message API and FedAvg strategy; run in an environment with flwr."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from bench.fedavg.job import CURRENT, judge, make_data, make_model, train_client

client_app, server_app = ClientApp(), ServerApp()
_KEPT: dict[str, Any] = {}  # of an actor: data and model are made once, as every engine does


def kept() -> tuple[Any, Any]:
    """Return this process's data and live model."""
    if not _KEPT:
        torch.set_num_threads(1)
        _KEPT.update(model=make_model(), clients=make_data()[0])
    return _KEPT["model"], _KEPT["clients"]


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train one client."""
    model, clients = kept()
    client, round = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])  # type: ignore[index,arg-type,call-overload]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
    train_client(model, clients[client], round - 1, client)
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": len(clients[client][0])}),
    }
    return Message(content=RecordDict(content), reply_to=message)  # type: ignore[arg-type]


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Run the rounds; a line is printed after each."""
    model, test, now = make_model(), make_data()[1], {"began": time.perf_counter()}

    def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        loss, accuracy = judge(model, test)
        if round:
            seconds = time.perf_counter() - now["began"]
            print(json.dumps({"loss": loss, "accuracy": accuracy, "seconds": seconds, "at": time.time()}), flush=True)
        now["began"] = time.perf_counter()
        return MetricRecord({"loss": loss})

    all_of_them = {"fraction_train": 1.0, "fraction_evaluate": 0.0, "min_available_nodes": CURRENT.clients}
    strategy = FedAvg(**all_of_them, min_train_nodes=CURRENT.clients)  # type: ignore[arg-type]
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=CURRENT.rounds,
        train_config=ConfigRecord({}),
        evaluate_fn=evaluate,
    )


if __name__ == "__main__":
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=CURRENT.clients,
        backend_config={
            "init_args": {"num_cpus": int(sys.argv[1]), "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
