"""The card of an exported model, README.md: what it is, what it was trained on and under which budgets, how good."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedmoe_core.base import show
from fedmoe_core.base.wording import visible
from fedmoe_core.config.run_config import Config
from fedmoe_core.config.systems import title_of
from fedmoe_core.exporting.judged import Opened
from fedmoe_core.model.spec import model_hash

WRITTEN_BY = ("fedmoe-core", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Sheet:
    """What a card says that the run's records do not.

    Attributes:
        client: whose own model it is; None = the global one.
        format: "hf" or "peft".
        folder: the name that the export has.
        kept_LE: experts that are in it, bool (L, E).
        top_k: experts per token.
        loss: held-out, of the model that the files hold.
        notes: what else has to be known to use it, each a sentence.
        base: of an adapter, where the model under it is.
    """

    client: int | None
    format: str
    folder: str
    kept_LE: np.ndarray
    top_k: int
    loss: float
    notes: Sequence[str]
    base: str = ""

    @property
    def whose(self) -> str:
        """Name the model within its run."""
        return "the global model" if self.client is None else f"client {self.client}'s own model"

    @property
    def counts_L(self) -> list[int]:
        """Experts of each layer."""
        return [int(count) for count in self.kept_LE.sum(axis=1)]


def card(opened: Opened, sheet: Sheet) -> str:
    """Write README.md: YAML front matter, then Markdown; every text of the run in it is made visible and one line."""
    config, task = opened.world.config, opened.world.data.task
    environment = Environment(
        loader=PackageLoader("fedmoe_core.exporting", "."),
        autoescape=False,  # Markdown; what comes from outside goes through finalize
        undefined=StrictUndefined,
        finalize=_one_line,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    system = title_of(config.algorithm)
    return environment.get_template("card.md.j2").render(
        library="peft" if sheet.format == "peft" else "transformers",
        pipeline="text-generation" if task == "causal_lm" else "text-classification",
        base=sheet.base if sheet.format == "peft" else _hub_id(config.model),
        tags=["fedmoe", "federated-learning", "mixture-of-experts", config.algorithm],
        title=f"{system}, {sheet.whose}",
        what=_what(opened, sheet),
        usage=_Code(_usage(sheet, task)),
        notes=sheet.notes,
        results=_results(opened, sheet.client),
        judged=_judged(opened, sheet),
        training=_training(opened, config, system),
        tiers=list(Counter(config.budgets[c % len(config.budgets)] for c in range(config.clients)).items()),
        experts=_experts(sheet),
        versions=[(name, version(name)) for name in WRITTEN_BY]
        + [(f"trained with {name}", number) for name, number in sorted(opened.versions.items())],
    )


class _Code(str):
    """Text of ours that has several lines."""


def _one_line(value: Any) -> Any:
    """Make what comes from a run visible, and leave it no line break or table border to write with."""
    return value if isinstance(value, _Code) or hasattr(value, "__html__") else visible(str(value)).replace("|", "\\|")


def _what(opened: Opened, sheet: Sheet) -> str:
    config, standing = opened.world.config, opened.standing
    kind = "Adapters and routers" if sheet.format == "peft" else "A model of transformers"
    return (
        f"{kind}: {sheet.whose} after round {standing.round} of {config.rounds}, fine-tuned by "
        f"{show.plural(config.clients, 'client')} under hard budgets with fedmoe."
    )


def _usage(sheet: Sheet, task: str) -> str:
    kind = "AutoModelForCausalLM" if task == "causal_lm" else "AutoModelForSequenceClassification"
    if sheet.format == "peft":
        return (
            f"from peft import PeftModel\nfrom transformers import {kind}\n\n"
            f"model = PeftModel.from_pretrained({kind}.from_pretrained({sheet.base!r}), {sheet.folder!r})"
        )
    pipeline = "text-generation" if task == "causal_lm" else "text-classification"
    return f"from transformers import pipeline\n\nanswer = pipeline({pipeline!r}, model={sheet.folder!r})"


def _results(opened: Opened, client: int | None) -> list[tuple[str, str, str]]:
    """Loss in nats, and accuracy where there are classes, before the first round and after the last."""
    kinds = [("loss", "loss (nats)", show.number)]
    if opened.world.data.task == "classification":
        kinds.append(("accuracy", "accuracy", show.share))
    return [
        (name, text(opened.figure(kind, client, first=True)), text(opened.figure(kind, client)))
        for kind, name, text in kinds
    ]


def _judged(opened: Opened, sheet: Sheet) -> str:
    recorded = opened.recorded(sheet.client)
    now = f"The export measured a held-out loss of {sheet.loss:.6g} nats"
    if recorded is None:
        return f"{now}; the run has no loss of {sheet.whose} on record."
    return f"{now}; the run's record of {sheet.whose} says {recorded:.6g}."


def _training(opened: Opened, config: Config, system: str) -> list[tuple[str, str]]:
    data, standing = opened.world.data, opened.standing
    return [
        ("system", system),
        ("model", _last_part(config.model)),
        ("data", _last_part(config.data)),
        ("sha256 of the data", standing.identity["corpus_sha256"]),
        ("partition", data.partition),
        ("clients", f"{config.clients}, {config.clients_per_round or config.clients} a round"),
        ("rounds", f"{standing.round} of {config.rounds}"),
        ("seed", str(config.seed)),
        ("what trained", f"experts: {config.train.experts}, trunk: {config.train.trunk}"),
    ]


def _experts(sheet: Sheet) -> str:
    counts, whole = sheet.counts_L, sheet.kept_LE.shape[1]
    each = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    return f"{each} of {whole} in each of {show.plural(len(counts), 'MoE layer')}, {sheet.top_k} for each token."


def _last_part(source: str) -> str:
    """Return a source without the folders that it lies in: a card travels, and says nothing of whose disk that was."""
    kind, colon, place = source.partition(":")
    return f"{kind}{colon}{Path(place or kind).name}" if colon else source if _hub_id(source) else Path(source).name


def _hub_id(model: str) -> str:
    """Return a model's name where it is one on the hub: owner/name."""
    return model if model.count("/") == 1 and not model.startswith(("/", ".")) and ":" not in model else ""


def facts_of(opened: Opened, sheet: Sheet) -> Mapping[str, Any]:
    """Return what ``fedmoe.json`` says, in JSON's types."""
    config = opened.world.config
    return {
        "run": opened.standing.run,
        "algorithm": config.algorithm,
        "round": opened.standing.round,
        "seed": config.seed,
        "export": sheet.format,
        "client": sheet.client,
        "budget": None if sheet.client is None else config.budgets[sheet.client % len(config.budgets)],
        "model_sha256": model_hash(opened.state.params),
        "corpus_sha256": opened.standing.identity["corpus_sha256"],
        "num_experts": int(sheet.kept_LE.shape[1]),
        "kept_experts": [[int(e) for e in np.flatnonzero(kept_E)] for kept_E in sheet.kept_LE],
        "top_k": sheet.top_k,
        "loss": sheet.loss,
        "recorded_loss": opened.recorded(sheet.client),
        "class_names": list(opened.world.data.class_names),
        "notes": list(sheet.notes),
        "versions": {name: version(name) for name in WRITTEN_BY},
    }
