"""Invariant 11 through whole rounds: thousands of hostile answers, none accepted, and no bit of the state moved."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import Case, every
from tiny_runs import TINY, write_notes

from fedmoe_core.base.files import plain
from fedmoe_core.config.run_config import Config
from fedmoe_core.server.state import ServerState, pack_state
from fedmoe_core.simulation.cohorts.training import Answer, Task
from fedmoe_core.simulation.directory.lines import client_record, guard_facts, ledger_line
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.prepare import build_world
from fedmoe_core.simulation.process_group import Ranks
from fedmoe_core.simulation.round import Round, settle, train
from fedmoe_core.simulation.worlds.federation import Federation

VICTIM = 2  # whose answer is replaced
SYSTEMS = {
    "frozen trunk": ("algorithm=hfedmoe",),
    "all trains": ("algorithm=hfedmoe", "train.trunk=fedavg"),
    "own gates": ("algorithm=hfedmoe_plus",),
    "adapters": ("algorithm=flame", "lora.rank=4"),
    "under a guard": ("algorithm=hfedmoe", "guard.rule=median", "guard.quorum=2"),
}


@dataclass(frozen=True)
class Played:
    """A world whose clients have trained once, and their answers."""

    world: Federation
    state: ServerState
    tasks: list[Task]
    answers: list[list[Answer]]

    @classmethod
    def of(cls, *words: str, folder: Path) -> Played:
        notes = write_notes(folder / "notes.jsonl")
        where = (f"data=jsonl:{notes}", f"cache={folder / 'cache'}", f"out={folder / 'run'}")
        config = Config.load(None, [*TINY, *where, *words]).resolved()
        world = build_world(config, Ranks(), NullObserver())
        state = world.algorithm.init(world.params)
        tasks = [Task(state, group) for group in world.groups(world.algorithm.plan(state, range(4)))]
        with world.training(tasks) as in_turn:
            return cls(world, state, tasks, [list(answers) for _, answers in in_turn])

    def round(self, case: Case | None) -> tuple[ServerState, Round]:
        """Play the round with the victim's answer made hostile; None leaves it as it is."""

        def hostile(answer: Answer) -> Answer:
            asked = case is not None and answer.plan.client == VICTIM
            return replace(answer, update=case[1](answer.update)) if asked and case is not None else answer

        @contextmanager
        def training(tasks: Any) -> Iterator[Any]:
            yield ((task, map(hostile, found)) for task, found in zip(self.tasks, self.answers, strict=True))

        world = Replaced(self.world, training)
        trained = train(world, 0, self.tasks, NullObserver(), began=time.perf_counter())  # type: ignore[arg-type]
        return settle(world, self.state, trained)  # type: ignore[arg-type]


class Replaced:
    """A federation with another way to train."""

    def __init__(self, world: Federation, training: Any) -> None:
        self._world, self.training = world, training

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world, name)


def bits(state: ServerState) -> dict[str, bytes]:
    packed = pack_state(state)
    return {key: tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for key, tensor in packed.items()}


@pytest.fixture(scope="module", params=SYSTEMS)
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Played:
    return Played.of(*SYSTEMS[request.param], folder=tmp_path_factory.mktemp("hostile"))


def cases_for(played: Played) -> list[Case]:
    """All for the first system; every seventh, and fewer pairs, for the others."""
    config = played.world.config
    first = config.algorithm == "hfedmoe" and config.train.trunk == "frozen" and config.guard.rule == "none"
    found = every(seed=1, drawn=300 if first else 50)
    budgets = {plan.client: plan.budget for task in played.tasks for plan in task.group.plans}
    if budgets[VICTIM].experts is None:
        found = [case for case in found if "budget" not in case[0]]  # FLAME counts no experts
    return found if first else found[::7]


def test_the_generator_makes_thousands_of_different_attacks() -> None:
    names = [name for name, _ in every(seed=1, drawn=300)]
    assert len({*names}) > 2000


def test_inv11_no_hostile_answer_enters_the_model_or_the_memory(played: Played) -> None:
    world, plans = played.world, {plan.client: plan for task in played.tasks for plan in task.group.plans}
    good, _ = played.round(None)
    refused, _ = played.round(("nan", lambda update: replace(update, deltas=dict.fromkeys(update.deltas, math.nan))))
    expected = bits(refused)
    assert expected != bits(good), "the control: what the victim says counts"
    cases = cases_for(played)
    for name, make in cases:
        after, left = played.round((name, make))
        changed = [key for key, found in bits(after).items() if found != expected.get(key)]
        assert not changed, (name, changed)
        (update,) = (update for update in left.updates if update.client == VICTIM)
        assert update.status in ("refused", "failed"), name
        assert 0 < len(update.error) <= 400, name
        # What is logged of it is JSON that a reader takes.
        budgets = world.population.budgets
        lines = client_record(1, update, plans[VICTIM], budgets), ledger_line(1, update, plans[VICTIM], budgets)
        for line in (*lines, guard_facts(left.guard)):
            json.dumps(plain(line), allow_nan=False)
    assert len(cases) > 300
