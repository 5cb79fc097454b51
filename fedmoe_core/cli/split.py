"""``fedmoe split``: a dense checkpoint becomes a Mixture of Experts, and what that costs is measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmoe_core.base.say import say

if TYPE_CHECKING:
    from fedmoe_core.simulation.worlds.dense import SplitReport

Dense = Annotated[
    str,
    typer.Argument(metavar="DENSE", help="smollm2, or a Llama, Mistral, Qwen2 or Qwen3: a directory or owner/name."),
]
Into = Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make; any transformers program loads it.")]
Experts = Annotated[int, typer.Option(min=2, help="Experts of each split layer.")]
TopK = Annotated[int, typer.Option("--top-k", min=1, help="Experts that each token is sent to.")]
Layers = Annotated[str, typer.Option(help="Layers to split: last:N, or all.")]
Text = Annotated[str, typer.Option(help="Text to fit the routers on and to measure by, as data= of a run.")]
Tokens = Annotated[int, typer.Option(min=256, help="Tokens to fit on; half as many are held out to measure.")]
DEFAULT_EXPERTS, DEFAULT_TOP_K, DEFAULT_LAYERS, DEFAULT_TEXT, DEFAULT_TOKENS = 16, 4, "last:4", "stdlib", 8192


def run(dense: str, out: Path, *, experts: int, top_k: int, layers: str, text: str, tokens: int) -> SplitReport:
    """Split ``dense`` into ``out`` and measure it.

    Raises:
        ValueError, OSError: what was given cannot be read, split or written.
    """
    from fedmoe_core.base.files import ensure_writable
    from fedmoe_core.base.rng import counter_rng
    from fedmoe_core.config.run_config import Config, is_dense
    from fedmoe_core.data.corpus import PIECE_CHARS
    from fedmoe_core.data.federated import load_corpus
    from fedmoe_core.data.tokenizing import encode_corpus, pretrained_tokenizer
    from fedmoe_core.simulation.prepare import cache_directory
    from fedmoe_core.simulation.worlds.dense import find_splitter, fit_tokens

    if out.exists():
        raise ValueError(f"{out} exists; give a directory that is not there yet, or remove it")
    ensure_writable(out.absolute().parent)
    name = dense if is_dense(dense) else f"dense:{dense}"
    words = [f"model={name}", f"split.experts={experts}", f"split.top_k={top_k}", f"split.layers={layers}"]
    config = Config.load(overrides=[*words, f"split.tokens={tokens}"]).resolved()
    splitter = find_splitter(config.adapter)
    say(f"opening {dense}", err=True)
    folder = splitter.folder(config.model, cache_directory(config))
    corpus = load_corpus(text)
    if len(corpus.texts) < 2:
        raise ValueError(
            f"{text} is one piece of text, and some must be held out; give more than {PIECE_CHARS} characters"
        )
    order_P = counter_rng(0, "text of a split").permutation(len(corpus.texts))
    held_P, fit_P = order_P[: len(order_P) // 3 or 1], order_P[len(order_P) // 3 or 1 :]
    tokenizer = pretrained_tokenizer(str(folder))
    say(f"encoding {text}", err=True)
    _, encoded = encode_corpus(
        corpus.texts,
        fit_P,
        kind="model",
        vocab_size=tokenizer.vocab_size,
        corpus_sha256=corpus.sha256,
        pretrained=tokenizer,
        cache=cache_directory(config),
    )
    fit_SN, held_SN = fit_tokens(encoded.take(fit_P), tokens), fit_tokens(encoded.take(held_P), tokens // 2)
    where = "every layer" if layers == "all" else f"the last {layers.partition(':')[2]} layers"
    fitted = f"fitting routers on {fit_SN.numel():,} tokens"
    say(f"splitting {where} into {experts} experts each, and {fitted}", err=True)
    splitter.split(folder, out, config.split, fit_SN)
    say(f"measuring on {held_SN.numel():,} other tokens", err=True)
    return splitter.measure(folder, out, fit_SN, held_SN)


def show(report: SplitReport, out: Path, *, as_json: bool) -> None:
    """Print what a split came to, as lines or as JSON."""
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
        return
    few, all_of = f"{report.top_k} of {report.experts} experts", f"all {report.experts} experts"
    say(f"{report.dense} -> {report.moe} in {out}: layers {report.layers[0]} to {report.layers[-1]}")
    say(f"{all_of}, equal weights: no logit differs by more than {report.difference:.1e} from the dense model's")
    rows = [
        ("dense model", report.dense_loss),
        (f"{all_of}, by the routers", report.all_loss),
        (few, report.few_loss),
        (f"{few}, split at random", report.random_loss),
    ]
    say(f"loss on {report.held_out:,} held-out tokens, nats")
    for name, loss in rows:
        say(f"  {name:<32} {loss:.3f}" + (f"  (+{loss - report.dense_loss:.3f})" if name != "dense model" else ""))
