"""What settings of a run must agree in: which values stand together, and what is refused with the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedmoe_core.config.privacy import check_privacy
from fedmoe_core.config.sections import EvalConfig, TrainConfig

OWN = "own"  # what a plain torch model brings itself

# What only language models have; a plain torch model's own loss may have the like.
OF_TEXT = ("train.label_smoothing", "train.token_dropout", "train.logit_adjustment", "train.experts", "eval.personal")


def is_plain(adapter: str) -> bool:
    """Tell whether ``Config.adapter`` is a plain torch model, named or handed over."""
    return adapter == OWN or ":" in adapter


def _check_plain(values: Mapping[str, Any]) -> None:
    """A plain torch model brings its data and its module, and nothing else does."""
    adapter = values["adapter"]
    for key in ("data", "model"):
        if (values[key] == OWN) != is_plain(adapter):
            kind = "brings its own" if is_plain(adapter) else "opens a language model"
            raise ValueError(
                f"adapter={adapter} {kind} and {key}={values[key]}; set {key}=own for a plain torch model alone, as "
                'Config.load(overrides=["adapter=own"]) does'
            )
    if values["train.local_epochs"] and not is_plain(adapter):
        raise ValueError("train.local_epochs is for plain torch models; set train.local_steps")
    for key in OF_TEXT if is_plain(adapter) else ():
        section, _, name = key.partition(".")
        if values[key] != (usual := getattr({"train": TrainConfig, "eval": EvalConfig}[section], name)):
            raise ValueError(f"{key}={values[key]} means nothing to a plain torch model; leave it at {usual}")


def _check_buffer(values: Mapping[str, Any]) -> None:
    """Buffered runs have a buffer and no rounds; what only rounds have is refused with them."""
    buffer, deadline = values["time.buffer"], values["time.deadline"]
    if values["time.mode"] != "buffered":
        if buffer:
            raise ValueError(f"time.buffer={buffer} is for buffered runs; set time.mode=buffered, or leave it out")
        return
    if not buffer:
        raise ValueError("time.mode=buffered needs time.buffer, the answers that make a server step; set 1 or more")
    if deadline:
        raise ValueError(
            f"time.deadline={deadline:g} ends a round, and a buffered run waits for none; leave it out, or set "
            "time.mode=rounds"
        )
    if values["aggregation.gate"] == "literal":
        raise ValueError(
            "aggregation.gate=literal rescales whole routers by the clients of a round, and a buffered run has no "
            "rounds; choose row-wise, normalized or fedavg"
        )


def _check_guard(values: Mapping[str, Any], answers: str) -> None:
    """The guard needs so many answers in a round, and averages that divide by what it leaves."""
    quorum, rule = values["guard.quorum"], values["guard.rule"]
    if quorum > values[answers]:
        raise ValueError(f"guard.quorum={quorum} exceeds {answers}={values[answers]}; lower it, or raise {answers}")
    if values[answers] < (fewest := {"trimmed_mean": 3, "median": 3, "krum": 5}.get(rule, 1)):
        raise ValueError(
            f"guard.rule={rule} compares at least {fewest} clients, and {answers}={values[answers]}; raise it, or set "
            "guard.rule=norm"
        )
    if values["aggregation.gate"] == "literal" and (quorum > 1 or rule != "none"):
        raise ValueError(
            "aggregation.gate=literal rescales whole routers, which no guard can hold back; choose row-wise, "
            "normalized or fedavg"
        )


def check_pairs(values: Mapping[str, Any]) -> None:
    """Refuse values, each of which is fit, that do not stand together.

    Args:
        values: of a configuration, by dotted key.

    Raises:
        ValueError: one of them; the sentence names both, and the remedy.
    """
    sampled = "clients_per_round" if values["clients_per_round"] else "clients"
    buffered = values["time.mode"] == "buffered"
    for key, most in (
        ("model_config.top_k", "model_config.experts"),
        ("fft_moe.top_k", "fft_moe.experts"),
        ("split.top_k", "split.experts"),
        ("clients_per_round", "clients"),
        ("min_clients", sampled),
        *([("time.buffer", sampled), ("min_clients", "time.buffer")] if buffered and values["time.buffer"] else []),
    ):
        if values[key] > values[most]:
            raise ValueError(f"{key}={values[key]} exceeds {most}={values[most]}; lower it, or raise {most}")
    _check_plain(values)
    _check_buffer(values)
    check_privacy(values)
    _check_guard(values, "time.buffer" if buffered else sampled)
    kind, _, number = values["split.layers"].partition(":")
    if kind == "last" and not (number.isdecimal() and int(number) > 0):
        raise ValueError(f"split.layers={values['split.layers']!r} names no number of layers; give last:4, or all")
    heads, kv_heads = values["model_config.heads"], values["model_config.kv_heads"]
    if heads % kv_heads:
        raise ValueError(
            f"model_config.heads={heads} is not a multiple of model_config.kv_heads={kv_heads}; "
            "choose kv_heads that divides heads"
        )
    for key, last in (("selection.lam", 1.0), ("selection.beta", math.inf), ("aggregation.tau", 1.0)):
        if not 0 <= (end := values[key] + values[f"{key}_change"]) <= last:
            raise ValueError(f"{key} + {key}_change is {end:g} in the last round; keep it from 0 to {last:g}")
    if values["selection.reschedule"] == "round":
        return
    if values["selection.mode"] != "backward-masked":
        raise ValueError("selection.reschedule=batch needs every expert resident; set selection.mode=backward-masked")
    if values["selection.score"] not in ("s", "ib"):
        raise ValueError(
            f"selection.score={values['selection.score']} is summed in a step of training, and a scoring pass has no "
            "backward; choose s or ib"
        )
    if values["train.experts"] == "lora":
        raise ValueError("train.experts=lora lays experts out once a round; set selection.reschedule=round with it")
    if values["train.prox"] > 0:
        raise ValueError("train.prox holds experts of a whole round; set selection.reschedule=round with it")
