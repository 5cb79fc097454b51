"""A bare loop under torchrun, the floor: it checks, saves and logs nothing, and reduces one flat tensor a round."""

from __future__ import annotations

import json
import os
import time

import torch
import torch.distributed as dist

# Imported later, by the first optimizer, it would keep the group beyond its end: now and then a rank then aborts.
import torch.distributed.nn.functional

from bench.fedavg.job import CURRENT, judge, make_data, make_model, train_client


def main() -> None:
    """Run the job; rank 0 prints one JSON line a round."""
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo")
    model, (clients, test) = make_model(), make_data()
    parameters = list(model.parameters())
    total = sum(len(rows[0]) for rows in clients)
    start = torch.nn.utils.parameters_to_vector(parameters).detach()
    for round in range(CURRENT.rounds):
        began = time.perf_counter()
        summed = torch.zeros_like(start)
        for client in range(rank, CURRENT.clients, world):
            torch.nn.utils.vector_to_parameters(start.clone(), parameters)
            train_client(model, clients[client], round, client)
            trained = torch.nn.utils.parameters_to_vector(parameters).detach()
            summed.add_(trained, alpha=len(clients[client][0]) / total)
        if world > 1:
            dist.all_reduce(summed)
        start = summed
        torch.nn.utils.vector_to_parameters(start.clone(), parameters)
        if rank == 0:
            loss, accuracy = judge(model, test)
            seconds = time.perf_counter() - began
            print(json.dumps({"loss": loss, "accuracy": accuracy, "seconds": seconds, "at": time.time()}), flush=True)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
