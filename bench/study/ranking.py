"""Which score ranks experts as the loss does: rank correlation with the exact change of the loss without each expert.

    python -m bench.study.ranking            # train, measure, write the record, print the table
    python -m bench.study.ranking --print    # the table from the committed record

Three small models are trained on public text of the standard library, one a seed. Then every expert of every layer is
left out in turn, and the loss on held-out text is measured again; the router chooses among the others. Each seed is a
process of one thread, two at once: threads that share a busy core took ten times as long. Writes
bench/results/ranking-stdlib.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr

from bench.common.checkout import RESULTS, ROOT, command, environment
from bench.common.machine import about
from bench.common.markdown import table
from fedmoe_core.config.run_config import Config
from fedmoe_core.data.batches import Batch, client_batches, eval_batches
from fedmoe_core.data.federated import FederatedData
from fedmoe_core.model.adapter import ModelAdapter
from fedmoe_core.model.submodel import SubModel
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import Sources, local_public_batches, read_sources, warm_model
from fedmoe_core.simulation.process_group import open_ranks
from fedmoe_core.simulation.ranks.devices import pick_device
from fedmoe_core.simulation.scoring import Scoring, score_experts

SEEDS, WORKERS = (0, 1, 2), 2
STEPS = 300  # of training, of 16 x 128 tokens
PUBLIC_BATCHES, OWN_BATCHES = 32, 4  # of 4 x 128 tokens to score on: public text; text of each client
HELD_OUT, HELD_OUT_BATCH = 32, 16  # windows of 128 tokens of each client, in batches
RECORD = RESULTS / "ranking-stdlib.json"
CEILING = "the loss change itself, on other text"
TEXTS = {"public": "public text", "own": "clients' text"}
NUMBERS = ("within layers", "all experts")
VERSIONS = ("cpu", "python", "torch", "transformers", "commit", "date")


def held_out_losses(adapter: ModelAdapter, batches: Sequence[Batch]) -> np.ndarray:
    """Return loss sum and count of each batch with the live model as it is, (2, batches), nats and places."""
    found = [adapter.evaluate(batch) for batch in batches]
    return np.array([[one.loss_sum for one in found], [one.count for one in found]], dtype=np.float64)


def leave_one_out(adapter: ModelAdapter, params: Mapping[str, torch.Tensor], batches: Sequence[Batch]) -> np.ndarray:
    """Return by how much each batch's summed loss rises without each expert, (L, E, batches), nats.

    Exact: the model without the expert runs, its router choosing and renormalising among the others.
    """
    layers, experts = adapter.spec.num_layers, adapter.spec.num_experts
    nothing_LE = np.zeros((layers, experts), dtype=bool)
    adapter.configure(params, SubModel(trainable_LE=nothing_LE, train_router=False))
    whole = held_out_losses(adapter, batches)[0]
    rises = np.zeros((layers, experts, len(batches)))
    for layer in range(layers):
        for expert in range(experts):
            permitted_LE = ~nothing_LE
            permitted_LE[layer, expert] = False
            adapter.configure(params, SubModel(permitted_LE, nothing_LE, train_router=False))
            rises[layer, expert] = held_out_losses(adapter, batches)[0] - whole
    return rises


def correlations(score_LE: np.ndarray, rise_LE: np.ndarray) -> dict[str, float]:
    """Return Spearman's and Kendall's rank correlation, the mean of those within the layers, and over all experts.

    A layer whose scores are all equal ranks nothing and counts as 0.
    """
    found = {}
    for name, measure in (("spearman", spearmanr), ("kendall", kendalltau)):
        layers = [_of(measure, score_E, rise_E) for score_E, rise_E in zip(score_LE, rise_LE, strict=True)]
        found[f"{name} within layers"] = statistics.fmean(layers)
        found[f"{name} all experts"] = _of(measure, score_LE.ravel(), rise_LE.ravel())
    return found


def _of(measure: Any, score: np.ndarray, rise: np.ndarray) -> float:
    if np.ptp(score) == 0 or np.ptp(rise) == 0:
        return 0.0
    return float(measure(score, rise).statistic)


def own_batches(config: Config, data: FederatedData) -> list[Batch]:
    """Draw ``OWN_BATCHES`` of every client's private text, which the model was not trained on."""
    drawn: list[Batch] = []
    for number, client in enumerate(data.clients):
        drawn += client_batches(
            client.private,
            seed=config.seed,
            round=0,
            client=number,
            steps=OWN_BATCHES,
            batch_size=config.train.batch_size,
            seq_len=config.train.seq_len,
        )
    return drawn


def held_out_batches(config: Config, data: FederatedData) -> list[Batch]:
    """Return fixed windows of every client's held-out text; a client's batches follow each other."""
    found: list[Batch] = []
    for client in data.clients:
        found += eval_batches(client.test, batch_size=HELD_OUT_BATCH, seq_len=config.train.seq_len, sequences=HELD_OUT)
    return found


def study(sources: Sources) -> dict[str, Any]:
    """Train one model, score its experts, leave each out, and correlate: one seed's part of the record."""
    config, data, adapter = sources.config, sources.data, sources.adapter
    params = warm_model(sources, NullObserver(), train=True, before_training=lambda untrained: None)
    public = list(local_public_batches(config, data, PUBLIC_BATCHES))
    scored: dict[str, Scoring] = {
        "public": score_experts(adapter, params, public, config.selection),
        "own": score_experts(adapter, params, own_batches(config, data), config.selection),
    }
    batches = held_out_batches(config, data)
    rises = leave_one_out(adapter, params, batches)
    adapter.configure(params)
    losses, counts = held_out_losses(adapter, batches)
    rise_LE = rises.sum(axis=2) / counts.sum()
    halves = [rises[:, :, first::2].sum(axis=2) for first in (0, 1)]
    return {
        "seed": config.seed,
        "held_out_loss": float(losses.sum() / counts.sum()),
        "held_out_tokens": int(counts.sum()),
        "rise": rise_LE.tolist(),
        "share_of_rises_below_0": float(np.mean(rise_LE < 0)),
        "scores": {text: found.facts("taylor")["scores"] for text, found in scored.items()},
        "correlations": {
            text: {name: correlations(score_LE, rise_LE) for name, score_LE in found.scores.items()}
            for text, found in scored.items()
        },
        "halves": correlations(*halves),
    }


def config_of(seed: int, words: Sequence[str] = ()) -> Config:
    """Return the settings of one seed; ``words`` come last."""
    cache = ROOT / "runs" / "ranking"
    return Config.load(
        None, [f"seed={seed}", f"warmup.steps={STEPS}", f"cache={cache}", "threads=1", *words]
    ).resolved()


def measure(seed: int, words: Sequence[str] = ()) -> dict[str, Any]:
    """Make one seed's part of the record, with its settings and seconds; ``words`` are settings that come last."""
    config = config_of(seed, words)
    torch.set_num_threads(config.threads)
    began = time.perf_counter()
    with open_ranks(1, pick_device(config)) as ranks:
        part = study(read_sources(config, ranks, NullObserver()))
    sizes = {key: getattr(config.model_config, key) for key in ("hidden_size", "layers", "experts", "top_k")}
    settings = {"data": config.data.partition(":")[0], "steps": config.warmup.steps, "threads": config.threads}
    score = {"lam": config.selection.lam, "beta": config.selection.beta}
    seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time()}
    return part | settings | sizes | score | seconds


def measured_apart(seed: int) -> dict[str, Any]:
    """Run ``measure`` in a process of its own."""
    run = command("bench.study.ranking", "--seed", str(seed))
    done = subprocess.run(run, env=environment(OMP_NUM_THREADS="1"), cwd=ROOT, check=True, stdout=subprocess.PIPE)
    part: dict[str, Any] = json.loads(done.stdout)
    return part


def measure_all() -> dict[str, Any]:
    """Make the record of all seeds, with versions and the seconds of the whole."""
    began = time.perf_counter()
    with ThreadPoolExecutor(WORKERS) as pool:
        parts = list(pool.map(measured_apart, SEEDS))
    kept = {name: about("cpu", tiny=False)[name] for name in VERSIONS}
    return kept | {"seconds": time.perf_counter() - began, "workers": WORKERS, "seeds": parts}


def medians(record: Mapping[str, Any], text: str, name: str) -> dict[str, tuple[float, float, float]]:
    """Return median, least and largest over seeds of every correlation of a score."""
    found: dict[str, list[float]] = {}
    for part in record["seeds"]:
        values = part["halves"] if name == CEILING else part["correlations"][text][name]
        for key, value in values.items():
            found.setdefault(key, []).append(value)
    return {key: (statistics.median(values), min(values), max(values)) for key, values in found.items()}


def lines(record: Mapping[str, Any]) -> list[str]:
    """Write the table: a line for each score, best first, Spearman with its range and Kendall."""
    names = list(record["seeds"][0]["correlations"]["public"])
    names.sort(key=lambda name: -medians(record, "public", name)["spearman within layers"][0])
    heads = ["score", *(f"{TEXTS[text]}, {number}" for text in TEXTS for number in NUMBERS)]
    cells = []
    for name in (*names, CEILING):
        cells.append([name if name == CEILING else f"`{name}`"])
        for text in TEXTS:
            found = medians(record, text, name)
            for number in NUMBERS:
                middle, least, most = found[f"spearman {number}"]
                kendall = found[f"kendall {number}"][0]
                cells[-1].append(f"{middle:.2f} ({least:.2f} to {most:.2f}), {kendall:.2f}")
    return table(heads, cells)


def read(path: Path = RECORD) -> dict[str, Any]:
    """Read the committed record."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def main() -> None:
    """Measure, write and print; or print what was measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.study.ranking", description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", dest="only_print", help="print the committed record's table")
    parser.add_argument("--seed", type=int, help="measure this seed alone and print its part of the record as JSON")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        print(json.dumps(measure(arguments.seed)))
        return
    if not arguments.only_print:
        RECORD.write_text(json.dumps(measure_all(), indent=1) + "\n")
    print("\n".join(lines(read())))


if __name__ == "__main__":
    main()
