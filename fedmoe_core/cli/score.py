"""``fedmoe score``: the experts of every layer, ranked by what they are worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmoe_core.base.say import say
from fedmoe_core.base.wording import nearest
from fedmoe_core.selection.names import AGREEMENT, BEST, RANKINGS

if TYPE_CHECKING:
    from fedmoe_core.config.run_config import Config
    from fedmoe_core.simulation.observer import Observer
    from fedmoe_core.simulation.scoring import Scoring

BY_HELP = (
    f"The score to rank by: {', '.join(RANKINGS)}. {BEST} agrees best with the exact loss without each expert: rank "
    f"correlation {AGREEMENT} on a small model."
)
By = Annotated[str, typer.Option(help=BY_HELP)]
Top = Annotated[int, typer.Option(min=0, help="Print so many experts of each layer; 0 = all.")]
Batches = Annotated[int, typer.Option(min=1, help="Batches of train.batch_size x train.seq_len tokens to score on.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="JSON file for all scores of all experts.")]
DEFAULT_BY, DEFAULT_BATCHES = BEST, 32


def check(by: str) -> None:
    """Refuse the name of a score that does not exist.

    Raises:
        ValueError: with the nearest name, or all.
    """
    if by not in RANKINGS:
        near = nearest(by, list(RANKINGS))
        hint = f"did you mean {near!r}?" if near else f"choose one of {', '.join(RANKINGS)}"
        raise ValueError(f"unknown score {by!r}; {hint}")


def run(config: Config, observer: Observer, *, by: str, batches: int, out: Path | None) -> Scoring:
    """Score the model of ``config`` and write all scores to ``out``, where it is given."""
    from fedmoe_core.base.files import write_json
    from fedmoe_core.simulation.scoring import score_model

    found = score_model(config, batches=batches, observer=observer)
    if out is not None:
        write_json(out, found.facts(by))
    return found


def show(found: Scoring, *, by: str, top: int, as_json: bool) -> None:
    """Print the ranking of every layer, or all scores as JSON."""
    facts = found.facts(by)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    say(f"{by}: {RANKINGS[by]}")
    width = max(len(by), 10)
    for layer, order in enumerate(facts["ranking"]):
        shown = order[:top] if top else order
        say(f"MoE layer {layer}: {facts['tokens'][layer]:,} tokens, {len(shown)} of {len(order)} experts")
        say(f"{'rank':>6}  {'expert':>6}  {by:>{width}}  {'tokens':>9}")
        for rank, expert in enumerate(shown, start=1):
            score, tokens = facts["scores"][by][layer][expert], facts["tokens_by_expert"][layer][expert]
            say(f"{rank:>6}  {expert:>6}  {score:>{width}.4g}  {tokens:>9,}")
