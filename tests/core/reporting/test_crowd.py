"""What the page says of many clients, on runs whose numbers are known by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmoe_core.base import show
from fedmoe_core.reporting import crowd, crowd_figures, crowd_tables
from fedmoe_core.reporting.run import Run
from fedmoe_core.reporting.tables import Table, tiers

CLIENTS = 42  # just past show.MANY: 21 in each of two tiers, client c the (c // 2)-th of its tier
MIB = 1 << 20


def hand_made(*, clients: int = CLIENTS, tiers: int = 2, drawn: int = CLIENTS, **changes: Any) -> Run:
    """A run in which client c ends at loss c / 10, 0.5 below its start, and used c // 2 + 1 MiB of 30 or of 20."""
    records = [
        {
            "round": number,
            "client": client,
            "tier": f"t{client % tiers}",
            "held_LE": [[1, client % 2]],
            "trained_LE": [[int(number == 2 and client % 2 == 0), 0]],
        }
        for number in (1, 2)
        for client in range(drawn)
    ]
    ledger = [
        {
            "round": number,
            "client": client,
            "budget": {"memory_bytes": (20 if client % 2 else 30) * MIB},
            "predicted": {"memory_bytes": (client // 2 + 1) * MIB},
            "real": {"memory_bytes": (client // 2 + 1) * MIB},
        }
        for number in (1, 2)
        for client in range(drawn)
    ]
    losses = [client / 10 for client in range(clients)]
    rounds = [{"round": 0, "loss_clients": [loss + 0.5 for loss in losses]}, {"round": 1}]
    rounds.append({"round": 2, "loss_clients": losses})
    parts: dict[str, Any] = {
        "path": Path("run"),
        "name": "run",
        "summary": {},
        "config": {"budgets": ["t0", "t1"]},
        "rounds": rounds,
        "clients": records,
        "ledger": ledger,
        "finished": True,
        "partition": {
            "names": ["x", "y"],
            "clients": [f"c{n}" for n in range(clients)],
            "counts": [[3, 1], [0, 4]] * (clients // 2),
        },
    }
    return Run(**{**parts, **changes})


def texts(table: Table | None) -> list[list[str]]:
    assert table is not None
    return [["".join(piece.text for piece in cell) for cell in row] for row in table.rows]


def test_as_many_clients_as_have_room_are_not_yet_a_crowd() -> None:
    assert not crowd.crowded(hand_made(clients=show.MANY, drawn=show.MANY))
    assert crowd.crowded(hand_made(clients=show.MANY + 2, drawn=1))


def test_losses_of_a_tier_are_percentiles_over_its_clients_and_its_worst_is_named() -> None:
    # 21 clients in steps of 0.2: the percentiles 5, 25, 50, 75, 95 are the clients 1, 5, 10, 15 and 19 of the tier.
    assert texts(crowd_tables.losses(hand_made())) == [
        ["t0", "21", "21", "0.200", "1.000", "2.000", "3.000", "3.800", "4.000", "c40"],
        ["t1", "21", "21", "0.300", "1.100", "2.100", "3.100", "3.900", "4.100", "c41"],
    ]


def test_the_worst_clients_are_named_worst_first_with_their_change_and_their_rounds() -> None:
    rows = texts(crowd_tables.worst(hand_made(drawn=41)))
    assert len(rows) == crowd_tables.NAMED
    assert rows[:2] == [["c41", "t1", "4.100", "−0.500", "0"], ["c40", "t0", "4.000", "−0.500", "2"]]


def test_a_client_without_a_loss_is_neither_the_worst_nor_counted() -> None:
    run = hand_made()
    judged: Any = run.rounds[2]
    judged["loss_clients"][41] = None
    rows = texts(crowd_tables.losses(run))
    assert rows[1][-2:] == ["3.900", "c39"]
    assert texts(crowd_tables.worst(run))[0][0] == "c40"
    judged["loss_clients"][1::2] = [None] * 21
    assert texts(crowd_tables.losses(run))[1][3:] == ["n/a"] * 7


def test_the_ledger_of_the_last_round_is_percentiles_by_tier_and_resource() -> None:
    run = hand_made()
    last: Any = run.ledger[CLIENTS:]
    last[40]["predicted"]["memory_bytes"] = 22 * MIB
    # 1 to 21 MiB: the 5 % client has 2, the median 11, the 95 % client 20; of 20 MiB client 41 alone uses more.
    assert texts(crowd_tables.ledger(run)) == [
        ["t0", "peak memory", "21", "2.00 MiB", "11.0 MiB", "20.0 MiB", "21.0 MiB (22.0 MiB)", "30.0 MiB", "0"],
        ["t1", "peak memory", "21", "2.00 MiB", "11.0 MiB", "20.0 MiB", "21.0 MiB", "20.0 MiB", "1"],
    ]


def test_inv1_who_passed_a_limit_in_any_round_is_named_in_its_worst_one() -> None:
    run = hand_made()
    first: Any = run.ledger[0]
    first["real"]["memory_bytes"] = None  # NaN in JSON: it counts as too much, as in the summary
    found = crowd_tables.over_budget(run)
    assert found is not None
    assert found[1] == "2 clients used more than the device can bear."
    assert texts(found[0]) == [
        ["c0", "t0", "peak memory", "1", "n/a", "30.0 MiB", "n/a", "1"],
        ["c41", "t1", "peak memory", "1", "21.0 MiB", "20.0 MiB", "105 %", "2"],
    ]
    second: Any = run.ledger[CLIENTS + 41]
    second["real"]["memory_bytes"] = 40 * MIB
    assert crowd.excesses(run, ("memory_bytes",))[1].round == 2


def test_of_many_that_passed_a_limit_the_worst_are_named_and_the_others_counted() -> None:
    run = hand_made()
    for entry in run.ledger:
        entry["budget"]["memory_bytes"] = MIB // 2
    found = crowd_tables.over_budget(run)
    assert found is not None
    rows = texts(found[0])
    assert (len(rows), rows[0][0]) == (crowd_tables.ROWS, "c40")
    assert found[1].endswith(f"The worst 20 cases are shown; {CLIENTS - 20} more clients in ledger.jsonl.")
    assert crowd_tables.over_budget(hand_made(ledger=[])) is None


def test_a_tier_counts_its_clients_that_were_never_drawn() -> None:
    run = hand_made(drawn=4)
    assert [(group.name, len(group.members)) for group in crowd.groups(run)] == [("t0", 21), ("t1", 21)]
    assert [row[:3] for row in texts(crowd_tables.losses(run))] == [["t0", "21", "2"], ["t1", "21", "2"]]
    assert [row[:3] for row in texts(tiers(run))] == [["t0", "21", "2.00 MiB 7 %"], ["t1", "21", "2.00 MiB 10 %"]]
    # The tiers keep the order of the configuration, whichever client was drawn.
    second = replace(run, clients=[record for record in run.clients if record["client"] == 1])
    assert [group.name for group in crowd.groups(second)] == ["t0", "t1"]


def test_more_tiers_than_have_room_are_the_largest_and_one_group_of_the_others() -> None:
    run = hand_made(clients=44, tiers=12, drawn=44)  # 44 = 3 * 12 + 8: the first eight tiers have a client more
    found = crowd.groups(run)
    assert [group.name for group in found] == [*(f"t{n}" for n in range(8)), "4 other tiers"]
    assert found[-1].members == tuple(client for client in range(44) if client % 12 >= 8)
    assert len(texts(tiers(run))) == crowd.MOST_GROUPS


def test_refused_updates_are_grouped_by_reason_and_capped() -> None:
    run = hand_made()
    first, second = ([{"client": n, "reason": f"nan at step {n}"} for n in clients] for clients in (range(7), [3, 9]))
    run.rounds[1]["refused"], run.rounds[2]["refused"] = first, [*second, {"client": 5, "reason": "L2 norm 12.3"}]  # type: ignore[index]
    assert texts(crowd_tables.refused(run)) == [
        ["9", "8", "1 – 2", "c0, c1, c2, c3, c4 and 3 more", "nan at step #"],
        ["1", "1", "2", "c5", "L2 norm 12.3"],
    ]
    many = [{"client": n % 4, "reason": chr(65 + n)} for n in range(25)]
    rows = texts(crowd_tables.refused(hand_made(rounds=[{"round": 1, "refused": many}])))
    assert len(rows) == crowd_tables.ROWS + 1
    assert rows[-1] == ["5", "4", "", "", "5 more reasons, in metrics.jsonl"]
    assert crowd_tables.refused(hand_made()) is None


def test_shares_of_a_tier_count_each_client_in_each_round() -> None:
    run = hand_made(drawn=40)
    groups = [*crowd.groups(run), crowd.Group("empty", (41,))]
    held = crowd_figures.shares_held(run.clients, groups, "held_LE", (1, 2))
    assert held[:2, 0].tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert np.isnan(held[2]).all()
    trained = crowd_figures.shares_held(run.clients, groups, "trained_LE", (1, 2))
    assert trained[:2, 0].tolist() == [[0.5, 0.0], [0.0, 0.0]]
    drawn = crowd_figures.holdings(run)
    assert drawn is not None
    titles = [axes.get_title() for axes in drawn.axes]
    assert titles == ["layer 0, held, round 1", "layer 0, held, round 2", "layer 0, trained, round 2"]
    assert drawn.axes[2].images[0].get_array().tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_bands_are_the_percentiles_and_the_dot_is_the_most() -> None:
    run = hand_made()
    losses = crowd_figures.spread(run)
    assert losses is not None
    pale = losses.axes[0].collections[0].get_paths()[0].vertices
    assert (pale[:, 1].min(), pale[:, 1].max()) == pytest.approx((0.2, 4.3))  # 5 % after, 95 % before training
    assert losses.axes[0].lines[0].get_ydata().tolist() == [4.5, 4.0]
    limits = crowd_figures.budgets(run)
    assert limits is not None
    dots = [line for line in limits.axes[0].lines if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in dots] == pytest.approx([70.0, 105.0])
    pale_bar, strong_bar = limits.axes[0].patches[:2]
    assert (pale_bar.get_x(), pale_bar.get_x() + pale_bar.get_width()) == pytest.approx((100 * 2 / 30, 100 * 20 / 30))
    assert strong_bar.get_x() == pytest.approx(100 * 6 / 30)
    data = crowd_figures.data_split(run)
    assert data is not None
    assert data.axes[0].images[0].get_array().tolist() == [[0.75, 0.25], [0.0, 1.0]]
