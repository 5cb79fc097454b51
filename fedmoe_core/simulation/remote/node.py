"""A device's side of a run: greetings become descriptions, tasks become answers; bytes in, bytes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version

import torch
from torch import Tensor

from fedmoe_core.algorithms.base import Algorithm, algorithm_class
from fedmoe_core.budget.limits import NOTHING
from fedmoe_core.client.failures import FAILURES, reason_of
from fedmoe_core.config.run_config import Config
from fedmoe_core.data.batches import Batch
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.result import LocalFailure, LocalResult
from fedmoe_core.messages.wire.answer import LONGEST_REASON, answer_bytes
from fedmoe_core.messages.wire.base import read_base
from fedmoe_core.messages.wire.envelope import WireError
from fedmoe_core.messages.wire.greeting import Description, Greeting, description_bytes, read_greeting
from fedmoe_core.messages.wire.task import Asked, read_task
from fedmoe_core.model.adapter import ModelAdapter
from fedmoe_core.simulation.cohorts.drawing import blocks_of
from fedmoe_core.simulation.cohorts.training import at_round, local_round
from fedmoe_core.simulation.identity import code_version
from fedmoe_core.simulation.prepare import load_model_of, take_form
from fedmoe_core.simulation.ranks.devices import pick_device
from fedmoe_core.simulation.remote.own_data import OwnData, own_data
from fedmoe_core.simulation.remote.words import Shelf, Words
from fedmoe_core.simulation.world import local_settings, validation_batches

LARGEST_TASK = 1 << 40  # bytes; the server is trusted with this device's memory
TRUNK_UNKNOWN = "the trunk is unknown here"
BASE_UNKNOWN = "the base of experts is unknown here"


@dataclass(frozen=True)
class Node:
    """A device in one run: its data and its live model, which are read once they are needed.

    Attributes:
        words: of its owner.
        config: of the run, as it is on this device.
        shelf: what it keeps on disk.
        data: what its client holds.
    """

    words: Words
    config: Config
    shelf: Shelf
    data: OwnData

    @cached_property
    def adapter(self) -> ModelAdapter:
        """The live model, in the form that the system declares; its weights come with the tasks."""
        size, classes = self.data.vocab_size, len(self.data.vocabulary.classes)
        device = pick_device(self.config)
        adapter = load_model_of(self.config, self.data.task, vocab_size=size, num_classes=classes, device=device)
        if self.form.lora(self.config) is not None or self.form.graft(self.config) is not None:
            take_form(self.config, self.form, adapter, adapter.state())
        return adapter

    @property
    def form(self) -> type[Algorithm]:
        """The system of the run."""
        return algorithm_class(self.config.algorithm)

    def describe(self, session: str) -> Description:
        """Tell the server what this device has."""
        held, validation = self.data.client, self.data.client.validation
        return Description(
            session,
            self.words.client,
            self.words.name or held.name,
            code=code_version(self.config.adapter, self.config.algorithm),
            torch=version("torch"),
            vocabulary=self.data.vocabulary.digest,
            tokens=len(held.private.tokens_N),
            rows=len(held.private),
            validation_tokens=0 if validation is None else len(validation.tokens_N),
            validation_rows=0 if validation is None else len(validation),
            counts=self.data.counts_D.tolist(),
            budget=self.words.budget,
            trunks=self.shelf.trunks(),
        )

    def train(self, asked: Asked) -> LocalResult | LocalFailure:
        """Do what a task asks, exactly as a simulator's client would."""
        config, plan = self.config, asked.plan
        torch.set_num_threads(config.threads)
        if plan.client != self.words.client:
            raise WireError(f"a task is for client {plan.client}, and this device is client {self.words.client}")
        trunk = self._trunk(asked)
        if trunk is None:
            return LocalFailure(NOTHING, f"{TRUNK_UNKNOWN}; it comes with the next plan")
        base, new = read_base(asked.sent, plan, self.adapter.spec, self.shelf.expert)
        for digest, rows in new.items():
            self.shelf.keep_expert(digest, rows)
        if base is None:
            return LocalFailure(NOTHING, f"{BASE_UNKNOWN}; it comes with the next plan")
        # On a GPU, zeros stand there for experts that are not permitted; on the CPU they take no memory.
        params = asked.params(self.adapter.spec, trunk, base)
        return local_round(
            self.adapter,
            {key: tensor.to(self._device) for key, tensor in params.items()},
            plan,
            train=at_round(local_settings(config, self.form), plan.round, rounds=config.rounds),
            costs=asked.head.costs,
            class_shares_C=self.data.class_shares_C,
            draw=partial(self._batches, plan),
            validation=self._held_out,
        )

    def _trunk(self, asked: Asked) -> Mapping[str, Tensor] | None:
        if not asked.head.trunk:
            return {}
        if sent := asked.trunk:
            self.shelf.keep_trunk(asked.head.trunk, sent)
            return sent
        return self.shelf.trunk(asked.head.trunk)

    def _batches(self, plan: ExpertPlan) -> Iterator[Batch]:
        for block in blocks_of(self.data.client.private, self.config, plan):
            yield from block.to(self._device).split(self.config.train.batch_size)

    def _held_out(self) -> Iterator[Batch]:
        return (batch.to(self._device) for batch in validation_batches(self.data.client, self.config))

    @property
    def _device(self) -> torch.device:
        return next(self.adapter.model.parameters()).device


def greeted(words: Words, data: bytes) -> tuple[Node | None, bytes]:
    """Answer a greeting; a device that cannot take part says why.

    Returns:
        The device in that run, None where it cannot take part; and the description as bytes.

    Raises:
        WireError: the bytes are not a greeting.
    """
    greeting = read_greeting(data)
    try:
        node = _met(words, greeting)
    except FAILURES as error:
        trouble = Description(greeting.session, words.client, words.name, trouble=reason_of(error)[:LONGEST_REASON])
        return None, description_bytes(trouble)
    return node, description_bytes(node.describe(greeting.session))


def _met(words: Words, greeting: Greeting) -> Node:
    config = words.configure(greeting.config)
    here = code_version(config.adapter, config.algorithm)
    if here != greeting.code:
        raise ValueError(f"the server has fedmoe {greeting.code}, and this device has {here}; install the same")
    shelf = Shelf.of(config)
    shelf.keep_vocabulary(greeting.vocabulary)
    return _node(words, config, shelf, greeting.vocabulary.digest)


def _node(words: Words, config: Config, shelf: Shelf, vocabulary: str) -> Node:
    found = shelf.vocabulary(vocabulary)
    if found is None:
        raise ValueError("this device has not been greeted by this run, or its cache is gone; start it again")
    form = algorithm_class(config.algorithm)
    return Node(words, config, shelf, own_data(words, config, found, validation=form.needs_validation))


def _declared(words: Words, node: Node | None, config: str) -> tuple[type, ...]:
    """The wishes of the system of a run, by this device's own copy of its code."""
    try:
        return (algorithm_class(words.configure(config).algorithm) if node is None else node.form).wishes
    except FAILURES as error:
        raise WireError(f"a task has a configuration that cannot be used here ({reason_of(error)})") from None


def worked(words: Words, data: bytes, node: Node | None = None) -> bytes:
    """Answer a task; whatever goes wrong in it is told as this client's failure.

    Args:
        words: of the owner.
        data: the task.
        node: this device in the run, where the process still has it.

    Raises:
        WireError: the bytes are not a task.
    """
    asked = read_task(data, largest=LARGEST_TASK, declared=partial(_declared, words, node))
    result: LocalResult | LocalFailure
    try:
        if node is None:
            config = words.configure(asked.head.config)
            node = _node(words, config, Shelf.of(config), asked.head.vocabulary)
        result = node.train(asked)
    except FAILURES as error:
        result = LocalFailure(replace(asked.plan.predicted, bytes_up=0), reason_of(error))
    return answer_bytes(asked.plan, result, asked.head.session)
