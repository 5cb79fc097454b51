"""Robust rules and the quorum against a float64 restatement, in every order, in small blocks and on two ranks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from update_cases import (
    ALL,
    EXPERTS,
    LAYERS,
    Client,
    make_plan,
    make_specs,
    make_state,
    make_update,
    quantized,
    some_experts,
)

from fedmoe_core.server.accumulator import Accumulator
from fedmoe_core.server.guard import combine
from fedmoe_core.server.guard.bounds import usual_norms
from fedmoe_core.server.guard.combine import Told
from fedmoe_core.server.guard.settings import FEWEST, Guard
from fedmoe_core.server.guard.shelf import Shelf
from fedmoe_core.server.guard.votes import pack_votes, unpack_votes
from fedmoe_core.server.means import Sums, dense_mean, expert_mean, gate_mean

RULES = ("norm", "trimmed_mean", "median", "krum")
UNIT = 2.0**-36
LAST = EXPERTS - 1


def clients(count: int, *, full: bool = False, seed: int = 0) -> list[Client]:
    """Clients with different experts; the last expert of layer 1 has one voter, client 0."""
    found = []
    for client in range(count):
        mask_LE = ALL.copy() if full else some_experts(seed * 100 + client, 0.7)
        mask_LE[1, LAST] = client == 0
        plan = make_plan(mask_LE, client=client)
        found.append((make_update(plan, seed, train_dense=True), plan))
    return found


def summed(
    sent: list[Client], guard: Guard, history_RG: np.ndarray | None = None, **options: Any
) -> tuple[Accumulator, Told]:
    sums = Accumulator(make_specs(), train_dense=True, guard=guard)
    for update, plan in sent:
        outcome = sums.add(update, plan)
        assert outcome.accepted, outcome.reason
    return sums, sums.close(history_RG=history_RG, **options)


def model_of(sums: Sums, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**expert_mean(sums, state), **gate_mean(sums, state), **dense_mean(sums, state)}


def parts_of(sent: list[Client]) -> dict[tuple[str, int, int], list[tuple[float, dict[str, np.ndarray]]]]:
    """By part the voters in order: weight, and the change of each of its tensors."""
    found: dict[Any, Any] = {}
    for update, plan in sent:
        for spec in make_specs():
            if spec.key not in update.deltas:
                continue
            delta = update.deltas[spec.key].double().numpy()
            if spec.kind == "dense":
                rows, weights = {0: delta}, {0: update.sample_weight}
            else:
                weight_LE = update.expert_weight_LE if spec.kind == "expert" else update.router_weight_LE
                experts = np.flatnonzero(plan.trainable_LE[spec.layer])
                rows = dict(zip(experts.tolist(), delta, strict=True))
                weights = {e: weight_LE[spec.layer, e] for e in rows}
            for row, change in rows.items():
                if weights[row] > 0:
                    voters = found.setdefault((spec.kind, spec.layer, row), {})
                    voters.setdefault(update.client, (quantized(weights[row]), {}))[1][spec.key] = change
    return {part: list(voters.values()) for part, voters in found.items()}


def norm(change: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum((values**2).sum() for values in change.values())))


def restated(sent: list[Client], guard: Guard) -> dict[str, np.ndarray]:
    """The mean change of every tensor under the guard, in float64 and from the words of the rules alone."""
    parts = parts_of(sent)
    usual = {}
    for kind, layer in {(kind, layer) for kind, layer, _ in parts}:
        medians = []
        for update, _ in sent:
            own = [
                norm(change)
                for part, voters in parts_of([c for c in sent if c[0] is update]).items()
                if part[:2] == (kind, layer)
                for _, change in voters
            ]
            medians += [np.median(own)] if own else []
        usual[kind, layer] = np.median(medians) if len(medians) >= 3 else np.inf
    means = {spec.key: np.zeros(spec.shape) for spec in make_specs()}
    for (kind, layer, row), voters in parts.items():
        limit = guard.factor * usual[kind, layer]
        bounded = []
        for weight, change in voters:
            shrink = min(1.0, limit / norm(change))
            bounded.append((weight, {key: values * shrink for key, values in change.items()}))
        few = len(voters) < FEWEST[guard.rule]
        if few and guard.few == "keep":
            continue
        hostile = guard.hostile_of(len(voters))
        if guard.rule == "krum" and not few:
            flat = np.array([np.concatenate([v.ravel() for v in change.values()]) for _, change in bounded])
            far = ((flat[:, None] - flat) ** 2).sum(axis=2)
            scores = [np.sort(np.delete(row, n))[: len(flat) - hostile - 2].sum() for n, row in enumerate(far)]
            bounded = [bounded[n] for n in sorted(np.argsort(scores, kind="stable")[: len(flat) - hostile])]
        for key in bounded[0][1]:
            values = np.array([change[key] for _, change in bounded])
            if guard.rule in ("norm", "krum") or few:
                mean = np.average(values, axis=0, weights=[weight for weight, _ in bounded])
            elif guard.rule == "median":
                mean = np.median(values, axis=0)
            else:
                mean = np.sort(values, axis=0)[hostile : len(values) - hostile].mean(axis=0)
            means[key][row if kind != "dense" else ...] = mean
    return means


@pytest.mark.parametrize("few", ["bounded", "keep"])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_what_its_words_say(rule: Any, few: Any) -> None:
    guard = Guard(rule=rule, few=few, hostile=0.3, factor=1.2)  # 1.2: some of the norms are bounded
    sent = clients(9)
    sums, told = summed(sent, guard)
    zero = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in make_state().items()}
    found, expected = model_of(sums.sums(), zero), restated(sent, guard)
    for key, mean in expected.items():
        np.testing.assert_allclose(found[key].numpy(), mean, atol=4 * UNIT, err_msg=key)
    assert sum(told.bounded.values()) > 0
    assert (told.few > 0) == (rule != "norm")
    assert bool(told.left_out) == (rule == "krum")


@pytest.mark.parametrize("rule", RULES)
def test_inv10_order_blocks_and_ranks_change_no_bit(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    guard, sent = Guard(rule=rule, factor=1.2), clients(7)
    sums, told = summed(sent, guard)
    expected = sums.flatten()
    for order in itertools.islice(itertools.permutations(sent), 1, 5000, 977):
        again, told_again = summed(list(order), guard)
        assert torch.equal(again.flatten(), expected)
        assert (told_again.bounded, told_again.left_out, told_again.few) == (told.bounded, told.left_out, told.few)
    monkeypatch.setattr(combine, "BLOCK", 13)
    again, _ = summed(sent, guard)
    # Distances are summed block by block, so krum's may differ in the last bit, and so in nothing here.
    assert torch.equal(again.flatten(), expected)
    monkeypatch.undo()

    ranks = [Accumulator(make_specs(), train_dense=True, guard=guard) for _ in range(2)]
    for number, (update, plan) in enumerate(sent):
        assert ranks[number % 3 == 0].add(update, plan).accepted
    meet(ranks)
    for rank in ranks:
        assert torch.equal(rank.flatten(), expected)


def meet(ranks: list[Accumulator]) -> None:
    """What ``all_reduce`` and ``close`` do among processes, among threads."""
    header = ranks[0]._header
    both = ranks[0].flatten()[:header] + ranks[1].flatten()[:header]
    barrier, said = Barrier(2), [torch.zeros(0)] * 2

    def close(rank: int) -> None:
        def gather(values: Tensor) -> list[Tensor]:
            said[rank] = values
            barrier.wait(60)
            found = list(said)
            barrier.wait(60)
            return found

        ranks[rank]._flat[:header] = both
        ranks[rank].close(gather=gather)

    threads = [Thread(target=close, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("rule", ["trimmed_mean", "median", "krum"])
def test_a_minority_of_hostile_clients_stays_within_the_honest_ones(rule: Any) -> None:
    """Two of nine send the largest numbers that the checks let pass, with the largest weights."""
    honest = clients(7, full=True)
    bad = []
    for client in (7, 8):
        plan = make_plan(ALL, client=client)
        update = make_update(plan, train_dense=True, expert_weight_LE=1.0 * ALL, router_weight_LE=1.0 * ALL)
        bad.append((replace(update, deltas={k: torch.ones_like(v) for k, v in update.deltas.items()}), plan))
    zero = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in make_state().items()}
    sums, told = summed([*honest, *bad], Guard(rule=rule, hostile=0.25, factor=1e6))
    plain, _ = summed([*honest, *bad], Guard())
    found, moved = model_of(sums.sums(), zero), model_of(plain.sums(), zero)
    largest = max(float(delta.abs().max()) for update, _ in honest for delta in update.deltas.values())
    for key in zero:
        rows = slice(None) if not key.startswith("moe.1") else slice(0, LAST)  # the last one has three voters
        assert float(found[key][rows].abs().max() if found[key].dim() else found[key].abs()) <= largest + UNIT, key
        assert float(moved[key].abs().max()) > 2 * largest, key
    if rule == "krum":
        assert set(told.left_out) >= {7, 8}
        assert min(told.left_out[client] for client in (7, 8)) == 2 * LAYERS * EXPERTS + 1 - 2


def test_the_norm_bound_bears_a_lone_voter_of_an_expert() -> None:
    """The last expert of layer 1 has one voter, and that one sends the largest numbers: it moves as its layer does."""
    sent = clients(6, full=True)
    update, plan = sent[0]
    loud = {key: torch.ones_like(v) if key.startswith("moe.1.w") else v for key, v in update.deltas.items()}
    sums, told = summed([(replace(update, deltas=loud), plan), *sent[1:]], Guard(rule="norm", factor=2.0))
    assert told.bounded == {0: EXPERTS}
    zero = {key: torch.zeros_like(tensor, dtype=torch.float64) for key, tensor in make_state().items()}
    found = expert_mean(sums.sums(), zero)
    moved = norm({key: found[key][LAST].numpy() for key in ("moe.1.w_in", "moe.1.w_out")})
    others = [
        norm(change) for u in sent[1:] for p, v in parts_of([u]).items() if p[:2] == ("expert", 1) for _, change in v
    ]
    assert moved == pytest.approx(2 * np.median(others), rel=0.1)


def test_the_usual_norm_is_a_running_median_in_which_a_client_counts_once() -> None:
    sums, told = summed(clients(5), Guard(rule="norm"))
    assert told.history_RG is not None
    assert told.history_RG.shape == (1, 2 * LAYERS + 1)
    assert sums._shelf is not None
    votes = sums._shelf.votes
    own = [np.median(v.expert_norm_LE[0][v.expert_LE[0] > 0]) for v in votes]
    assert told.history_RG[0, 0] == pytest.approx(np.median(own), rel=1e-12)
    old_RG = np.array([[10.0] * 5, [20.0] * 5, [30.0] * 5])
    usual_G, history_RG = usual_norms(votes, old_RG, LAYERS)
    assert usual_G[0] == pytest.approx(15.0)  # the median of 10, 20, 30 and one below 1
    assert len(history_RG) == 4
    _, longer_RG = usual_norms(votes, np.full((5, 5), 7.0), LAYERS)
    assert longer_RG.shape == (5, 5)
    # Two clients say nothing: the history does, and without one nothing is bounded.
    assert usual_norms(votes[:2], old_RG, LAYERS)[0].tolist() == [20.0] * 5
    assert np.isinf(usual_norms(votes[:2], None, LAYERS)[0]).all()


def test_a_part_below_the_quorum_keeps_its_bits_and_the_others_are_untouched() -> None:
    sent, state = clients(6), make_state()
    plain, _ = summed(sent, Guard())
    sums, told = summed(sent, Guard(quorum=4))
    found, before = model_of(sums.sums(), state), model_of(plain.sums(), state)
    counts = {
        kind: sum((w > 0).astype(int) for w in tables)
        for kind, tables in (
            ("expert", [u.expert_weight_LE for u, _ in sent]),
            ("router", [u.router_weight_LE for u, _ in sent]),
        )
    }
    held = 0
    for spec in make_specs():
        if spec.kind == "dense":
            assert torch.equal(found[spec.key], before[spec.key])
            continue
        for expert in range(EXPERTS):
            voters = counts[spec.kind][spec.layer, expert]
            expected = state if 0 < voters < 4 else before
            assert torch.equal(found[spec.key][expert], expected[spec.key][expert]), (spec.key, expert)
    held = sum(int(((table > 0) & (table < 4)).sum()) for table in counts.values())
    assert told.below_quorum == held > 0


def test_a_quorum_above_all_voters_keeps_the_whole_model() -> None:
    state = make_state()
    sums, _ = summed(clients(3), Guard(quorum=4))
    assert all(torch.equal(new, state[key]) for key, new in model_of(sums.sums(), state).items())


def test_a_stale_share_counts_under_every_rule() -> None:
    sent, zero = clients(5, full=True), {k: torch.zeros_like(t, dtype=torch.float64) for k, t in make_state().items()}
    for rule in RULES:
        models = []
        for share in (1.0, 0.5):
            sums = Accumulator(make_specs(), train_dense=True, guard=Guard(rule=rule))  # type: ignore[arg-type]
            for update, plan in sent:
                assert sums.add(update, plan, share=share).accepted
            sums.close()
            models.append(model_of(sums.sums(), zero))
        for key, whole in models[0].items():
            torch.testing.assert_close(models[1][key], whole / 2, atol=4 * UNIT, rtol=0)


def test_half_precision_deltas_are_kept_exactly() -> None:
    plan = make_plan(ALL)
    update = make_update(plan, dtype=torch.bfloat16)
    specs = make_specs(torch.bfloat16)
    shelf = Shelf(specs, Accumulator(specs).settings)
    shelf.put(update, plan, 1.0)
    spec = next(spec for spec in specs if spec.key == "moe.1.w_out")
    read = shelf.read(0, spec, (3, 1, 5), 1.0)
    expected = update.deltas[spec.key][3].flatten()[1:5].double() * 2**36
    assert read.tolist() == expected.tolist()


def test_votes_travel_bit_for_bit() -> None:
    sums, _ = summed(clients(3), Guard(rule="norm"))
    assert sums._shelf is not None
    votes = sums._shelf.votes
    back = unpack_votes(pack_votes(votes), LAYERS, EXPERTS, len(make_specs()))
    for mine, theirs in zip(votes, back, strict=True):
        for name, value in vars(mine).items():
            assert np.array_equal(value, getattr(theirs, name)), name
    assert unpack_votes(pack_votes([]), LAYERS, EXPERTS, 9) == []


def test_sums_under_a_guard_are_not_given_out_before_it_was_applied() -> None:
    sums = Accumulator(make_specs(), guard=Guard(quorum=2))
    with pytest.raises(ValueError, match=r"call close\(\) first"):
        sums.sums()
    with pytest.raises(ValueError, match="needs all updates in one accumulator"):
        Accumulator(make_specs(), guard=Guard(rule="krum")).merge(Accumulator(make_specs(), guard=Guard(rule="krum")))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (dict(rule="bulyan"), "rule 'bulyan' is unknown"),
        (dict(few="drop"), "few 'drop' is unknown"),
        (dict(quorum=0), "quorum = 0 is below 1"),
        (dict(hostile=0.5), "hostile = 0.5 is not above 0 and below 0.5"),
        (dict(hostile=0.0), "hostile = 0 is not above 0"),
        (dict(factor=0.5), "factor = 0.5 is below 1"),
        (dict(factor=float("inf")), "factor = inf"),
    ],
)
def test_a_guard_that_cannot_be_is_refused(words: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Guard(**words)
