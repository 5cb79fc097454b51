"""What the table of a run says, in every state, and that no text of a run becomes markup or a terminal's code."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedmoe_core.simulation.directory.refusals import Refusals
from fedmoe_core.watching.seen import Seen, TierSeen
from fedmoe_core.watching.view import BARS, PLAIN_BARS, curve, watch_view

EVIL = "\x1b[2J\x1b]0;pwned\x07\r\x9b31m\u202e\u2028[red]x[/red][/]:bomb:"
RUN = Seen(
    path="runs/one",
    state="running",
    title="HFedMoE: tiny on stdlib",
    round=12,
    rounds=50,
    loss_R=(4.31, 4.2, 4.1, 3.9),
    accuracy_R=(0.5, 0.75),
    worst_loss=4.5,
    answers={"late": 2, "ok": 480, "failed": 3},
    reasons={"failed": (Refusals("loss is NaN at step #", 3, (4, 7), 2, 4),)},
    tiers=(TierSeen("memory=24MiB", 5, 60, 57, 4.0, 4.5, 0.94, "memory"), TierSeen("unlimited", 5, 60, 60)),
    bytes_down=2.0**30,
    bytes_up=2.0**29,
    memory_bytes=23.0 * 2**20,
    virtual_seconds=75.0,
    coverage=0.5,
    round_seconds=3.4,
    seconds_left=129.0,
    silent_seconds=1.0,
    resumable=True,
)


def drawn(*runs: Seen, width: int = 120, **how: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False)
    console.print(watch_view(runs, several=how.pop("several", len(runs) > 1), **how))
    return out.getvalue()


def test_one_run_in_full() -> None:
    text = " ".join(drawn(RUN).split())
    for said in (
        "HFedMoE: tiny on stdlib running",
        "round 12 of 50 3.4 s a round 2 min 09 s left",
        "loss 4.310 -> 3.900 █▆▄▁",
        "accuracy 50.0 % -> 75.0 % ▁█",
        "worst client 4.500",
        "experts trained 50 % in the last round",
        "moved 1.50 GiB down 1.00 GiB, up 512 MiB",
        "peak memory 23.0 MiB of a client",
        "virtual time 1 min 15 s",
        "updates 480 accepted, 3 failed, 2 late",
        "memory=24MiB 5 57/60 4.000 4.500 94 % of memory",
        "unlimited 5 60/60 n/a n/a no limit",
        "failed 3, 2 clients, rounds 2 to 4: loss is NaN at step #",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": "stopped"}, "stopped; go on with: fedmoe resume runs/one"),
        ({"state": "stopped", "resumable": False}, "stopped; there is no checkpoint yet, start again"),
        (
            {"state": "not begun", "title": ""},
            "there is no run in runs/one yet; without --once the command waits for one",
        ),
        ({"state": "preparing", "title": ""}, "before the first round: data, warm-up and a first measurement"),
        ({"silent_seconds": 300.0}, "no line for 5 min 00 s; the process is still there"),
        (
            {"state": "finished", "problems": ("nothing trained: no client took part",)},
            "nothing trained: no client took",
        ),
    ],
)
def test_what_a_reader_should_know_of_a_state(changes: dict[str, Any], said: str) -> None:
    assert said in drawn(Seen(**{**vars(RUN), **changes}))
    assert said not in drawn(RUN)


def test_a_slow_run_is_not_called_silent() -> None:
    assert "no line for" not in drawn(Seen(**{**vars(RUN), "silent_seconds": 300.0, "round_seconds": 100.0}))


def test_several_runs_are_one_line_each() -> None:
    other = Seen("runs/two", "not begun")
    text = drawn(RUN, other)
    head, one, two = [" ".join(line.split()) for line in text.splitlines()]
    assert head == "run state round loss accuracy worst not counted a round left"
    assert one == "one running 12/50 3.900 █▆▄▁ 75.0 % 4.500 5 3.4 s 2 min 09 s"
    assert two == "two not begun"


def test_a_long_name_gives_way_and_no_figure_does() -> None:
    far = Seen(**{**vars(RUN), "path": f"elsewhere/{'x' * 200}"})
    for line in drawn(RUN, far, width=100).splitlines()[1:]:
        assert "12/50  3.900  █▆▄▁    75.0 %  4.500            5    3.4 s  2 min 09 s" in line
    tier = TierSeen("memory=24MiB," * 20, 5, 60, 57, 4.0, 4.5, 0.94, "memory")
    narrow = " ".join(drawn(Seen(**{**vars(RUN), "tiers": (tier,)}), width=80).split())
    assert "… 5 57/60 4.000 4.500 94 % of memory" in narrow
    assert "2 min 09 s left" in narrow


def test_no_text_of_a_run_moves_the_cursor_or_is_markup() -> None:
    hostile = Seen(
        **{
            **vars(RUN),
            "path": EVIL,
            "title": EVIL,
            "state": "stopped",
            "answers": {EVIL: 1},
            "reasons": {EVIL: (Refusals(EVIL, 1, (1,), 1, 1),)},
            "tiers": (TierSeen(EVIL, 1, of=EVIL, part=2.0),),
            "problems": (EVIL,),
        }
    )
    for text in (drawn(hostile, width=600), drawn(hostile, RUN, width=600)):
        assert all(sign == "\n" or (sign.isprintable() and sign != "\u202e") for sign in text)
        assert "\\x1b[2J\\x1b]0;pwned\\x07\\x0d\\x9b31m\\u202e\\u2028[red]x[/red][/]:bomb:" in text


def test_many_tiers_and_reasons_do_not_fill_the_screen() -> None:
    reasons = tuple(Refusals(f"reason {'abcdefghijkl'[n]}", 1, (n,), 1, 1) for n in range(12))
    many = Seen(**{**vars(RUN), "tiers": RUN.tiers * 20, "reasons": {"failed": reasons}})
    text = drawn(many)
    assert len(text.splitlines()) < 30
    assert "and 34 more tiers" in text
    assert "and 6 more reasons" in text


def test_a_terminal_of_ascii_gets_ascii() -> None:
    assert not set(BARS) & set(drawn(RUN, ascii_only=True))
    assert "#" in drawn(RUN, ascii_only=True)


@given(st.lists(st.floats(-1e30, 1e30), max_size=200), st.integers(1, 40), st.sampled_from([BARS, PLAIN_BARS]))
def test_a_curve_has_its_width_and_shows_the_lowest_and_the_highest(values: list[float], width: int, bars: str) -> None:
    line = curve(values, width, bars)
    assert len(line) == min(len(values), width)
    assert set(line) <= set(bars)
    if 0 < len(values) <= width:
        assert line[values.index(min(values))] == bars[0]
        assert line[values.index(max(values))] == (bars[-1] if max(values) > min(values) else bars[0])
