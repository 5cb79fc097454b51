"""Batches of a group, drawn before it trains: on the host, in another thread, and pinned where a GPU will read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedmoe_core.config.run_config import Config
from fedmoe_core.data.batches import Batch, Encoded, client_blocks
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.simulation.cohorts.cutting import Group
from fedmoe_core.simulation.world import World

Drawn = Mapping[int, tuple[Batch, ...]]  # blocks of ``client_blocks`` by client; who is missing draws while it trains
DRAWN_TOKENS = 2**22  # of a group at most, 38 MB; two groups exist at once
NONE_DRAWN: Drawn = {}


def draw(world: World, group: Group) -> Drawn:
    """Draw all batches of a group's round, unless they are too many to keep.

    They depend on the configuration and the plans alone, so another thread may draw them while other clients train.
    """
    train, device = world.config.train, world.ranks.device
    tokens = sum(plan.local_steps for plan in group.plans) * train.batch_size * train.seq_len
    if tokens > DRAWN_TOKENS:
        return NONE_DRAWN
    return {plan.client: tuple(block.staged(device) for block in _blocks(world, plan)) for plan in group.plans}


def round_batches(world: World, plan: ExpertPlan, drawn: Drawn = NONE_DRAWN) -> Iterator[Batch]:
    """Bring the batches of a client's round to the device, from the start: those ``drawn``, or drawn now."""
    for block in drawn.get(plan.client) or _blocks(world, plan):
        # A block at a time: 32 clients of 8 steps are 64 copies for the device and not 512. They have no stream of
        # their own: 2 MB from pinned memory, at 50 GB/s, are 40 us of a GPU's time (reckoned; unconfirmed).
        yield from block.to(world.ranks.device, non_blocking=True).split(world.config.train.batch_size)


def _blocks(world: World, plan: ExpertPlan) -> Iterator[Batch]:
    return blocks_of(world.data.clients[plan.client].private, world.config, plan)


def blocks_of(private: Encoded, config: Config, plan: ExpertPlan) -> Iterator[Batch]:
    """Draw a client's batches of a round, many steps in one block; a simulated client and a real one draw the same."""
    train = config.train
    return client_blocks(
        private,
        seed=config.seed,
        round=plan.round,
        client=plan.client,
        steps=plan.local_steps,
        batch_size=train.batch_size,
        seq_len=train.seq_len,
    )
