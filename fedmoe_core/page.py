"""The report as one HTML page: no script, no network, no second file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from fedmoe_core import drawing, figures, show, theme
from fedmoe_core.report import held, judged_by, ranking
from fedmoe_core.runs import Run


def render(runs: Sequence[Run], verdicts: Sequence[str]) -> str:
    """Write the whole page; the first run is its subject."""
    several = len(runs) > 1
    body = _comparison(runs, verdicts) if several else ""
    body += "".join(_run(run, place, alone=not several) for place, run in enumerate(runs))
    title = " vs ".join(dict.fromkeys(run.name for run in runs)) if several else f"{runs[0].name}: report"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{theme.CSS}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _comparison(runs: Sequence[Run], verdicts: Sequence[str]) -> str:
    first = runs[0]
    heading = f"{first.name} against {_listing([run.name for run in runs[1:]])}"
    html = f"<header><h1>{escape(heading)}</h1><p class='lead'>{_setting(first)}</p></header>\n"
    html += "".join(f"<p class='verdict'>{escape(verdict)}</p>" for verdict in verdicts)
    accurate = any(run.has_accuracy for run in runs)
    seeds = len({run.seed for run in runs}) > 1
    rows = []
    for place, run, reason in ranking(runs):
        s = run.summary
        cells = [
            str(place or "–"),
            escape(run.name) + (f"<span class='label'>{escape(reason)}</span>" if reason else ""),
        ]
        cells += [str(run.seed)] if seeds else []
        cells += [_change(s, "accuracy", show.share)] if accurate else []
        cells += [_change(s, "loss", show.number), show.number(s.get("worst_client_loss")), show.size(run.traffic)]
        cells += [show.flops(s.get("flops")), show.size(s.get("peak_memory_bytes")), _held(run)]
        cells += [_count(run.violations) if run.budgeted else show.NONE, show.seconds(s.get("seconds"))]
        rows.append(("first" if place == 1 else "apart" if place is None else "", cells))
    names = ["", "run", *(["seed"] if seeds else []), *(["accuracy"] if accurate else []), "held-out loss"]
    names += ["worst client", "moved", "computed", "peak memory", "experts held", "budgets exceeded", "time"]
    figure = judged_by(runs)
    by = ("accuracy" if figure.accurate else "loss") + (" of the clients' own models" if figure.personal else "")
    html += (
        f"<h2>Ranking</h2><p class='muted'>By final held-out {by}; only runs under the same conditions are ranked.</p>"
    )
    html += _table(names, rows, left=(0, 1))
    html += _figure(
        "What each run bought with its rounds, traffic and compute", figures.learning, runs, name="learning"
    )
    html += _figure(
        "Clients: worst, mean and best", figures.spread, runs, name="clients", caption="Every thin line is one client."
    )
    return html


def _run(run: Run, place: int, *, alone: bool) -> str:
    html = _heading(run, alone=alone)
    tag = f"{run.name}: " if place or not alone else ""
    if alone:
        title = "What the rounds, the traffic and the compute bought"
        html += _figure(title, figures.learning, [run], name=tag + "learning")
        caption = "Every thin line is one client."
        html += _figure("Clients: worst, mean and best", figures.spread, [run], name=tag + "clients", caption=caption)
    key = "".join(
        f"<span class='key' style='background:{colour}'></span>{text}"
        for colour, text in (
            (theme.BLUE, "held and trained"),
            (theme.PALE, "held, frozen"),
            (theme.EMPTY, "not there"),
        )
    )
    key += " &nbsp; Dark lines separate budget tiers." if len(set(run.tiers.values())) > 1 else ""
    html += _figure("Which client holds which expert", figures.holdings, run, name=tag + "experts held", caption=key)
    html += _figure("Which experts matter", figures.importance, run, name=tag + "importance by layer")
    caption = (
        "Most that a client really used of each limit in any round; the light mark is what the plan predicted, "
        "the black line the limit. A resource without a limit is not drawn."
    )
    html += _figure("Budget used, against budget given", figures.budgets, run, name=tag + "budgets", caption=caption)
    html += _tiers(run)
    html += _figure("Which client holds what data", figures.data_split, run, name=tag + "data")
    html += _ledger(run) + _refused(run) + _configuration(run)
    return html


def _heading(run: Run, *, alone: bool) -> str:
    s = run.summary
    level = "h1" if alone else "h2 class='run'"
    html = f"<header><{level}>{escape(_headline(run))}</{level.split()[0]}>"
    html += f"<p class='lead'>{_setting(run)}</p>"
    gain = _minus(s.get("loss_after"), s.get("loss_before"))
    tiles = [(_change(s, "loss", show.number), f"held-out loss, nats ({show.signed(gain)})")]
    if run.has_accuracy:
        points = _minus(s.get("accuracy_after"), s.get("accuracy_before"))
        shown = show.signed(None if points is None else 100 * points, 1)
        tiles.insert(0, (_change(s, "accuracy", show.share), f"held-out accuracy ({shown} points)"))
    for kind, text in (("loss", show.number), ("accuracy", show.share)):
        if own := run.personal(kind):
            worst = max(own) if kind == "loss" else min(own)
            tiles.append((text(float(np.mean(own))), f"mean {kind} of the clients' own models, worst {text(worst)}"))
    limits = _count(run.violations) if run.budgeted else "<span class='bad'>not bound</span>"
    engine = _ratio(s.get("engine_seconds"), s.get("seconds"))
    down, up = show.size(s.get("bytes_down")), show.size(s.get("bytes_up"))
    tiles += [
        (show.number(s.get("worst_client_loss")), "loss of the worst client"),
        (limits, "budgets exceeded" if run.budgeted else "needs more than its clients can bear"),
        (_held(run), f"experts held by a client, of {_experts(run) or show.NONE}"),
        (show.size(run.traffic), f"moved: {down} down, {up} up"),
        (show.size(s.get("peak_memory_bytes")), "largest peak memory of a client"),
        (show.seconds(s.get("seconds")), f"wall-clock, {show.share(engine, 0)} of it the engine's own"),
    ]
    if not run.has_accuracy:
        tiles.insert(-1, (show.flops(s.get("flops")), "computed by the clients"))
    html += "<div class='tiles'>"
    html += "".join(
        f"<div class='tile'><b>{value}</b><span class='label'>{escape(text)}</span></div>" for value, text in tiles
    )
    facts = [("computed", f"{show.flops(s.get('flops'))} by the clients")] if run.has_accuracy else []
    facts += [
        ("partition", str(run.summary.get("partition", show.NONE))),
        ("corpus sha256", str(s.get("corpus_sha256") or show.NONE)[:16]),
        ("model hash", str(s.get("model_hash") or show.NONE)[:16]),
        ("fedmoe", str(s.get("code") or show.NONE)),
        ("updates refused", str(s.get("refused_updates", show.NONE))),
        ("mass lost", f"{show.share(run.last('lost_mass'))} of the router's weight on absent experts"),
        ("experts trained", f"{show.share(run.last('coverage'), 0)} by some client in the last round"),
    ]
    html += "</div><dl>" + "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in facts) + "</dl>"
    return html + "</header>\n"


def _headline(run: Run) -> str:
    """The result in one clause, whichever way it fell."""
    s = run.summary
    accuracy = _minus(s.get("accuracy_after"), s.get("accuracy_before"))
    loss = _minus(s.get("loss_after"), s.get("loss_before"))
    if accuracy is not None:
        points = f"{100 * abs(accuracy):.1f} points"
        verb = "raises" if accuracy > 0 else "does not raise"
        return f"{run.name} {verb} held-out accuracy" + (f" by {points}" if accuracy > 0 else f" (−{points})")
    if loss is not None:
        verb = "lowers" if loss < 0 else "does not lower"
        return f"{run.name} {verb} held-out loss" + (f" by {-loss:.3f} nats" if loss < 0 else f" (+{loss:.3f} nats)")
    return run.name


def _setting(run: Run) -> str:
    config = run.config
    parts = [f"Model {config.get('model', show.NONE)}", f"data {config.get('data', show.NONE)}"]
    clients = show.plural(len(run.client_ids) or int(config.get("clients", 0)), "client")
    parts.append(f"{clients} in {show.plural(len(set(run.tiers.values())) or 1, 'budget tier')}")
    parts.append(show.plural(int(run.summary.get("rounds") or 0), "round"))
    parts.append(f"seed {run.seed}")
    text = ", ".join(parts) + ("" if run.finished else " (unfinished)")
    return escape(text) + "."


def _tiers(run: Run) -> str:
    """One row a tier: its clients, what they held and used at most, and where their loss ended."""
    tiers = run.tiers
    if not tiers:
        return ""
    key = "loss_clients" if run.last("loss_clients") else "personal_loss_C"
    final, first = run.last(key) or [], run.last(key, first=True) or []
    own = run.last("personal_accuracy_C") or []
    rows = []
    for tier in dict.fromkeys(tiers[client] for client in run.client_ids if client in tiers):
        members = [client for client, name in tiers.items() if name == tier]
        lines = [entry for entry in run.ledger if entry["client"] in members]
        cells = [escape(tier) or show.NONE, str(len(members))]
        for key, (_, text) in figures.RESOURCES.items():
            used = [value for entry in lines if (value := (entry.get("real") or {}).get(key)) is not None]
            pairs = [((entry.get("real") or {}).get(key), (entry.get("budget") or {}).get(key)) for entry in lines]
            parts = [real / limit for real, limit in pairs if real is not None and limit]
            mark = "bad" if parts and max(parts) > 1 else "muted"
            bound = f" <span class='{mark}'>{show.share(max(parts), 0)}</span>" if parts else ""
            cells.append((text(max(used)) if used else show.NONE) + bound)
        end = [final[c] for c in members if c < len(final) and show.known(final[c])]
        start = [first[c] for c in members if c < len(first) and show.known(first[c])]
        mean = float(np.mean(end)) if end else None
        cells += [show.number(mean), show.signed(_minus(mean, float(np.mean(start)) if start else None))]
        cells.append(show.number(max(end, default=None)))
        right = [own[c] for c in members if c < len(own) and show.known(own[c])]
        cells += (
            [f"{show.share(float(np.mean(right)))}, {show.share(min(right))}"] if right else [show.NONE] * bool(own)
        )
        rows.append(("", cells))
    names = ["tier", "clients", *(label for label, _ in figures.RESOURCES.values()), "mean loss", "change", "worst"]
    names += ["own accuracy: mean, worst"] if own else []
    note = "<p class='muted'>Most that a client of the tier used in any round, with its share of the limit.</p>"
    return f"<h2>Tiers</h2>{note}" + _table(names, rows, left=(0,))


def _ledger(run: Run) -> str:
    """Predicted and real cost of every client in the last round."""
    if not run.ledger:
        return ""
    last = max(entry["round"] for entry in run.ledger)
    rows = []
    for entry in (e for e in run.ledger if e["round"] == last):
        real, predicted, limit = (entry.get(part) or {} for part in ("real", "predicted", "budget"))
        cells = [escape(run.client_name(entry["client"]))]
        for key, (_, text) in figures.RESOURCES.items():
            value, bound = real.get(key), limit.get(key)
            shown = show.NONE if value is None else text(value)
            if predicted.get(key) is not None and text(predicted[key]) != shown:
                shown = f"{shown} <span class='muted'>({text(predicted[key])})</span>"
            over = value is not None and bound is not None and value > bound
            cells.append(f"<span class='bad'>{shown} over {text(bound)}</span>" if over else shown)
        rows.append(("", [*cells, show.seconds(real.get("seconds"))]))
    names = ["client", *(label for label, _ in figures.RESOURCES.values()), "time"]
    note = "<p class='muted'>Measured, with the prediction in brackets where it differs.</p>"
    return f"<h2>Ledger of round {last}</h2>{note}<div class='tall'>{_table(names, rows, left=(0,))}</div>"


def _refused(run: Run) -> str:
    items = [(r["round"], item) for r in run.rounds for item in r.get("refused") or ()]
    if not items:
        return "<h2>Refused updates</h2><p>None.</p>"
    rows = [("", [str(n), escape(run.client_name(item["client"])), escape(str(item["reason"]))]) for n, item in items]
    return "<h2>Refused updates</h2>" + _table(["round", "client", "reason"], rows, left=(0, 1, 2))


def _configuration(run: Run) -> str:
    path = run.path / "config.toml"
    if not path.is_file():
        return ""
    return (
        f"<details><summary>Configuration of this run</summary><pre>{escape(path.read_text('utf-8'))}</pre></details>"
    )


def _figure(title: str, draw: Callable[..., Any], *args: Any, name: str, caption: str = "") -> str:
    picture = drawing.svg(draw, *args, name=name)
    if picture is None:
        return ""
    note = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<section><h2>{escape(title)}</h2><figure>{picture}{note}</figure></section>\n"


def _table(names: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], *, left: Sequence[int]) -> str:
    """A table; cells are HTML already, columns in ``left`` hold words and align left."""

    def cells(tag: str, values: Sequence[str]) -> str:
        marks = (" class='t'" if place in left else "" for place in range(len(values)))
        return "".join(f"<{tag}{mark}>{value}</{tag}>" for mark, value in zip(marks, values, strict=True))

    body = "".join(f"<tr class='{kind}'>{cells('td', values)}</tr>" for kind, values in rows)
    return f"<div class='wide'><table><thead><tr>{cells('th', names)}</tr></thead><tbody>{body}</tbody></table></div>"


def _change(summary: Any, key: str, text: Callable[[float | None], str]) -> str:
    return f"{text(summary.get(f'{key}_before'))} → {text(summary.get(f'{key}_after'))}"


def _count(violations: int) -> str:
    return f"<span class='{'bad' if violations else 'good'}'>{violations}</span>"


def _held(run: Run) -> str:
    return held(run).replace("..", "–")


def _experts(run: Run) -> int:
    return int(np.size(next((r["held_LE"] for r in run.clients if r.get("held_LE")), [])))


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _listing(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
