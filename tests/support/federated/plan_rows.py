"""One line of a dry run, for tests of what the terminal shows."""

from fedmoe_core.budget.limits import Budget, Cost
from fedmoe_core.simulation.observer import PlanRow

ROW = PlanRow(
    client="asyncio",
    experts_held=(4, 5),
    trainable=9,
    predicted=Cost(memory_bytes=20 << 20, flops=3e10, bytes_down=1 << 20, bytes_up=900_000, experts=9),
    budget=Budget(memory_bytes=24 << 20, bytes_down=2 << 20, name="phone"),
    local_steps=8,
    top_k=2,
    samples=320,
)
