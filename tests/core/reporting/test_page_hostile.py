"""Nothing that a run's files say becomes markup: the page is parsed, and opened in a browser where there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import make_run

from fedmoe_core.reporting.report import report

MARK = "data-owned"
RUN = f"document.documentElement.setAttribute('{MARK}','N')"
PAYLOADS = tuple(
    form.replace("RUN", RUN)
    for form in (
        "<script>RUN</script>",
        "<img src=x onerror=RUN>",
        '" onmouseover="RUN" autofocus tabindex="0" onfocus="RUN" x="',
        "' onfocus='RUN' autofocus tabindex='0' onmouseover='RUN' x='",
        "</title><script>RUN</script>",
        "</style><script>RUN</script>",
        "</pre></details><script>RUN</script>",
        "--><script>RUN</script>",
        "]]><script>RUN</script>",
        "<svg onload=RUN>",
        "</text></svg><script>RUN</script>",
        "{{7*7}}{% raw %}<script>RUN</script>",
        "javascript:RUN",
        "\\1\\g<0><img src=x onerror=RUN>",
        "url(#x) 'DejaVu Sans' id=\"y\" <svg/onload=RUN>",
    )
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


class Shape(HTMLParser):
    """The tags of a page with the names of their attributes, the values that act, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.kinds: set[tuple[str, tuple[str, ...]]] = set()
        self.links: set[str] = set()
        self.text = ""
        self.comments: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.kinds.add((tag, tuple(sorted(name for name, _ in attrs))))
        self.links |= {(value or "").split(":")[0][:5] for name, value in attrs if name in ("href", "src")}

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def numbered(payload: str, number: int) -> str:
    return payload.replace("'N'", f"'{number}'")


class Dealer:
    """Deals one payload after another, each with a number of its own; ``dealt`` remembers them."""

    def __init__(self, *, harmless: bool) -> None:
        self.harmless, self.dealt = harmless, list[str]()

    def __call__(self) -> str:
        number = len(self.dealt)
        self.dealt.append(numbered(PAYLOADS[number % len(PAYLOADS)], number))
        return f"harmless {number}" if self.harmless else self.dealt[-1]


def texts_replaced(value: Any, deal: Dealer, keep: tuple[str, ...]) -> Any:
    """The same JSON with a payload as every text except under the keys in ``keep``."""
    if isinstance(value, str):
        return deal()
    if isinstance(value, list):
        return [texts_replaced(entry, deal, keep) for entry in value]
    if isinstance(value, dict):
        return {key: entry if key in keep else texts_replaced(entry, deal, keep) for key, entry in value.items()}
    return value


def hostile_run(path: Path, deal: Dealer, **changes: Any) -> Path:
    """A run in whose files every text is a payload: names, labels, tiers, reasons, hashes, settings, comments."""
    make_run(path, clients=4, layers=1, experts=4, rounds=2, **changes)
    tiers = [deal() for _ in range(3)]
    lines = [json.loads(text) for text in (path / "metrics.jsonl").read_text("utf-8").splitlines()]
    for line in lines:
        if line["type"] == "client":
            line["tier"] = tiers[line["client"] % 3]
        for item in line.get("refused", ()):
            item["reason"] = deal()
    lines[-1]["refused"] = [{"client": n % 4, "reason": deal()} for n in range(len(PAYLOADS))]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    for name in ("summary.json", "partition.json"):
        content = json.loads((path / name).read_text("utf-8"))
        content |= {"partition": deal()} if name == "summary.json" else {}
        (path / name).write_text(json.dumps(texts_replaced(content, deal, ("task",))), "utf-8")
    settings = {"algorithm": deal(), "model": deal(), "data": deal(), "budgets": tiers, deal(): deal()}
    toml = [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in settings.items()]
    toml += [f"# {deal()}" for _ in PAYLOADS]
    (path / "config.toml").write_text("\n".join(toml) + "\n", "utf-8")
    return path


def pages(tmp_path: Path, *, harmless: bool) -> tuple[str, str, list[str]]:
    """A page of one run, a page of three that share a name and so show their directories', and the payloads."""
    deal = Dealer(harmless=harmless)
    alone = hostile_run(tmp_path / "alone", deal)
    label = deal()
    folders = [tmp_path / deal().replace("/", "∕") for _ in range(3)]  # a slash would make a folder within
    several = [hostile_run(path, deal) for path in folders]
    for path in several:
        summary = json.loads((path / "summary.json").read_text("utf-8"))
        (path / "summary.json").write_text(json.dumps(summary | {"label": label}), "utf-8")
    one, _ = report([alone], out=tmp_path / "one.html")
    many, _ = report(several, out=tmp_path / "many.html")
    return one.read_text("utf-8"), many.read_text("utf-8"), deal.dealt


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, list[str]]:
    return pages(tmp_path_factory.mktemp("hostile"), harmless=False)


def test_a_parser_sees_no_tag_and_no_attribute_of_a_payload(
    hostile: tuple[str, str, list[str]], tmp_path: Path
) -> None:
    calm = pages(tmp_path, harmless=True)
    assert len(hostile[2]) == len(calm[2]) > 100
    for found, expected in zip(map(Shape, hostile[:2]), map(Shape, calm[:2]), strict=True):
        assert found.kinds == expected.kinds
        assert found.links == expected.links == {"#figu", "data"}
        assert found.comments == []


def test_payloads_are_shown_as_text(hostile: tuple[str, str, list[str]]) -> None:
    text = Shape(hostile[0]).text + Shape(hostile[1]).text
    for place in range(len(PAYLOADS)):
        assert any(payload in text for payload in hostile[2][place :: len(PAYLOADS)]), PAYLOADS[place]
    shown = sum(payload in text for payload in hostile[2])
    assert shown > 0.6 * len(hostile[2])  # the others are hashes, cut to 16 signs, and what only a comparison reads


def test_figures_of_runs_of_similar_names_share_no_id(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name, clients=2, layers=1, experts=2, rounds=1, label=name) for name in ("a b", "a-b")]
    html = report(paths, out=tmp_path / "r.html")[0].read_text("utf-8")
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids)) > 50
    pointed = re.findall(r'url\(#([^)"]*)\)|href="#([^"]*)"', html)
    assert {a or b for a, b in pointed} <= set(ids)


def browsed(html: str, folder: Path) -> str:
    """The document as Chromium has it once the page and its scripts, if any ran, are done."""
    assert CHROMIUM is not None
    folder.mkdir(parents=True)
    page = folder / "page.html"
    page.write_text(html, "utf-8")
    # No sandbox, since neither root nor many a container can start it; a payload here does no more than set a mark.
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000"]
    command += ["--dump-dom", page.as_uri()]
    environment = {**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "</html>" in done.stdout, done.stderr[-2000:]
    return done.stdout


def owned(dom: str) -> str | None:
    """The number of the payload that ran last."""
    found = re.match(rf"(?:<!doctype html>)?\s*<html[^>]*\b{MARK}=\"(\d+)\"", dom, flags=re.IGNORECASE)
    return found[1] if found else None


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")


@needs_browser
def test_no_payload_runs_in_a_browser(hostile: tuple[str, str, list[str]], tmp_path: Path) -> None:
    """With the page's policy, and without it, so that the escaping is tested by itself; two starts for each page."""
    for place, html in enumerate(hostile[:2]):
        bare, removed = POLICY.subn("", html)
        assert removed == 1
        for name, text in (("as written", html), ("without policy", bare)):
            dom = browsed(text, tmp_path / f"{place} {name}")
            assert owned(dom) is None, hostile[2][int(owned(dom) or 0)]
            assert "</table>" in dom
            assert "&lt;script&gt;" in dom


@needs_browser
def test_a_payload_that_is_not_escaped_runs_and_the_policy_stops_it(
    hostile: tuple[str, str, list[str]], tmp_path: Path
) -> None:
    """The control: the same page with one payload let through, which the tests above would notice."""
    live = hostile[0].replace("</body>", numbered(PAYLOADS[0], 7) + "</body>")
    assert owned(browsed(live, tmp_path / "policy")) is None
    assert owned(browsed(POLICY.sub("", live), tmp_path / "bare")) == "7"
