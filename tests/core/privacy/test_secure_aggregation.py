"""The protocol over its bytes: exact sums, dropouts at every step, forged letters, and what each party refuses."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from masking import Meddle, Play, honest, losing
from msgspec import msgpack
from scipy.stats import chisquare

from fedmoe_core.privacy.secure import ciphers
from fedmoe_core.privacy.secure.ciphers import add_mask, agreed, public_of, seal, unseal
from fedmoe_core.privacy.secure.client import RefusalError
from fedmoe_core.privacy.secure.letters import (
    ADVERTISE,
    AGREE,
    MASK,
    OPEN,
    SHARE,
    Agreed,
    Letter,
    LetterError,
    Masked,
    Opened,
    Shares,
    write,
)
from fedmoe_core.privacy.secure.server import TooFewError


def test_the_sum_of_masked_vectors_is_the_plain_sum() -> None:
    play = Play()
    assert np.array_equal(play.run(), play.vectors_CN.sum(axis=0))
    assert play.server.out == {}


@pytest.mark.parametrize("steps", list(product([*range(5), 9], repeat=2)))
def test_clients_drop_out_at_every_step_and_the_others_sum_is_exact(steps: tuple[int, int]) -> None:
    """Of five clients, the second and the last drop out before any two steps; three are enough."""
    play = Play(meddle=losing({1: steps[0], 4: steps[1]}))
    assert np.array_equal(play.run(), play.expected())
    gone = {client for client, step in ((1, steps[0]), (4, steps[1])) if step <= MASK}
    assert play.server.survivors == set(range(5)) - gone


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (ADVERTISE, "only 2 of 5 clients told their keys, below the threshold of 3, so the sum stays closed"),
        (SHARE, "only 2 of 5 clients shared their secrets"),
        (MASK, "only 2 of 5 clients sent their vectors"),
        (AGREE, "only 2 of 5 clients signed the survivors"),
        (OPEN, "only 2 of 5 clients opened their shares"),
    ],
)
def test_below_the_threshold_the_sum_stays_closed(step: int, told: str) -> None:
    with pytest.raises(TooFewError) as error:
        Play(meddle=losing({0: step, 2: step, 3: step})).run()
    assert told in str(error.value)


def test_a_masked_vector_says_nothing_and_differs_in_every_run() -> None:
    """Of a vector of zeros the server sees uniform bytes; another seed, another session: other bytes."""
    found = []
    for words in (dict(), dict(seed=1), dict(session=b"q" * 32)):
        play = Play(length=20_000, **words)  # type: ignore[arg-type]
        play.vectors_CN[:] = 0
        play.until_masked()
        found.append(msgpack.decode(msgpack.decode(play.sent[MASK, 2], type=Letter).body, type=Masked).words)
    for words_ in found:
        counts = np.bincount(np.frombuffer(words_, dtype=np.uint8), minlength=256)
        assert chisquare(counts).pvalue > 1e-4
        assert len(words_) == 160_000
    assert len(set(found)) == 3
    differing = np.frombuffer(found[0], dtype=np.uint8) != np.frombuffer(found[2], dtype=np.uint8)
    assert differing.mean() > 0.99


def test_no_proper_part_of_the_masked_vectors_sums_to_plain_ones() -> None:
    play = Play(length=400)
    play.until_masked()
    words = {
        c: np.frombuffer(msgpack.decode(msgpack.decode(play.sent[MASK, c], type=Letter).body, type=Masked).words, "<i8")
        for c in range(5)
    }
    for chosen in ([0], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4]):
        masked, plain = sum(words[c] for c in chosen), play.vectors_CN[chosen].sum(axis=0)
        assert not (masked == plain).any()


def at(step: int, client: int, change: Callable[[bytes], bytes]) -> Meddle:
    return lambda s, c, letter: change(letter) if (s, c) == (step, client) and letter else letter


def flipped(letter: bytes) -> bytes:
    """One bit of the body, past the header of the letter."""
    return letter[:60] + bytes([letter[60] ^ 1]) + letter[61:]


@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (flipped, "is not signed by client 3, or was changed on its way"),
        (lambda letter: b"\xc1", "is not a letter"),
        (lambda letter: letter[:-1], "is not a letter"),
    ],
)
def test_a_changed_letter_puts_its_client_out_by_name(step: int, change: Callable[[bytes], bytes], told: str) -> None:
    play = Play(meddle=at(step, 3, change))
    assert np.array_equal(play.run(), play.expected())
    assert set(play.server.out) == {3}
    assert f"the letter of client 3 at step {step} {told}" in play.server.out[3]
    assert (3 in play.server.survivors) == (step > MASK)


@pytest.mark.parametrize("step", range(5))
def test_a_replay_a_wrong_round_and_a_wrong_signer_are_out_by_name(step: int) -> None:
    earlier = Play(session=b"e" * 32)
    earlier.run()
    genuine = Play()
    genuine.run()
    cases: list[tuple[bytes, str]] = [
        (earlier.sent[step, 3], "belongs to another round or run"),
        (genuine.sent[(step + 1) % 5, 3], f"is for step {(step + 1) % 5}, not for step {step}"),
        (genuine.sent[step, 2], "is signed by client 2"),
    ]
    forged = msgpack.decode(genuine.sent[step, 2], type=Letter)
    cases += [
        (msgpack.encode(Letter(forged.session, step, 3, forged.body, forged.signature)), "is not signed by client 3"),
        (msgpack.encode(Letter(forged.session, step, 77, forged.body, forged.signature)), "which takes no part"),
    ]
    for letter, told in cases:
        play = Play(meddle=at(step, 3, lambda _, letter=letter: letter))
        assert np.array_equal(play.run(), play.expected())
        assert told in play.server.out[3], told
        assert set(play.server.out) == {3}


def signed_by(client: int, step: int, body: object) -> Callable[[bytes], bytes]:
    """A letter that the client itself signs, with another body than the protocol asks for."""
    play = Play()
    return lambda letter: write(play.group, step, client, body, play.secrets[client])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step", "body", "told"),
    [
        (SHARE, Shares({0: b"x"}), "does not hold one share for each of the others"),
        (SHARE, Masked(b"x"), "does not hold what step 1 asks for"),
        (MASK, Masked(bytes(80)), "holds 10 words, not 40"),
        (AGREE, Agreed([0, 1]), "names other survivors"),
        (OPEN, Opened({}, {}), "does not hold the one share of each client that was asked for"),
        (OPEN, Opened({}, dict.fromkeys(range(5), b"short")), "does not hold the one share of each client"),
    ],
)
def test_a_client_that_does_not_do_its_step_is_out_by_name(step: int, body: object, told: str) -> None:
    play = Play(meddle=at(step, 3, signed_by(3, step, body)))
    assert np.array_equal(play.run(), play.expected())
    assert told in play.server.out[3]


def test_a_share_that_is_not_the_one_told_closes_the_sum_and_names_whose_it_is() -> None:
    bad = Opened({}, {client: bytes(65) + b"\x01" for client in range(5)})
    with pytest.raises(TooFewError, match="the shares of client 0 do not fit what it told first"):
        Play(meddle=at(OPEN, 0, signed_by(0, OPEN, bad))).run()


def test_a_vector_counts_once() -> None:
    play = Play()
    play.until_masked()
    before = play.server.total_N.copy()
    assert play.server.masked(1, play.sent[MASK, 1]) == "client 1 sent its vector twice; the first one counts"
    assert np.array_equal(play.server.total_N, before)


def test_a_server_that_swaps_keys_is_found_out() -> None:
    """It passes on keys of its own for client 0: no client but the owner of that identity can have signed them."""
    play, evil = Play(), Play(seed=9)
    letters = [play.clients[c].advertise() for c in range(5)]
    swapped = [evil.clients[0].advertise(), *letters[1:]]
    with pytest.raises(LetterError, match="is not signed by client 0, or was changed on its way"):
        play.clients[2].share(swapped)
    with pytest.raises(RefusalError, match="client 3 was told the keys of client 0 twice"):
        play.clients[3].share([letters[0], *letters])
    with pytest.raises(RefusalError, match="client 4 was not told its own keys"):
        play.clients[4].share(letters[:4])
    with pytest.raises(RefusalError, match="client 1 knows of 2 clients that told their keys, below threshold 3"):
        play.clients[1].share(letters[:2])


def masked_play() -> tuple[Play, list[int]]:
    play = Play()
    play.until_masked()
    return play, play.server.closed()


def test_a_server_cannot_have_both_shares_of_a_client() -> None:
    """It tells one client that the last one did not survive: none of them opens."""
    play, everyone = masked_play()
    letters = {c: play.clients[c].agree(everyone if c != 3 else everyone[:-1]) for c in everyone}
    with pytest.raises(RefusalError, match="client 0 was told other survivors than client 3"):
        play.clients[0].open(list(letters.values()))
    with pytest.raises(RefusalError, match="client 3 knows of 1 clients that signed the survivors, below threshold 3"):
        play.clients[3].open([letters[3]])


def test_a_client_answers_each_step_once_and_in_order() -> None:
    play, everyone = masked_play()
    client = play.clients[0]
    with pytest.raises(RefusalError, match="client 0 is at step 3 and does not do step 4"):
        client.open([])
    letters = [play.clients[c].agree(everyone) for c in everyone]
    client.open(letters)
    for again in (lambda: client.open(letters), lambda: client.agree(everyone[:3]), client.advertise):
        with pytest.raises(RefusalError, match="client 0 is at step 5 and does not do step"):
            again()


def test_a_client_does_not_sign_survivors_that_it_has_no_shares_of() -> None:
    play, _ = masked_play()
    with pytest.raises(RefusalError, match="client 0 was told of a vector of client 8, without shares"):
        play.clients[0].agree([0, 1, 2, 8])
    with pytest.raises(RefusalError, match="client 2 is not among the survivors, though it sent its vector"):
        play.clients[2].agree([0, 1, 3])
    with pytest.raises(RefusalError, match="client 1 knows of 2 clients that sent their vectors"):
        play.clients[1].agree([1, 2])


def test_a_sealed_share_opens_for_its_receiver_alone_and_shows_changes() -> None:
    secrets = [bytes([k]) * 32 for k in (1, 2, 3)]
    key = agreed(secrets[0], public_of(secrets[1]), b"p")
    assert key == agreed(secrets[1], public_of(secrets[0]), b"p")
    assert key != agreed(secrets[1], public_of(secrets[0]), b"q")
    sealed = seal(key, b"share", b"0 to 1")
    assert unseal(key, sealed, b"0 to 1") == b"share"
    for other, bytes_, about in (
        (agreed(secrets[0], public_of(secrets[2]), b"p"), sealed, b"0 to 1"),
        (key, sealed, b"0 to 2"),
        (key, sealed[:-1] + bytes([sealed[-1] ^ 1]), b"0 to 1"),
    ):
        with pytest.raises(ValueError, match="was changed or is for another receiver"):
            unseal(other, bytes_, about)
    with pytest.raises(ValueError):
        agreed(secrets[0], bytes(32), b"p")  # a public key that would make the result known to all


def test_a_mask_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.zeros(1000, dtype="<u8")
    add_mask(whole, b"k" * 32, minus=False)
    monkeypatch.setattr(ciphers, "CHUNK", 64)
    parts = np.zeros(1000, dtype="<u8")
    add_mask(parts, b"k" * 32, minus=False)
    assert np.array_equal(whole, parts)
    add_mask(parts, b"k" * 32, minus=True)
    assert not parts.any()
    assert honest(0, 0, b"x") == b"x"
