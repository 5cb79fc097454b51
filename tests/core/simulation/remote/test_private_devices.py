"""Differential privacy on real devices: sums are clipped and noised by a secret that no device and no file tells."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from near import Near
from tiny_corpus import make_config

from fedmoe_core.config.run_config import Config
from fedmoe_core.messages.plan import ExpertPlan
from fedmoe_core.messages.result import LocalResult
from fedmoe_core.messages.update import ClientUpdate
from fedmoe_core.privacy import chance
from fedmoe_core.privacy.account import Account
from fedmoe_core.privacy.central import Central
from fedmoe_core.privacy.chance import Secret
from fedmoe_core.privacy.clipping import sensitivity
from fedmoe_core.privacy.discrete_gaussian import discrete_gaussian
from fedmoe_core.privacy.stream import Stream
from fedmoe_core.server.means import Sums
from fedmoe_core.simulation.observer import NullObserver
from fedmoe_core.simulation.remote import node
from fedmoe_core.simulation.remote.exchange import FailedReply, Kind
from fedmoe_core.simulation.remote.federation import found_remote
from fedmoe_core.simulation.remote.words import Words
from fedmoe_core.simulation.run import resume, run

KEY, OTHER = bytes(range(7, 39)), bytes(range(107, 139))
PRIVATE = ("train.timeout=60", "privacy.clip=0.05", "privacy.noise=1", "privacy.delta=1e-3", "clients_per_round=3")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("private-devices")


class Listening(Near):
    """Keeps every message to a device, and who got a task in which order."""

    def __init__(self, *words: Words, lost: tuple[int, int] = (-1, -1)) -> None:
        super().__init__(*words, spoil=lambda client, turn, answer: None if (client, turn) == lost else answer)
        self.messages: list[bytes] = []
        self.asked: list[list[int]] = []

    def send(
        self, kind: Kind, messages: Iterable[tuple[int, bytes]], seconds: float
    ) -> Iterator[tuple[int, bytes | FailedReply]]:
        heard = list(messages)
        self.messages += [message for _, message in heard]
        if kind == "train":
            self.asked.append(sorted(self.devices[address].client for address, _ in heard))
        yield from super().send(kind, heard, seconds)


def deployed(config: Config, near: Near | None = None) -> dict[str, Any]:
    near = near or Listening(*map(Words, range(config.clients)))
    return run(config, observer=NullObserver(), founder=found_remote(near, wait=60))


def with_key(key: bytes, patched: pytest.MonkeyPatch) -> None:
    patched.setattr(chance.secrets, "token_bytes", lambda count: key[:count])


@dataclass
class Seen:
    """What the server had in its hands: updates as they came, and sums before and after the noise, round by round."""

    updates: list[tuple[ClientUpdate, ExpertPlan]] = field(default_factory=list)
    sums: list[tuple[int, Sums, Sums]] = field(default_factory=list)

    @classmethod
    def of(cls, patched: pytest.MonkeyPatch) -> Seen:
        seen, share, released = cls(), Central.share, Central.released

        def heard(private: Central, update: ClientUpdate, plan: ExpertPlan, specs: Any) -> float:
            seen.updates.append((update, plan))
            return share(private, update, plan, specs)

        def told(private: Central, sums: Sums, round: int) -> Sums:
            after = released(private, sums, round)
            seen.sums.append((round, sums, after))
            return after

        patched.setattr(Central, "share", heard)
        patched.setattr(Central, "released", told)
        return seen


def flat(sums: Sums) -> np.ndarray:
    return np.concatenate([sums.numerators[spec.key].flatten().numpy() for spec in sums.specs])


def part_of(update: ClientUpdate, plan: ExpertPlan, sums: Sums, clip: float) -> np.ndarray:
    """What one client adds, at weight 1 wherever it has any and clipped to the bound, in units of the sums; float64."""
    parts = []
    for spec in sums.specs:
        whole = torch.zeros(spec.shape, dtype=torch.float64)
        if (delta := update.deltas.get(spec.key)) is not None:
            weight_LE = update.expert_weight_LE if spec.kind == "expert" else update.router_weight_LE
            rows = np.flatnonzero(plan.trainable_LE[spec.layer])
            votes = torch.tensor(weight_LE[spec.layer][rows] > 0, dtype=torch.float64)
            whole[rows] = delta.double() * votes.view(-1, *[1] * (delta.ndim - 1))
        parts.append(whole.flatten().numpy())
    vector = np.concatenate(parts)
    norm = np.linalg.norm(vector)
    return vector * min(1.0, clip / norm if norm else 1.0) * 2.0**sums.settings.scale_bits


def noise_by_hand(key: bytes, round: int, sums: Sums, sigma: int) -> np.ndarray:
    """The noise of one round from the first key: keys in a row, then a stream for each tensor."""
    for _ in range(round):
        key = Secret._derived(key, "next")
    drawn = []
    for place, spec in enumerate(sums.specs):
        stream = Stream(Secret._derived(key, "draw", "privacy-noise", place))
        drawn.append(discrete_gaussian(sigma, sums.numerators[spec.key].numel(), stream))
    return np.concatenate(drawn)


def test_the_sums_are_clipped_updates_and_the_noise_of_the_secret_whoever_fails(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, shared)(*PRIVATE, "rounds=4")
    with_key(KEY, monkeypatch)
    seen, near = Seen.of(monkeypatch), Listening(*map(Words, range(4)), lost=(1, 2))
    summary = deployed(config, near)
    private = Central.of(replace(config, privacy=replace(config.privacy, secret=True)), Secret(0, KEY))
    assert private is not None
    drawn = [private.sample(round, range(4)) for round in range(4)]
    assert near.asked == [clients for clients in drawn if clients]  # who is not drawn hears nothing
    assert len({len(clients) for clients in drawn}) > 1
    assert summary["refused_updates"] == 1
    lost = [round for round, clients in enumerate(drawn) if 1 in clients][1]
    assert [round for round, _, _ in seen.sums] == [0, 1, 2, 3]
    clipped = 0
    for round, before, after in seen.sums:
        mine = [(update, plan) for update, plan in seen.updates if plan.round == round and update.status == "ok"]
        assert sorted(update.client for update, _ in mine) == [c for c in drawn[round] if (c, round) != (1, lost)]
        parts = [part_of(update, plan, before, private.clip) for update, plan in mine]
        norms = [np.linalg.norm(part) for part in parts]
        most = sensitivity(before.settings, private.clip)
        clipped += sum(norm > 0.999 * most for norm in norms)
        # By hand in float64, without the margin for rounding: half a unit a client and number, and a millionth.
        error = np.abs(flat(before) - sum(parts, np.zeros(len(flat(before)))))
        assert error.max() <= 2e-6 * most + 0.5 * len(parts) + 1
        assert np.array_equal(flat(after) - flat(before), noise_by_hand(KEY, round, before, private.sigma))
    assert clipped > 0


def test_inv10_the_secret_gives_the_same_bits_after_a_kill_and_another_secret_gives_others(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = make_config(tmp_path, shared)

    class KillError(BaseException):
        pass

    class Killer(NullObserver):
        def on_client(self, round: int, client: int, record: object) -> None:
            if round == 3:
                raise KillError

    with monkeypatch.context() as patched:
        with_key(KEY, patched)
        whole = deployed(make(*PRIVATE, "rounds=4", out_name="whole"))
        killed, near = make(*PRIVATE, "rounds=4", out_name="killed"), Listening(*map(Words, range(4)))
        with pytest.raises(KillError):
            run(killed, observer=Killer(), founder=found_remote(near, wait=60))
        with_key(OTHER, patched)
        other = deployed(make(*PRIVATE, "rounds=4", out_name="other"))
    out = Path(killed.out)
    held = json.loads((out / "secret.json").read_text())
    assert held == {"round": 2, "key": Secret(0, KEY).at(2).key.hex()}
    shutil.copytree(out, tmp_path / "copy")
    near = Listening(*map(Words, range(4)))
    resumed = resume(out, observer=NullObserver(), founder=found_remote(near, wait=60))
    assert resumed["model_hash"] == whole["model_hash"] != other["model_hash"]
    assert (resumed["epsilon"], resumed["stopped"]) == (whole["epsilon"], "")
    # An older checkpoint beside the newer secret: its rounds would be played twice under one noise.
    shutil.rmtree(out / "checkpoint")
    shutil.copytree(tmp_path / "copy" / "checkpoint", out / "checkpoint")
    with pytest.raises(ValueError, match="an older checkpoint was put back"):
        resume(out, observer=NullObserver(), founder=found_remote(Listening(), wait=60))
    (tmp_path / "copy" / "secret.json").unlink()
    with pytest.raises(ValueError, match=r"secret\.json is missing"):
        resume(tmp_path / "copy", observer=NullObserver(), founder=found_remote(Listening(), wait=60))


def test_runs_of_one_configuration_and_seed_have_secrets_of_their_own(shared: Path, tmp_path: Path) -> None:
    make = make_config(tmp_path, shared)
    hashes = {deployed(make(*PRIVATE, "rounds=1", out_name=f"run-{n}"))["model_hash"] for n in range(2)}
    assert len(hashes) == 2


def test_no_message_and_no_other_file_holds_what_noise_follows_from(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, shared)(*PRIVATE, "rounds=3")
    with_key(KEY, monkeypatch)
    near, everything = Listening(*map(Words, range(4))), list[bytes]()

    class Looking(NullObserver):
        def on_client(self, round: int, client: int, record: object) -> None:
            look()

    def look() -> None:
        files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "secret.json"]
        everything.extend(path.read_bytes() for path in files)

    run(config, observer=Looking(), founder=found_remote(near, wait=60))
    look()
    assert len(near.messages) > 6
    keys = [Secret(0, KEY).at(round).key for round in range(4)]
    keys += [Secret._derived(key, "draw", "sample-each") for key in keys]
    keys += [Secret._derived(key, "draw", "privacy-noise", place) for key in keys[:4] for place in range(20)]
    forms = [f for key in keys for f in (key, key.hex().encode(), key.hex().upper().encode(), base64.b64encode(key))]
    forms += [repr(key).encode() for key in keys]
    for text in [*near.messages, *everything]:
        assert not any(form in text for form in forms)
    held = (Path(config.out) / "secret.json").read_bytes()
    assert keys[3].hex().encode() in held
    assert not any(key.hex().encode() in held for key in keys[:3])  # a thief of the file cannot take off past noise
    assert (Path(config.out) / "secret.json").stat().st_mode & 0o777 == 0o600


def test_an_update_that_is_too_long_is_scaled_down_and_not_refused(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train.timeout=60", "privacy.clip=0.05", "rounds=1")  # no noise, so that the sums can be seen
    config, sound = make_config(tmp_path, shared)(*words), node.local_round

    def boasting(adapter: Any, params: Any, plan: ExpertPlan, **how: Any) -> Any:
        result = sound(adapter, params, plan, **how)
        assert isinstance(result, LocalResult)
        factor = 30.0 if plan.client == 2 else 1.0
        return replace(result, deltas={key: factor * delta for key, delta in result.deltas.items()})

    with monkeypatch.context() as patched:
        patched.setattr(node, "local_round", boasting)
        seen = Seen.of(patched)
        summary = deployed(config)
    assert summary["refused_updates"] == 0
    (_, before, _), most = seen.sums[0], sensitivity(seen.sums[0][1].settings, 0.05)
    others = sum(part_of(update, plan, before, 0.05) for update, plan in seen.updates if update.client != 2)
    [long] = [update for update, _ in seen.updates if update.client == 2]
    assert np.linalg.norm(np.concatenate([delta.flatten() for delta in long.deltas.values()])) > 20 * 0.05
    added = np.linalg.norm(flat(before) - others)
    assert 0.99 * most < added <= 1.001 * most


def test_a_spent_epsilon_ends_the_deployment_and_no_device_is_asked_again(shared: Path, tmp_path: Path) -> None:
    account = Account(0.75, 1.0, 1e-3)
    limit = (account.epsilon(2) + account.epsilon(3)) / 2
    config = make_config(tmp_path, shared)(*PRIVATE, "rounds=5", f"privacy.epsilon={limit}")
    near = Listening(*map(Words, range(4)))
    summary = deployed(config, near)
    assert (summary["rounds"], summary["epsilon"]) == (2, account.epsilon(2))
    assert "so the run ends after round 2 of 5" in summary["stopped"]
    asked = list(near.asked)
    assert len(asked) <= 2
    found = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    assert [line["epsilon"] for line in found if line["type"] == "round" and line["round"]] == [
        account.epsilon(1),
        account.epsilon(2),
    ]
    again = resume(Path(config.out), observer=NullObserver(), founder=found_remote(near, wait=60))
    assert again["model_hash"] == summary["model_hash"]
    assert near.asked == asked
