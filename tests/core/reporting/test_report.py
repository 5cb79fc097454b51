"""The report: complete without the network, it shows and does not judge, calm when something is missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import make_run

from fedmoe_core.base import show
from fedmoe_core.reporting import figures
from fedmoe_core.reporting.report import report
from fedmoe_core.reporting.results import by_quality, line, quality_of, remarks
from fedmoe_core.reporting.run import read_runs

VOID = {"meta", "br", "hr", "img", "input", "link", "use", "path", "image"}


class Page(HTMLParser):
    """Text, headings and ids of a page; raises on a tag that closes out of order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(paths: list[Path], out: Path) -> tuple[Page, str, list[str]]:
    path, lines = report(paths, out=out)
    html = path.read_text("utf-8")
    page = Page(html)
    assert page.open == []
    return page, html, lines


def one(path: Path) -> Any:
    return read_runs([path])[0]


@pytest.mark.parametrize(
    "shape",
    [
        {"clients": 2, "layers": 1, "experts": 2, "rounds": 1},  # the smallest run there is
        {"clients": 10},  # the demo's shape
        {
            "clients": 40,
            "layers": 6,
            "experts": 64,
            "rounds": 3,
        },  # too many clients to name, layers to show, cells to label
        {"clients": 10, "classification": True},
    ],
)
def test_page_is_whole_and_stands_alone(tmp_path: Path, shape: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run", **shape)
    page, html, _ = page_of([run], tmp_path / "r.html")
    assert not re.search(r"https?:|//[a-z]+\.|<script|<link|@import", html)
    assert page.tags.count("svg") == 6
    assert len(page.ids) == len(set(page.ids))
    for heading in (
        "HFedMoE lowers held-out loss" if not shape.get("classification") else "HFedMoE raises held-out accuracy",
        "Clients: worst, mean and best",
        "Which client holds which expert",
        "Which experts matter",
        "Budget used, against budget given",
        "Tiers",
        "Which client holds what data",
        "Refused updates",
        "Configuration of this run",
    ):
        assert heading in page.text, heading
    assert ("held-out accuracy (%)" in page.text) == bool(shape.get("classification"))
    assert {path.name for path in tmp_path.iterdir()} == {"run", "r.html"}


def test_figures_draw_what_the_records_say(tmp_path: Path) -> None:
    run = one(make_run(tmp_path / "run", clients=4, layers=1, experts=4, rounds=2))
    held = figures.holdings(run)
    assert held is not None
    shown = held.axes[-1].images[0].get_array()
    last = {record["client"]: record for record in run.clients if record["round"] == 2}
    for place, client in enumerate(run.client_ids):
        expected = [h + h * t for h, t in zip(last[client]["held_LE"][0], last[client]["trained_LE"][0], strict=True)]
        assert shown[place].tolist() == expected

    curves = figures.learning([run])
    assert curves is not None
    rounds, moved, _ = curves.axes
    assert rounds.lines[0].get_xydata().tolist() == [[r["round"], r["loss"]] for r in run.rounds]
    traffic = [r["bytes_down_total"] + r["bytes_up_total"] for r in run.rounds]
    scale = 1024.0**2
    assert "MiB" in moved.get_xlabel()
    assert moved.lines[0].get_xdata().tolist() == pytest.approx([t / scale for t in traffic])

    limits = figures.budgets(run)
    assert limits is not None
    memory = limits.axes[0]
    used = max(e["real"]["memory_bytes"] / e["budget"]["memory_bytes"] for e in run.ledger if e["client"] == 0)
    bars = [bar.get_width() for bar in memory.patches if bar.get_y() < 0.5 and bar.get_width() != 100]
    assert bars == pytest.approx([100 * used])
    assert all(axes.lines[-1].get_xdata()[0] == 100 for axes in limits.axes)


def test_exceeded_limit_is_drawn_past_the_line_and_named(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", clients=2, rounds=1, budget_violations=1, tiers=("memory=24MiB",))
    entries = [json.loads(text) for text in (path / "ledger.jsonl").read_text().splitlines()]
    entries[0]["real"]["memory_bytes"] = 2 * entries[0]["budget"]["memory_bytes"]
    (path / "ledger.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    drawn = figures.budgets(one(path))
    assert drawn is not None
    assert max(bar.get_width() for bar in drawn.axes[0].patches) == pytest.approx(200)
    assert drawn.axes[0].get_xlim()[1] > 200
    page, html, _ = page_of([path], tmp_path / "r.html")
    assert "over" in page.text
    assert "class='bad'" in html


def test_hostile_names_are_text_not_markup(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", clients=2, rounds=2, label="<script>alert(1)</script>")
    partition = json.loads((path / "partition.json").read_text())
    partition["clients"] = ["<b>one</b>", "a&b $\\frac{ $x_1$"]
    (path / "partition.json").write_text(json.dumps(partition))
    page, html, _ = page_of([path], tmp_path / "r.html")
    assert "<script" not in html
    assert "<b>one" not in html
    assert "<b>one</b>" in page.text
    assert "a&b $\\frac{ $x_1$" in page.text


@pytest.mark.parametrize("missing", ["partition.json", "ledger.jsonl", "config.toml", "summary.json"])
def test_what_is_missing_is_left_out(tmp_path: Path, missing: str) -> None:
    path = make_run(tmp_path / "run", clients=3, rounds=2)
    (path / missing).unlink()
    page, _, lines = page_of([path], tmp_path / "r.html")
    assert "held-out loss" in page.text
    assert ("unfinished after round 2" in lines[0]) == (missing == "summary.json")


def test_metrics_that_nobody_measured_are_not_available(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", clients=2, rounds=1)
    keep = ("type", "round", "client", "loss")
    bare = [json.loads(text) for text in (path / "metrics.jsonl").read_text().splitlines()]
    bare = [{key: record[key] for key in keep if key in record} for record in bare]
    bare[-1]["loss"] = None
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in bare))
    (path / "summary.json").write_text(json.dumps({"algorithm": "hfedmoe"}))
    (path / "ledger.jsonl").unlink()
    page, _, lines = page_of([path], tmp_path / "r.html")
    assert "n/a" in page.text
    assert lines[0].startswith("HFedMoE: held-out loss n/a -> n/a, worst client n/a, moved n/a")


def test_resumed_run_counts_each_round_once_and_half_a_line_is_forgiven(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", clients=2, rounds=3)
    metrics = path / "metrics.jsonl"
    texts = metrics.read_text().splitlines()
    last = json.loads(texts[-1]) | {"loss": 1.25}
    metrics.write_text("\n".join([*texts, json.dumps(last), '{"type": "rou']))
    run = one(path)
    assert [record["round"] for record in run.rounds] == [0, 1, 2, 3]
    assert run.rounds[-1]["loss"] == 1.25
    assert len(run.clients) == 6
    metrics.write_text("\n".join([texts[0], '{"type": "rou', *texts[1:]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not JSON"):
        read_runs([path])


def test_unreadable_runs_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no run"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(ValueError, match="is not a directory"):
        read_runs([tmp_path / "absent"])
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no round yet"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(ValueError, match="no run given"):
        report([])


def test_line_says_what_the_demo_must_say(tmp_path: Path) -> None:
    path = make_run(
        tmp_path / "run",
        clients=3,
        rounds=2,
        loss_before=4.3101,
        loss_after=4.2512,
        worst_client_loss=4.5,
        bytes_down=3 << 20,
        bytes_up=1 << 20,
        experts_held_min=8,
        experts_held_max=12,
        refused_updates=0,
    )
    assert line(one(path)) == (
        "HFedMoE: held-out loss 4.310 -> 4.251, worst client 4.500, moved 4.00 MiB (down 3.00 MiB, up 1.00 MiB), "
        "experts held 8..12, budgets exceeded: 0"
    )


@pytest.mark.parametrize(
    ("changes", "headline"),
    [
        ({"loss_before": 4.3, "loss_after": 4.25}, "HFedMoE lowers held-out loss by 0.050 nats"),
        ({"loss_before": 4.3, "loss_after": 4.31}, "HFedMoE does not lower held-out loss (+0.010 nats)"),
        (
            {"classification": True, "accuracy_before": 0.7, "accuracy_after": 0.721, "loss_after": 9.0},
            "HFedMoE raises held-out accuracy by 2.1 points",
        ),
        (
            {"classification": True, "accuracy_before": 0.7, "accuracy_after": 0.69, "loss_after": 0.1},
            "HFedMoE does not raise held-out accuracy (−1.0 points)",
        ),
        ({"nothing_trained": "no client took part"}, "HFedMoE: nothing trained"),
    ],
)
def test_the_headline_says_whether_a_run_improved_on_its_own_start(
    tmp_path: Path, changes: dict[str, Any], headline: str
) -> None:
    run = make_run(tmp_path / "run", clients=2, rounds=1, **changes)
    _, html, _ = page_of([run], tmp_path / "r.html")
    assert f"<h1>{headline}</h1>" in html


def test_without_a_global_model_the_clients_own_models_are_read(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", clients=2, rounds=1, loss_before=None, loss_after=None)
    lines = [json.loads(text) for text in (path / "metrics.jsonl").read_text().splitlines()]
    for record in lines:
        if record["type"] == "round":
            own = [4.2, 4.4] if record["round"] == 0 else [4.0, 4.3]
            record |= {"loss": None, "loss_clients": None, "personal_loss_C": own}
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    run = one(path)
    quality = quality_of([run])
    assert (quality.of(run, first=True), quality.of(run)) == pytest.approx((4.3, 4.15))
    page, _, _ = page_of([path], tmp_path / "r.html")
    assert "HFedMoE lowers held-out loss of the clients' own models by 0.150 nats" in page.text
    page, _, _ = page_of([path, path], tmp_path / "two.html")
    assert "Sorted by final held-out loss of the clients' own models." in page.text
    assert "4.150" in page.text


def test_the_table_is_sorted_by_how_runs_ended_and_claims_nothing(tmp_path: Path) -> None:
    small = {"clients": 2, "rounds": 1}
    paths = [
        make_run(tmp_path / "a", **small, loss_after=4.3, label="A"),
        make_run(tmp_path / "b", **small, loss_after=4.2, label="B"),
        make_run(tmp_path / "c", **small, loss_after=4.0, label="C", budgeted=False, algorithm="fedavg"),
        make_run(tmp_path / "d", **small, loss_after=4.1, label="D", budget_violations=1),
        make_run(tmp_path / "e", **small, loss_after=None, label="E", tiers=("experts=90%",), seed=1),
        make_run(tmp_path / "f", **{**small, "rounds": 2}, label="F", loss_after=3.9, corpus_sha256="0" * 64),
    ]
    (paths[5] / "config.toml").write_text((paths[5] / "config.toml").read_text() + "new_key = 1\n")
    runs = read_runs(paths)
    assert [run.summary["label"] for run in by_quality(runs[:4])] == ["C", "D", "B", "A"]
    assert [run.summary["label"] for run in by_quality(runs)][-1] == "E"
    assert [remarks(run, runs[0]) for run in runs] == [
        [],
        [],
        ["not bound by the budgets"],
        ["exceeded a budget"],
        ["differs from A in budgets"],
        ["settings cannot be compared with those of A"],
    ]
    page, _, lines = page_of(paths, tmp_path / "r.html")
    assert "Sorted by final held-out loss." in page.text
    assert "differs from A in budgets" in page.text
    claims = re.compile(r"\b(better|worse|best of|beats?|ahead|behind|wins?|ranked|ranking)\b")
    assert claims.findall(page.text + " ".join(lines)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": 2}, "rounds"),
        ({"clients": 3}, "clients"),
        ({"tiers": ("experts=50%",)}, "budgets"),
        ({"corpus_sha256": "0" * 64}, "corpus"),
        ({"model_sha256": "commit:1"}, "model weights"),
    ],
)
def test_what_two_runs_do_not_share_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    small: dict[str, Any] = {"clients": 2, "rounds": 1, "label": "A"}
    first = make_run(tmp_path / "a", **small)
    second = make_run(tmp_path / "b", **{**small, "label": "B", "algorithm": "random", **changes})
    runs = read_runs([first, second])
    assert remarks(runs[1], runs[0]) == [f"differs from A in {said}"]


def test_only_runs_of_several_systems_call_for_a_comparison(tmp_path: Path) -> None:
    small = {"clients": 2, "rounds": 1}
    seeds = [make_run(tmp_path / f"h{seed}", seed=seed, **small) for seed in (0, 1)]
    other = make_run(tmp_path / "r", algorithm="random", **small)
    said = "fedmoe report only shows runs; fedmoe compare tests differences over seeds."
    page, _, lines = page_of(seeds, tmp_path / "seeds.html")
    assert [line.partition(":")[0] for line in lines] == ["HFedMoE, seed 0", "HFedMoE, seed 1"]
    assert "fedmoe compare" not in page.text
    page, _, lines = page_of([*seeds, other], tmp_path / "both.html")
    assert lines[3:] == [said]
    assert said in page.text


def test_three_runs_share_a_page(tmp_path: Path) -> None:
    small = {"clients": 4, "rounds": 3}
    paths = [make_run(tmp_path / name, algorithm=name, **small) for name in ("hfedmoe", "random")]
    paths.append(make_run(tmp_path / "fedavg", algorithm="fedavg", budgeted=False, **small))
    out, lines = report(paths)
    assert out == tmp_path / "report.html"
    html = out.read_text("utf-8")
    page = Page(html)
    assert not re.search(r"https?:", html)
    assert "HFedMoE, random experts and FedAvg" in page.text
    assert lines[3] in page.text
    assert len(lines) == 4
    assert page.tags.count("svg") == 2 + 3 * 4
    assert len(page.ids) == len(set(page.ids))
    same = report([paths[0], paths[0]], out=tmp_path / "twice.html")[1]
    assert same[0].startswith("HFedMoE, hfedmoe: ")


def test_report_is_the_same_bytes_twice(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", clients=3, rounds=2)
    first, _ = report([path])
    assert first == path / "report.html"
    before = first.read_bytes()
    report([path])
    assert first.read_bytes() == before


@pytest.mark.parametrize(
    ("said", "value"),
    [
        (show.size(None), "n/a"),
        (show.size(1023), "1023 B"),
        (show.size(1024), "1.00 KiB"),
        (show.size(1023 * 1024), "1.00 MiB"),
        (show.size(5 * 1024**4), "5.00 TiB"),
        (show.flops(3.3e10), "33.0 GFLOP"),
        (show.flops(999), "999 FLOP"),
        (show.seconds(59.94), "59.9 s"),
        (show.seconds(125), "2 min 05 s"),
        (show.seconds(3840), "1 h 04 min"),
        (show.signed(-0.05), "−0.050"),
        (show.number(float("nan")), "n/a"),
        (show.share(0.812), "81.2 %"),
        (show.plural(1, "client"), "1 client"),
    ],
)
def test_numbers_as_people_read_them(said: str, value: str) -> None:
    assert said == value


def test_every_value_of_the_style_sheet_is_set_and_no_class_of_it_is_idle(tmp_path: Path) -> None:
    _, html, _ = page_of([make_run(tmp_path / "run")], tmp_path / "report.html")
    style = html.partition("<style>")[2].partition("</style>")[0]
    assert {"--ink", "--muted", "--line", "--fonts"} == set(re.findall(r"var\((--\w+)\)", style))
    assert all(re.search(rf"{name}: [^;{{]+;", style) for name in re.findall(r"var\((--\w+)\)", style))
    assert "&#" not in style
    source = "".join(
        file.read_text("utf-8") for file in Path(figures.__file__).parent.glob("*[.]*") if file.suffix != ".css"
    )
    named = set(re.findall(r"\.([a-z]+)(?=[ ,{:.])", re.sub(r"{[^}]*}", "{}", style)))
    assert [name for name in sorted(named) if not re.search(rf"['\" ]{name}['\" ]", source)] == []
