"""The ``fedmoe`` command: thin; every subcommand reads its words, calls one verb and prints what came back."""

from __future__ import annotations

import json
import os
import sys
import tomllib
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedmoe_core.base import show
from fedmoe_core.base.say import hold_streams, say
from fedmoe_core.cli import export as cli_export
from fedmoe_core.cli import score as cli_score
from fedmoe_core.cli import split as cli_split
from fedmoe_core.cli import study as cli_study
from fedmoe_core.cli import watch as cli_watch
from fedmoe_core.cli.ending import Ending, errors, fail, interruptions
from fedmoe_core.simulation import launch

if TYPE_CHECKING:
    from fedmoe_core.config.run_config import Config

app = typer.Typer(
    name="fedmoe",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="CONFIG.toml|KEY=VALUE", help="A TOML file, then values such as train.lr=1e-3."),
]


RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a run.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("fedmoe-core")
        except PackageNotFoundError:
            number = "from a source tree that is not installed"
        say(f"fedmoe {number}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Fine-tune Mixture-of-Experts models over clients with hard budgets."""


@app.command()
def simulate(
    words: Words = None,
    quiet: Quiet = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run in out; other files stay.")] = False,
    debug: Debug = False,
    as_json: AsJson = False,
) -> None:
    """Train: every client inside its budget, one round after another; writes a run directory and its report."""
    ending = Ending()
    with interruptions(ending), errors(ending, debug=debug):
        config = _config(words)
        out = ending.run_dir = Path(config.out)
        launch.check_world(config.ranks)
        if launch.rank() == 0 and not launch.restarted():  # a restart goes on with what the first attempt left
            from fedmoe_core.simulation.directory.claim import refuse_claim

            refuse_claim(out, force=force)
        if _many(config, ["simulate", *(words or [])], quiet=quiet, debug=debug, json=as_json, force=force):
            return
        from fedmoe_core.simulation import run as simulator
        from fedmoe_core.simulation.observer import NullObserver

        summary = simulator.run(config, observer=NullObserver() if quiet else None, force=force)
        _finish(summary, out, as_json=as_json)


@app.command()
def resume(
    run_dir: RunDir,
    quiet: Quiet = False,
    other_code: Annotated[
        bool, typer.Option("--other-code", help="Go on under other code or another torch; bits may differ.")
    ] = False,
    debug: Debug = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a run from its last checkpoint, to the same bits as if it had never stopped."""
    ending = Ending()
    with interruptions(ending), errors(ending, debug=debug):
        ending.run_dir = run_dir
        if not (run_dir / "config.toml").is_file():
            raise ValueError(f"{run_dir} holds no run (no config.toml); give the directory that a run named as out")
        _make_importable(run_dir / "config.toml", [])
        from fedmoe_core.config.run_config import Config

        config = Config.load(run_dir / "config.toml").resolved()
        launch.check_world(config.ranks)
        if _many(config, ["resume", str(run_dir)], quiet=quiet, debug=debug, json=as_json, other_code=other_code):
            return
        from fedmoe_core.simulation import run as simulator
        from fedmoe_core.simulation.observer import NullObserver

        summary = simulator.resume(run_dir, observer=NullObserver() if quiet else None, other_code=other_code)
        _finish(summary, run_dir, as_json=as_json)


@app.command()
def plan(
    words: Words = None,
    every: Annotated[bool, typer.Option("--all", help="One line for each client, however many there are.")] = False,
    debug: Debug = False,
    as_json: AsJson = False,
) -> None:
    """Show what each client would hold, move, compute and need in memory, before anything trains (the dry run)."""
    ending = Ending()
    with interruptions(ending), errors(ending, debug=debug):
        config = _config(words)
        from fedmoe_core.cli.plan_table import groups_table, plan_table
        from fedmoe_core.simulation import run as simulator
        from fedmoe_core.simulation.observer import groups_of

        rows = simulator.dry_run(config)
        outside, groups = [row for row in rows if not row.fits], groups_of(rows)
        if as_json:
            told = {"fits": not outside, "clients": [row.facts() for row in rows]}
            typer.echo(json.dumps(told | ({"groups": [vars(group) for group in groups]} if groups else {}), indent=2))
        else:
            # A pipe has no width; 260 columns keep every row on one line.
            console = Console() if sys.stdout.isatty() else Console(width=260)
            console.print(plan_table(rows, config, every=every, width=console.width))
            if groups:
                console.print(groups_table(groups, every=every))
        if outside:
            first = outside[0]
            raise ValueError(f"{show.plural(len(outside), 'client')} cannot run; {first.client}: {first.reason}")


@app.command()
def score(
    words: Words = None,
    by: cli_score.By = cli_score.DEFAULT_BY,
    top: cli_score.Top = 0,
    batches: cli_score.Batches = cli_score.DEFAULT_BATCHES,
    out: cli_score.Out = None,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: AsJson = False,
) -> None:
    """Rank the experts of every MoE layer by what they are worth, on public text; nothing is trained beyond warm-up."""
    ending = Ending()
    with interruptions(ending), errors(ending, debug=debug):
        cli_score.check(by)
        config = _config(words)
        from fedmoe_core.simulation.observer import NullObserver
        from fedmoe_core.simulation.progress import observer_for

        observer = NullObserver() if quiet else observer_for(Console(stderr=True))
        try:
            found = cli_score.run(config, observer, by=by, batches=batches, out=out)
        finally:
            observer.close()
        cli_score.show(found, by=by, top=top, as_json=as_json)


@app.command()
def watch(
    run_dirs: cli_watch.RunDirs,
    once: cli_watch.Once = False,
    every: cli_watch.Every = 1.0,
    debug: Debug = False,
    as_json: AsJson = False,
) -> None:
    """Follow a run, or several, in a table: rounds, loss, worst client, updates, budgets, time left; it only reads."""
    ending = Ending()
    with interruptions(ending), errors(ending, debug=debug):
        cli_watch.watch(run_dirs, once=once, every=every, as_json=as_json)


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Runs to show, in this order.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the HTML file goes.")] = None,
    debug: Debug = False,
) -> None:
    """Write report.html for one run, or one page that shows several, and print the figures that matter."""
    ending = Ending()
    with interruptions(ending), errors(ending, debug=debug):
        from fedmoe_core.reporting.report import report

        path, lines = report(run_dirs, out=out)
        for line in lines:
            say(line)
        say(f"report: {path}")


@app.command()
def export(
    run_dir: RunDir,
    out: cli_export.Out,
    form: cli_export.Form = "hf",
    client: cli_export.Client = cli_export.GLOBAL,
    equal: cli_export.Equal = False,
    force: cli_export.Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's model, the one that its report judged, as a directory that transformers or peft loads."""
    ending = Ending()
    with interruptions(ending), errors(ending, debug=debug):
        ending.again = "fedmoe export with the same words"
        if (run_dir / "config.toml").is_file():
            _make_importable(run_dir / "config.toml", [])
        cli_export.run(run_dir, out, form=form, client=client, equal=equal, force=force, quiet=quiet, as_json=as_json)


@app.command()
def compare(
    words: cli_study.Words = None,
    systems: cli_study.Systems = "all",
    seeds: cli_study.Seeds = "0-2",
    out: cli_study.Out = Path("runs/compare"),
    workers: cli_study.Workers = 0,
    target: cli_study.Target = None,
    variants: cli_study.Variants = None,
    beside: cli_study.Beside = None,
    force: cli_study.Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run systems over seeds under identical budgets and write a table and figures; stop it and go on at any time."""
    ending = Ending()
    with interruptions(ending), errors(ending, debug=debug):
        ending.again = "fedmoe compare with the same words"
        from fedmoe_core.comparison.study import Study

        _make_importable(next((Path(w) for w in words or [] if "=" not in w), None), words or [])
        study = Study.of(
            words or [],
            systems=systems,
            seeds=seeds,
            out=out,
            workers=workers,
            target=target,
            variants=variants,
            beside=beside,
        )
        raise typer.Exit(cli_study.run(study, Console(stderr=True, quiet=quiet), force=force))


@app.command()
def split(
    dense: cli_split.Dense,
    out: cli_split.Into,
    experts: cli_split.Experts = cli_split.DEFAULT_EXPERTS,
    top_k: cli_split.TopK = cli_split.DEFAULT_TOP_K,
    layers: cli_split.Layers = cli_split.DEFAULT_LAYERS,
    text: cli_split.Text = cli_split.DEFAULT_TEXT,
    tokens: cli_split.Tokens = cli_split.DEFAULT_TOKENS,
    debug: Debug = False,
    as_json: AsJson = False,
) -> None:
    """Turn a dense model into a Mixture of Experts that computes the same when all run, and measure a few of them."""
    ending = Ending()
    with interruptions(ending), errors(ending, debug=debug):
        ending.again = "fedmoe split with the same words"
        found = cli_split.run(dense, out, experts=experts, top_k=top_k, layers=layers, text=text, tokens=tokens)
        cli_split.show(found, out, as_json=as_json)


@app.command()
def systems(as_json: AsJson = False, debug: Debug = False) -> None:
    """List every system: its paper, the equations implemented, how sure we are of each, what is not there."""
    ending = Ending()
    with interruptions(ending), errors(ending, debug=debug):
        cli_study.show_systems(as_json=as_json)


def main() -> None:
    """Run the ``fedmoe`` command."""
    hold_streams()
    # The memory profiler's notes about blocks older than itself are expected: resident bytes are counted apart.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.formatwarning = _warning  # type: ignore[assignment] # of what it is given it needs the message alone
    app(prog_name="fedmoe")


def _warning(message: Warning | str, *_: object) -> str:
    """A warning as one line, without the place in the code, and from one rank."""
    return f"warning: {message}\n" if launch.rank() == 0 else ""


def _config(words: list[str] | None) -> Config:
    """The configuration that the words of the command line ask for, with its threads counted."""
    paths = [word for word in words or [] if "=" not in word]
    if len(paths) > 1:
        raise ValueError(f"two config files given, {paths[0]} and {paths[1]}; give one, and key=value for the rest")
    if paths and not paths[0].endswith(".toml"):
        raise ValueError(f"{paths[0]!r} is neither key=value nor a .toml file; write for example train.lr=1e-3")
    overrides = [word for word in words or [] if "=" in word]
    path = Path(paths[0]) if paths else None
    _make_importable(path, overrides)
    from fedmoe_core.config.run_config import Config

    return Config.load(path, overrides).resolved()


def _make_importable(path: Path | None, overrides: list[str]) -> None:
    """Let what is given as MODULE:NAME be imported from a file in the current folder, after all installed ones.

    That is an algorithm or a plain model. Before the configuration is read, for the class may declare settings. For
    nothing else: packages that are imported only where they exist would be found in a folder of their name.
    """
    keys = ("algorithm", "adapter")
    said = [word.partition("=")[2] for word in overrides if word.partition("=")[0].strip() in keys]
    if path is not None:
        with suppress(OSError, ValueError, RecursionError):  # reading it below says what is wrong
            tree = tomllib.loads(path.read_text("utf-8"))
            said += [str(tree.get(key, "")) for key in keys]
    if any(":" in word for word in said) and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _many(config: Config, arguments: list[str], **flags: bool) -> bool:
    """Run a configuration of several ranks to its end, each a process; False where this process is the run itself."""
    if config.ranks == 1 or launch.launched():
        return False
    if config.device.startswith("cuda"):
        from fedmoe_core.simulation.ranks.devices import check_devices

        check_devices(config)
    said = [f"--{name.replace('_', '-')}" for name, on in flags.items() if on]
    launch.run_ranks([*arguments, *said], ranks=config.ranks, threads=config.threads)
    return True


def _finish(summary: dict[str, Any], run_dir: Path, *, as_json: bool) -> None:
    """Write the report and print the result; a run that broke a budget or trained nothing ends with exit code 1."""
    if launch.rank():
        return
    from fedmoe_core.reporting.report import report
    from fedmoe_core.simulation.directory.health import problems

    path, lines = report([run_dir])
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        for line in [*lines, f"report: {path}"]:
            say(line)
    if found := problems(summary):
        fail(f"{'; '.join(found)}; {run_dir}/ledger.jsonl and metrics.jsonl have every client", 1)
