"""What fits on which device: plan a round for real hardware and for limits of your own, before anything trains.

python examples/plan_budgets.py
"""

from fedmoe_core import Config, simulate

# A tier is a device by name, a limit, several limits, or a share of what training every expert needs.
TIERS = ("raspberry-pi-5-8gb", "memory=24MiB,up=2MiB", "experts=25%", "memory=50%")


def main() -> None:
    config = Config(clients=len(TIERS), budgets=TIERS)
    rows = simulate.dry_run(config)  # the same plans that a run would make in its first round
    print(f"{'tier':24} {'experts':>7} {'memory':>10} {'of':>12} {'up':>10}  fits")
    for row in rows:
        allowed, used = row.budget.memory_bytes, row.predicted
        limit = f"{allowed / 2**20:,.1f}" if allowed else "no limit"
        memory, up = f"{used.memory_bytes / 2**20:,.1f}", f"{used.bytes_up / 2**20:,.2f}"
        print(f"{row.tier:24} {row.experts:7d} {memory:>6} MiB {limit:>8} MiB {up:>6} MiB  {row.fits}")

    # A budget too small for one expert in each layer is an error that names the size that would do.
    try:
        simulate.dry_run(Config(clients=1, budgets=("memory=1MiB",)))
    except ValueError as error:
        print(error)


if __name__ == "__main__":
    main()
