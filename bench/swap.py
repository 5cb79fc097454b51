"""A whole small model of transformers whose experts are swapped: time of a step against every stock way, and memory.

    python -m bench.swap [--repeats 5] [--threads 2] [--out FILE]

The contenders change one model's experts between their turns, as a user does it, and take turns in every repeat.
Before any time is reported their losses and gradients have been compared. Memory is that of one step of AdamW: weights,
gradients, optimizer state, and the peak above the weights; a quarter of the experts is permitted.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from bench.common.checkout import RESULTS
from bench.common.machine import machine
from fedmoe_bindings.transformers import extract_submodel, use_fedmoe
from fedmoe_core.budget.peak_memory import tensor_bytes, trace_memory

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "use_cache": False,
}
SMALL = SIZES | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 16,
    "head_dim": 8,
    "num_experts": 8,
}
STOCK = ("eager", "grouped_mm", "batched_mm")
BATCH = (2, 256)
# Of the loss, and of the gradients of the first layer's experts, relative: rounding in float32.
CLOSE = 1e-4


def built(sizes: dict[str, Any]) -> Any:
    """A random model in float32."""
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).train()


def step(model: Any, tokens: Tensor) -> Tensor:
    """One forward and backward."""
    model.zero_grad(set_to_none=True)
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach()


def times(model: Any, tokens: Tensor, repeats: int) -> dict[str, Any]:
    """Median milliseconds of every contender, after their results have been compared."""

    def choose(name: str) -> None:
        use_fedmoe(model) if name == "fedmoe" else model.set_experts_implementation(name)

    def run(name: str) -> Tensor:
        choose(name)
        return step(model, tokens)

    names = ("fedmoe", *STOCK)
    experts = model.model.layers[0].mlp.experts
    found = {name: (float(run(name)), experts.down_proj.grad.clone()) for name in names}
    loss, grad = found["eager"]
    for name, (other, its) in found.items():
        apart = max(abs(other - loss) / abs(loss), float((its - grad).norm() / grad.norm()))
        if not apart < CLOSE:
            raise SystemExit(f"{name} is off by {apart:.1e} from eager; no time is worth reporting")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        for name in names:
            choose(name)
            start = time.perf_counter()
            step(model, tokens)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    median = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    return {
        "median_ms": median,
        "quartiles_ms": {n: [1e3 * q for q in statistics.quantiles(v, n=4)] for n, v in seconds.items()},
        "times_as_fast_as": {name: median[name] / median["fedmoe"] for name in STOCK},
        "tokens_per_s": {name: 1e3 * tokens.numel() / value for name, value in median.items()},
    }


def memory(sizes: dict[str, Any], tokens: Tensor) -> dict[str, dict[str, int]]:
    """Bytes of one step of AdamW for the whole model, under a mask, and cut to a quarter of the experts."""
    whole = use_fedmoe(built(sizes))
    quarter = torch.arange(sizes["num_experts"]) < sizes["num_experts"] // 4
    forms = {
        "all experts": whole,
        "a quarter, masked": use_fedmoe(copy.deepcopy(whole), permitted=quarter),
        "a quarter, cut out": use_fedmoe(extract_submodel(whole, quarter)),
    }
    return {name: of_a_step(model, tokens) for name, model in forms.items()}


def of_a_step(model: Any, tokens: Tensor) -> dict[str, int]:
    """Bytes of the second step, for the first one makes the optimizer's state."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step(model, tokens)
    optimizer.step()
    model.zero_grad(set_to_none=True)
    _, trace = trace_memory(lambda: (step(model, tokens), optimizer.step()), torch.device("cpu"))
    state = [v for slot in optimizer.state.values() for v in slot.values() if isinstance(v, Tensor)]
    return {
        "weights": tensor_bytes(model.parameters()),
        "optimizer": tensor_bytes(state),
        "gradients": tensor_bytes(p.grad for p in model.parameters() if p.grad is not None),
        "peak above weights and optimizer": trace.peak,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(prog="python -m bench.swap", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a model of 100 thousand weights, to try the command")
    parser.add_argument("--out", type=Path, default=None, help="default: bench/results/swap-cpu-DATE.json")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    known, sizes = machine(), SMALL if chosen.small else SIZES
    tokens = torch.randint(0, sizes["vocab_size"], BATCH, generator=torch.Generator().manual_seed(1))
    model = built(sizes)
    timed, held = times(model, tokens, chosen.repeats), memory(sizes, tokens)
    report = {"machine": known, "model": sizes, "batch": list(BATCH), "step": timed, "bytes": held}
    console = Console(width=110)
    table = Table("experts", "ms", "tokens/s", "fedmoe is", title="forward and backward of the whole model, median")
    for name, value in timed["median_ms"].items():
        ratio = "" if name == "fedmoe" else f"{timed['times_as_fast_as'][name]:.2f} x as fast"
        table.add_row(name, f"{value:.0f}", f"{timed['tokens_per_s'][name]:.0f}", ratio)
    console.print(table)
    table = Table("MB of a step of AdamW", *next(iter(held.values())))
    for name, row in held.items():
        table.add_row(name, *(f"{value / 1e6:.1f}" for value in row.values()))
    console.print(table)
    out = chosen.out or RESULTS / f"swap-cpu-{known['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
