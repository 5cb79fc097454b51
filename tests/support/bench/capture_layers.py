"""Layers that a CUDA graph is to hold, by what they have; run as a script it takes them through the stand-in driver.

As a script it is a child process, called with the folder of the driver, and prints what was found, as JSON by name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmoe_core import MoE
from fedmoe_core.layer.lora import LayerLora
from fedmoe_core.layer.routing_rule import RoutingRule
from fedmoe_core.layer.shared_expert import SharedExpert

T, H, INNER, E, K = 64, 128, 128, 8, 2
# Experts that train are not the first ones, so that the router's rows are put in order at every call.
HELD, TRAINS = [True] * 6 + [False] * 2, [False, True, False, True] + [False] * 4
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all train": {"trainable": None, "permitted": None},
    "none trains": {"trainable": [False] * E},
    "statistics and importance": {"with_stats": True, "with_scores": True},
    "recomputed": {"recompute": True},
    "fp8": {"frozen_format": "fp8_e4m3"},
    "4 bits": {"frozen_format": "nvfp4"},
    "sigmoid": {"rule": RoutingRule("sigmoid", renormalize=False)},
    "as gpt-oss": {
        "rule": RoutingRule("topk_softmax"),
        "activation": "swiglu_oai",
        "expert_bias": True,
        "router_bias": True,
    },
    "as DeepSeek-V3": {
        "rule": RoutingRule("sigmoid", groups=(4, 2), scale=2.5),
        "correction_bias": True,
        "shared": True,
    },
    "no gate": {"activation": "relu"},
    "adapters": {},
    "an output scale": {},
    "logits": {},
}


def layer_of(name: str, dtype: torch.dtype = torch.float16, *, sizes: tuple[int, int] = (H, INNER)) -> MoE:
    """One of `LAYERS` on the CPU, with normal weights; `sizes` are the width of a token and that inside an expert."""
    options: dict[str, Any] = {"permitted": HELD, "trainable": TRAINS} | LAYERS[name]
    torch.manual_seed(0)
    if "shared" in options:
        options["shared"] = SharedExpert(*sizes, dtype=dtype)
    layer = MoE(*sizes, E, K, dtype=dtype, **options)
    if name == "logits":
        layer.recorder = lambda logits_TE, routing, x_TH: None
    if name == "an output scale":
        layer.start_out_scale(0.5)
    if name == "adapters":
        whole = MoE(*sizes, E, K, dtype=dtype).global_state()
        lora = LayerLora.fresh(whole.w_in, whole.w_out, rank=16, scale=0.5, seed=0)
        layer.load_global(replace(whole, lora=lora), permitted=HELD, trainable=TRAINS)
    return layer


def leaves_of(layer: MoE) -> list[Tensor]:
    """What gets a gradient."""
    used = [p for p in layer.parameters() if p.requires_grad]
    return [*used, *([] if layer.scores is None else [layer.scores.leaf_B7])]


def step_of(layer: MoE, x: Tensor, mask_T: Tensor | None = None) -> Callable[[], None]:
    """One forward and backward."""
    leaves, dy = [x, *leaves_of(layer)], torch.empty_like(x)

    def step() -> None:
        torch.autograd.grad(layer(x, mask_T), leaves, dy)

    return step


def without_memory(layer: MoE) -> MoE:
    """The layer on "meta", where every tensor that stays on the CPU is on another device."""
    return layer.to("meta")


def main(folder: Path) -> None:
    from bench.common.capture import findings_of
    from bench.stand_in import driver as stand_in
    from bench.stand_in.run import served

    driver = stand_in.activate(stand_in.build(folder), "sm_90")
    said: dict[str, Any] = {}
    with served("sm_90"):
        step = step_of(layer_of("plain"), torch.zeros(T, H, dtype=torch.float16, requires_grad=True))
        with driver.capturing(), suppress(RuntimeError):  # what is refused is an error for Triton too
            step()
        said["not warmed up"] = {"findings": driver.findings()}
        for name in LAYERS:
            step = step_of(layer_of(name), torch.zeros(T, H, dtype=torch.float16, requires_grad=True))
            step()
            driver.reset()
            with driver.capturing():
                found = findings_of(step)
            said[name] = {"launches": driver.counts().launches, "findings": [*driver.findings(), *found]}
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
