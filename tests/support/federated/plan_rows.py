"""One line of a dry run, for tests of what the terminal shows."""

from fedmoe_core.simulation.observer import PlanRow

ROW = PlanRow(
    client="asyncio",
    tier="phone",
    experts_held=(4, 5),
    experts=9,
    trainable=9,
    memory_bytes=20 << 20,
    memory_budget=24 << 20,
    flops=3e10,
    flops_budget=None,
    bytes_down=1 << 20,
    bytes_down_budget=2 << 20,
    bytes_up=900_000,
    bytes_up_budget=None,
    local_steps=8,
    top_k=2,
    samples=320,
)
