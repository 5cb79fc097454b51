"""Export a run's model: read back, judged again, written as others load it, with a card and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from fedmoe_core.algorithms.base import algorithm_class
from fedmoe_core.base import show
from fedmoe_core.base.files import write_whole
from fedmoe_core.config.run_config import Config, is_dense
from fedmoe_core.data.batches import Batch, eval_batches
from fedmoe_core.exporting.card import Sheet, card, facts_of
from fedmoe_core.exporting.judged import (
    Opened,
    equal_experts,
    loss_now,
    opened,
    own_plan,
    read_config,
    refuse_client,
    require_judged,
)
from fedmoe_core.exporting.notes import choices, named_base, notes_of, of_format, prior_of
from fedmoe_core.exporting.place import placing, refuse_place, write_marker
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.model.submodel import WHOLE
from fedmoe_core.model.writer import ModelWriter, Wording
from fedmoe_core.simulation.observer import NullObserver, Observer
from fedmoe_core.simulation.prepare import cache_directory
from fedmoe_core.simulation.worlds.dense import find_splitter

Format = Literal["hf", "peft"]
FORMATS = ("hf", "peft")
CARD = "README.md"
BASE = "base"  # the folder of the model under an adapter, where others could not find it
TRIED = 4  # sequences on which the written model has to answer as the judged one


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the directory.
        sheet: what its card says.
        bytes: of all its files.
        recorded: held-out loss of that model on record; None where the run did not judge it.
    """

    path: Path
    sheet: Sheet
    bytes: int
    recorded: float | None


@dataclass(frozen=True)
class Order:
    """What is asked for.

    Attributes:
        format: "hf", a model of transformers, or "peft", adapters.
        client: whose own model; None = the global one.
        equal_experts: give every layer as many experts, which servers of models ask for.
    """

    format: Format = "hf"
    client: int | None = None
    equal_experts: bool = False


def export(
    run_dir: Path, out: Path, order: Order = Order(), *, force: bool = False, observer: Observer | None = None
) -> Exported:
    """Write a run's model into ``out``, for everyone who has transformers, or peft, and no fedmoe.

    The run is read back from its last checkpoint, its data and its model, which have to be those it was trained on. The
    model is judged again and has to have the held-out loss that is on record.

    Args:
        run_dir: of a run, finished or not.
        out: made; it must not be there, be empty, or with ``force`` be an export.
        order: what to write.
        force: replace an export.
        observer: told of each stage; None = silence.

    Raises:
        ValueError, OSError: one sentence that names the offender and the remedy; ``out`` is as it was.
    """
    refuse_place(out, force=force)
    config = read_config(run_dir)
    refuse_client(config, order.client)
    _refuse_form(config, order)
    observer = observer or NullObserver()
    warm = order.client is not None or order.format == "peft"
    with opened(run_dir, config, observer, warm=warm) as found:
        if not hasattr(found.world.adapter, "write_model"):
            raise ValueError(f"adapter={config.adapter!r} cannot write models; keep {run_dir}/checkpoint")
        observer.on_stage("judging the model again")
        plan, loss, notes = _judged(found, order)
        with placing(out, force=force) as folder:
            observer.on_stage(f"writing {out}")
            base = ""
            if order.format == "peft":
                base = _write_adapter(found, folder, out)
            else:
                _write_model(found, folder, plan)
            spec = found.world.adapter.spec
            sheet = Sheet(
                client=order.client,
                format=order.format,
                folder=out.name or str(out),
                kept_LE=found.world.population.every_LE if plan is None else plan.served_LE,
                top_k=spec.top_k if plan is None else choices(plan),
                loss=loss,
                notes=(*notes, *of_format(found, order.format, named=named_base(config.model))),
                base=base,
            )
            write_whole(folder / CARD, card(found, sheet))
            write_marker(folder, {**facts_of(found, sheet), **prior_of(found, order.client)})
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        return Exported(out, sheet, size, found.recorded(order.client))


def _refuse_form(config: Config, order: Order) -> None:
    """Refuse what no file of the format can hold, by the system's name."""
    form, name = algorithm_class(config.algorithm), config.algorithm
    if order.format not in FORMATS:
        raise ValueError(f"format {order.format!r} is unknown; choose {' or '.join(FORMATS)}")
    if form.graft(config) is not None:
        raise ValueError(
            f"algorithm={name!r} grafts a mixture beside every block, and no model of transformers has such blocks; "
            "its tensors are in the run's checkpoint"
        )
    if order.format == "hf":
        return
    lora = form.lora(config)
    if order.equal_experts:
        raise ValueError("--equal-experts is for models, and an adapter has the experts of its base; leave it out")
    if lora is None or not lora.in_state:
        raise ValueError(
            f"algorithm={name!r} of this run has no adapters in its global model; use --format hf, or train with "
            "train.experts=lora"
        )
    if order.client is not None:
        raise ValueError(
            f"a run keeps the adapters of its global model, and none of client {order.client}'s own; use --format hf, "
            "which merges those that it runs with, or --client global"
        )
    if config.train.trunk != "frozen" and form.trains_trunk:
        raise ValueError("the run has trained its trunk too, which no adapter holds; use --format hf")


def _judged(found: Opened, order: Order) -> tuple[ExpertPlan | None, float, list[str]]:
    """Return the plan of the model to write (None = the global one), its held-out loss, and what to say of it."""
    client, notes = order.client, list[str]()
    plan = None if client is None else own_plan(found, client)
    loss = loss_now(found, plan)
    require_judged(found, client, loss)
    if plan is not None:
        plan, loss = _equal(found, plan, loss, notes, asked=order.equal_experts)
    return plan, loss, [*notes, *notes_of(found, plan)]


def _equal(found: Opened, plan: ExpertPlan, loss: float, notes: list[str], *, asked: bool) -> tuple[ExpertPlan, float]:
    """Give every layer as many experts where that is asked for and is not so; or refuse."""
    counts = plan.served_LE.sum(axis=1)
    if counts.min() == counts.max():
        return plan, loss
    if not asked:
        told = ", ".join(map(str, counts))
        raise ValueError(
            f"client {plan.client} holds {told} experts in its layers, and a model of transformers has one number for "
            "all; add --equal-experts"
        )
    equal = equal_experts(plan, np.asarray(found.world.algorithm.scores(found.state)[plan.client]))
    after = loss_now(found, equal)
    gone, new = (plan.permitted_LE & ~equal.permitted_LE).sum(), (equal.permitted_LE & ~plan.permitted_LE).sum()
    each = show.plural(int(equal.permitted_LE[0].sum()), "expert")
    notes.append(
        f"Every layer has {each} instead of {counts.min()} to {counts.max()}: left out {gone} of the client's (lowest "
        f"score), took in {new} of the global model's (highest score); held-out loss {loss:.4f} -> {after:.4f}."
    )
    return equal, after


def _write_model(found: Opened, folder: Path, plan: ExpertPlan | None) -> None:
    submodel = WHOLE if plan is None else plan.submodel(train_dense=False)
    writer = cast(ModelWriter, found.world.adapter)
    batch = _batch(found, 0 if plan is None else plan.client)
    writer.write_model(found.state.params, submodel, folder, wording=_wording(found), batch=batch)


def _write_adapter(found: Opened, folder: Path, out: Path) -> str:
    """Write the adapter, and the model under it where that has no name that others know; return where that is."""
    config, writer = found.world.config, cast(ModelWriter, found.world.adapter)
    if found.world.data.task == "classification":
        raise ValueError("the run has trained a classifier's head too, which no adapter holds; use --format hf")
    base = config.model
    if not named_base(base):
        base = str(Path(out).absolute() / BASE)
        (folder / BASE).mkdir()
        writer.write_model(found.world.params, WHOLE, folder / BASE, wording=_wording(found), batch=_batch(found, 0))
    writer.write_adapter(found.state.params, found.world.params, folder, wording=_wording(found), base=base)
    return base


def _wording(found: Opened) -> Wording:
    config = found.world.config
    place = config.model
    if is_dense(place):  # the files of the model that was split; the small one has none, and a directory is its own
        place = str(find_splitter(config.adapter).folder(place, cache_directory(config)))
    return Wording(found.world.data.tokenizer, place)


def _batch(found: Opened, client: int) -> Batch:
    """The first held-out sequences of a client, on the model's device."""
    test, seq_len = found.world.data.clients[client].test, found.world.config.train.seq_len
    batches = eval_batches(test, batch_size=TRIED, seq_len=seq_len, sequences=TRIED)
    return next(iter(batches)).to(found.world.ranks.device)


def told(done: Exported) -> list[str]:
    """Return the lines that the command prints."""
    sheet = done.sheet
    whole = sheet.kept_LE.shape[1]
    counts = sheet.counts_L
    each = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    recorded = "not on record" if done.recorded is None else f"on record {done.recorded:.4f}"
    return [
        f"{sheet.whose}: {each} of {whole} experts a layer, {sheet.top_k} a token, held-out loss {sheet.loss:.4f} "
        f"({recorded})",
        *sheet.notes,
        f"wrote {done.path}: {show.size(done.bytes)}",
    ]
