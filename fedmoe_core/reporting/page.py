"""The report as one HTML page, no script, no network: its HTML is ``report.html.jinja``, its looks are ``page.css``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.colors import to_hex

from fedmoe_core.base import show
from fedmoe_core.base.wording import visible
from fedmoe_core.reporting import crowd, crowd_figures, crowd_tables, drawing, figures, theme
from fedmoe_core.reporting.results import (
    QUALITIES,
    changes,
    guard_did,
    held,
    how_clients_ran,
    note,
    quality_of,
    staleness,
)
from fedmoe_core.reporting.run import Run
from fedmoe_core.reporting.tables import Cell, Piece, exceeded, guarded, late, ledger, plain, refused, runs_table, tiers
from fedmoe_core.simulation.directory.health import problems
from fedmoe_core.simulation.directory.run_schema import read_text

SHOWN = 10  # names of clients in one line
SPREAD = "Clients: worst, mean and best"
BUDGETS = "Budget used, against budget given"
_BANDS = "The pale band holds 90 % of the clients, the strong one 50 %."
_DATA = "The bars hold 90 % and 50 % of a tier's clients, the line in them is the median."


@dataclass(frozen=True)
class Picture:
    """A figure under its heading; ``key`` holds colours and what they mean."""

    title: str
    svg: Markup
    caption: str
    key: tuple[Piece, ...]


@dataclass(frozen=True)
class Tile:
    """A large value and the words below it."""

    value: Cell
    text: str


class _Gallery:
    """Draws the figures of one page and numbers them, so that no two share an id, whatever their runs are called."""

    def __init__(self) -> None:
        self.numbers = count(1)

    def draw(
        self, title: str, draw: Callable[..., Any], what: Any, *, name: str, caption: str = "", key: Cell = ()
    ) -> list[Picture]:
        picture = drawing.svg(draw, what, name=name, prefix=f"figure{next(self.numbers)}")
        return [] if picture is None else [Picture(title, picture, caption, key)]


def render(runs: Sequence[Run]) -> str:
    """Write the whole page: of several runs first an overview, then each."""
    several, gallery = len(runs) > 1, _Gallery()
    overview = _overview(runs, gallery) if several else None
    title = ", ".join(dict.fromkeys(run.name for run in runs)) + ": report"
    environment = Environment(
        loader=PackageLoader("fedmoe_core.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.get_template("report.html.jinja")
    parts = [_part(run, gallery, alone=not several) for run in runs]
    return template.render(title=title, theme=theme, overview=overview, runs=parts).lstrip()


def _shown(value: Any) -> Any:
    """Make what the template prints visible; markup is finished already."""
    return value if hasattr(value, "__html__") else visible(str(value))


def _overview(runs: Sequence[Run], gallery: _Gallery) -> dict[str, Any]:
    """Return what stands above the runs of a page with several, by the template's names."""
    learning = "What each run bought with its rounds, traffic and compute"
    return {
        "heading": _listing([run.name for run in runs]),
        "setting": _setting(runs[0]),
        "note": note(runs),
        "sorted_by": quality_of(runs).name,
        "table": runs_table(runs),
        "pictures": [
            *gallery.draw(learning, figures.learning, runs, name="learning"),
            *gallery.draw(SPREAD, figures.spread, runs, name="clients", caption=_spread_caption(runs)),
        ],
    }


def _part(run: Run, gallery: _Gallery, *, alone: bool) -> dict[str, Any]:
    """Return what the page shows of one run, by the template's names; None or empty is left out."""
    draw, tag = gallery.draw, "" if alone else f"{run.name}: "
    pictures: list[Picture] = []
    if alone:
        title = "What the rounds, the traffic and the compute bought"
        pictures += draw(title, figures.learning, [run], name="learning")
        pictures += draw(SPREAD, figures.spread, [run], name="clients", caption=_spread_caption([run]))
    many = crowd.crowded(run)
    pictures += _by_tier(run, draw, tag) if many else _by_client(run, draw, tag)
    path = run.path / "config.toml"
    return {
        "alone": alone,
        "headline": _headline(run),
        "setting": _setting(run),
        "problems": [*problems(run.summary), *changes(run)],
        "tiles": _tiles(run),
        "facts": _facts(run),
        "pictures": pictures,
        "tiers": tiers(run),
        "losses": crowd_tables.losses(run) if many else None,
        "worst": crowd_tables.worst(run) if many else None,
        "data": draw(
            f"Which {'tier' if many else 'client'} holds what data",
            crowd_figures.data_split if many else figures.data_split,
            run,
            name=tag + "data",
            caption=_DATA if many else "",
        ),
        "last_round": max((entry["round"] for entry in run.ledger), default=None),
        "grouped": many,
        "ledger": crowd_tables.ledger(run) if many else ledger(run),
        "over": crowd_tables.over_budget(run) if many else None,
        "late": late(run),
        "guarded": guarded(run),
        "refused": crowd_tables.refused(run) if many else refused(run),
        "configuration": read_text(path).splitlines() if path.is_file() else (),
    }


def _by_client(run: Run, draw: Callable[..., list[Picture]], tag: str) -> list[Picture]:
    """Draw what each client held and spent, a row for each."""
    key = (Piece("held and trained", theme.BLUE), Piece("held, frozen", theme.PALE), Piece("not there", theme.EMPTY))
    lines = "Dark lines separate budget tiers." if len(set(run.tiers.values())) > 1 else ""
    title = "Which client holds which expert"
    pictures = draw(title, figures.holdings, run, name=tag + "experts held", caption=lines, key=key)
    pictures += draw("Which experts matter", figures.importance, run, name=tag + "importance by layer")
    caption = (
        "Most that a client really used of each limit in any round; the light mark is what the plan predicted, "
        "the black line the limit. A resource without a limit is not drawn."
    )
    return pictures + draw(BUDGETS, figures.budgets, run, name=tag + "budgets", caption=caption)


def _by_tier(run: Run, draw: Callable[..., list[Picture]], tag: str) -> list[Picture]:
    """Draw what the clients of each tier held and spent, a row or a panel for each tier."""
    pictures = draw("Losses by tier", crowd_figures.spread, run, name=tag + "losses by tier", caption=_BANDS)
    caption = (
        "Share of the tier's clients that held or trained an expert, each counted in every round that it took part in."
    )
    key = tuple(Piece(f"{share} %", to_hex(theme.BLUES(share / 100))) for share in (0, 50, 100))
    title = "Which tier holds which expert"
    pictures += draw(title, crowd_figures.holdings, run, name=tag + "experts held", caption=caption, key=key)
    pictures += draw("Which experts matter", figures.importance, run, name=tag + "importance by layer")
    caption = (
        "Most that each client really used of each limit in any round: the bars hold 90 % and 50 % of a tier's "
        "clients, the line in them is the median, the dot the most. The light mark is the most that the plans "
        "predicted, the black line the limit."
    )
    return pictures + draw(BUDGETS, crowd_figures.budgets, run, name=tag + "budgets", caption=caption)


def _spread_caption(runs: Sequence[Run]) -> str:
    """Say what the marks are in a figure of small runs, of large ones, or of both."""
    many = [crowd.crowded(run) for run in runs]
    if not any(many):
        return "Every thin line is one client."
    return (
        _BANDS
        if all(many)
        else f"Every thin line is one client; of more than {show.MANY}, {_BANDS[0].lower()}{_BANDS[1:]}"
    )


def _tiles(run: Run) -> list[Tile]:
    s = run.summary
    gain = _minus(s.get("loss_after"), s.get("loss_before"))
    tiles = [Tile(plain(show.change(s, "loss", show.number)), f"held-out loss, nats ({show.signed(gain)})")]
    if run.has_accuracy:
        points = _minus(s.get("accuracy_after"), s.get("accuracy_before"))
        shown = show.signed(None if points is None else 100 * points, 1)
        tiles.insert(0, Tile(plain(show.change(s, "accuracy", show.share)), f"held-out accuracy ({shown} points)"))
    for kind, text in (("loss", show.number), ("accuracy", show.share)):
        if own := run.personal(kind):
            worst = max(own) if kind == "loss" else min(own)
            words = f"mean {kind} of the clients' own models, worst {text(worst)}"
            tiles.append(Tile(plain(text(float(np.mean(own)))), words))
    bound = run.broken or run.budgeted
    engine = _ratio(s.get("engine_seconds"), s.get("seconds"))
    down, up = show.size(s.get("bytes_down")), show.size(s.get("bytes_up"))
    if not run.plain:
        tiles.append(Tile(plain(show.number(s.get("worst_client_loss"))), "loss of the worst client"))
        experts = f"experts held by a client, of {_experts(run) or show.NONE}"
        tiles.append(Tile(plain(held(run).replace("..", "–")), experts))
    tiles += [
        Tile(
            exceeded(run, Piece("not bound", "bad")),
            "budgets exceeded" if bound else "needs more than its clients can bear",
        ),
        Tile(plain(show.size(run.traffic)), f"moved: {down} down, {up} up"),
        Tile(plain(show.size(s.get("peak_memory_bytes"))), "largest peak memory of a client"),
        Tile(plain(show.seconds(s.get("seconds"))), f"wall-clock, {show.share(engine, 0)} of it the engine's own"),
    ]
    if not run.has_accuracy:
        tiles.insert(-1, Tile(plain(show.flops(s.get("flops"))), "computed by the clients"))
    return tiles


def _facts(run: Run) -> list[tuple[str, str]]:
    s = run.summary
    facts = [("computed", f"{show.flops(s.get('flops'))} by the clients")] if run.has_accuracy else []
    of_experts = [
        ("mass lost", f"{show.share(run.last('lost_mass'))} of the router's weight on absent experts"),
        ("experts trained", f"{show.share(run.last('coverage'), 0)} by some client in the last round"),
    ]
    return [
        *facts,
        *_times(run),
        *([] if run.privacy is None else [("privacy of a client", run.privacy)]),
        ("partition", str(s.get("partition", show.NONE))),
        ("corpus sha256", str(s.get("corpus_sha256") or show.NONE)[:16]),
        ("model hash", str(s.get("model_hash") or show.NONE)[:16]),
        ("fedmoe", str(s.get("code") or show.NONE)),
        ("updates refused", str(s.get("refused_updates", show.NONE))),
        *([("guard of the sums", did.partition(": ")[2])] if (did := guard_did(s.get("guard"))) else []),
        *([("trained at once", how_clients_ran(run))] if how_clients_ran(run) else []),
        *([] if run.plain else of_experts),
    ]


def _times(run: Run) -> list[tuple[str, str]]:
    """What the virtual clock of a run says; nothing where it has none."""
    if run.virtual_seconds is None:
        return []
    said, s = [("virtual time", show.seconds(run.virtual_seconds))], run.summary
    if "late_updates" in s:
        absent = s.get("absent_clients") or ()
        never = f"; never drawn: {', '.join(absent[:SHOWN])}{' ...' if len(absent) > SHOWN else ''}" if absent else ""
        said.append(("updates too late", f"{s['late_updates']}{never}"))
    if "staleness_mean" in s:
        said.append(("server steps behind", staleness(run)))
    if (target := (run.config.get("time") or {}).get("target")) and run.finished:
        there = s.get("virtual_seconds_to_target")
        said.append((f"time to {target:g}", "not reached" if there is None else show.seconds(there)))
    return said


def _headline(run: Run) -> str:
    """Whether the run improved on its own start, in one clause, whichever way it fell."""
    if run.nothing_trained:
        return f"{run.name}: nothing trained"
    for quality in QUALITIES:
        gain = quality.gain(run)
        if gain is not None:
            size = f"{100 * abs(gain):.1f} points" if quality.accurate else f"{abs(gain):.3f} nats"
            verb, sign = ("raise", "−") if quality.accurate else ("lower", "+")
            if gain > 0:
                return f"{run.name} {verb}s {quality.name} by {size}"
            return f"{run.name} does not {verb} {quality.name} ({sign}{size})"
    return run.name


def _setting(run: Run) -> str:
    config = run.config
    own = f"Plain model {config.get('adapter')}", "its own data"
    named = f"Model {config.get('model', show.NONE)}", f"data {config.get('data', show.NONE)}"
    parts = list(own if run.plain else named)
    clients = show.plural(len(run.client_ids) or int(config.get("clients", 0)), "client")
    parts.append(f"{clients} in {show.plural(len(set(run.tiers.values())) or 1, 'budget tier')}")
    parts.append(show.plural(int(run.summary.get("rounds") or 0), "round"))
    parts.append(f"seed {run.seed}")
    return ", ".join(parts) + ("." if run.finished else " (unfinished).")


def _experts(run: Run) -> int:
    return int(np.size(next((r["held_LE"] for r in run.clients if r.get("held_LE")), [])))


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _listing(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
