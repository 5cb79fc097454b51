"""What has to be known of an exported model to use it rightly, in sentences that the card and the command show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmoe_core.base import show
from fedmoe_core.client.step import log_prior
from fedmoe_core.exporting.judged import Opened
from fedmoe_core.messages.plan import ExpertPlan


def notes_of(found: Opened, plan: ExpertPlan | None) -> list[str]:
    """Say what is special about the model of a plan; None = the global one."""
    world, notes = found.world, list[str]()
    client = None if plan is None else plan.client
    if found.recorded(client) is None:
        why = "" if client is None else "; with eval.personal=true a run judges each client's own"
        notes.append(f"The run has no loss of this model on record{why}.")
    if plan is not None:
        whole, fewer = world.adapter.spec.top_k, choices(plan)
        if fewer < whole:
            notes.append(f"It sends each token to {show.plural(fewer, 'expert')}; the model it comes from, to {whole}.")
        copies = int((plan.served_LE & ~plan.permitted_LE).sum())
        if copies:
            notes.append(
                f"The client holds {show.plural(int(plan.permitted_LE.sum()), 'expert')}, of which merged ones serve "
                f"{copies} more; here each of these has its own copy."
            )
        if plan.extras.out_scale_L is not None:
            notes.append("The client's factor on the output of each MoE layer is multiplied into its experts.")
    if world.data.task == "classification":
        end = world.data.tokenizer.end
        notes.append(f"A text has to end with the token {end}: its last state is the one that is classified.")
        if prior_of(found, client):
            notes.append("The judged predictions add log_prior of fedmoe.json to the logits, by class.")
    return notes


def choices(plan: ExpertPlan) -> int:
    """Return k: experts for each token, at most as many as the layer with the fewest has."""
    return min(plan.top_k, int(plan.served_LE.sum(axis=1).min()))


def of_format(found: Opened, form: str, *, named: bool) -> list[str]:
    """Say what became of adapters and few bits in a format; ``named``: the base is a model that others have."""
    lora = type(found.world.algorithm).lora(found.world.config)
    if lora is None or not lora.in_state:
        return []
    notes = ["Adapters are merged into the experts."] if form == "hf" else []
    if lora.frozen_format is not None:
        few = f"Experts were stored in {lora.frozen_format} when this was judged"
        differs = form == "peft" and named
        notes.append(
            f"{few}; over plain ones the loss differs." if differs else f"{few}: their decoded values are here."
        )
    return notes


def named_base(model: str) -> bool:
    """Tell whether others find a model by what the configuration calls it: a directory, or an id on the hub."""
    return ":" not in model and (Path(model).is_dir() or model.count("/") == 1)


def prior_of(found: Opened, client: int | None) -> Mapping[str, Any]:
    """Return what a client's own classifier adds to its logits, by class; nothing where it adds nothing."""
    if client is None:
        return {}
    world = found.world
    added_C = log_prior(world.data.class_shares(client), world.config.train, world.ranks.device)
    return {} if added_C is None else {"log_prior": added_C.tolist()}
