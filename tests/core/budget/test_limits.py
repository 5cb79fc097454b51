"""Budgets as text, as limits and as device profiles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_core.budget.devices import DEVICES, GIB, MIB, Device, find_device
from fedmoe_core.budget.limits import Budget, Cost, device_budget, show

AMOUNTS = st.none() | st.integers(0, 10**15)
BUDGETS = st.builds(
    Budget,
    memory_bytes=AMOUNTS,
    flops=st.none() | st.floats(0, 1e30),
    bytes_down=AMOUNTS,
    bytes_up=AMOUNTS,
    experts=st.none() | st.integers(0, 10**4),
)
COSTS = st.builds(
    Cost,
    memory_bytes=st.integers(0, 10**15),
    flops=st.floats(0, 1e30),
    bytes_down=st.integers(0, 10**15),
    bytes_up=st.integers(0, 10**15),
    experts=st.integers(0, 10**4),
)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("experts=25%", Budget(experts=8)),
        ("experts=8", Budget(experts=8)),
        ("experts=10%", Budget(experts=3)),  # 3.2 of 32: a limit is rounded down
        ("experts=29%", Budget(experts=9)),  # 9.28; 0.29 * 32 is exact here, unlike in floats
        ("memory=40MiB", Budget(memory_bytes=40 * MIB)),
        ("memory=1.5GiB", Budget(memory_bytes=3 * GIB // 2)),
        ("memory=40mib, down=2MB,up = 1 MB,flops=3e12", Budget(40 * MIB, 3e12, 2_000_000, 1_000_000)),
        ("flops=2TFLOP", Budget(flops=2e12)),
        ("up=1000", Budget(bytes_up=1000)),
        ("unlimited", Budget()),
    ],
)
def test_parse_reads_every_form(text: str, budget: Budget) -> None:
    assert Budget.parse(text, spec_experts=32) == budget
    assert Budget.parse(text, spec_experts=32).name == text


def test_parse_reads_profiles_and_lets_limits_replace_theirs() -> None:
    jetson = Budget.parse("jetson-agx-xavier-12gb")
    assert jetson.memory_bytes == 12 * GIB
    tight = Budget.parse("jetson-agx-xavier-12gb,memory=1GiB,experts=4")
    assert (tight.memory_bytes, tight.experts, tight.bytes_down) == (GIB, 4, jetson.bytes_down)
    assert tight != jetson


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("memry=40MiB", ("'memry'", "'memory'")),
        ("memory=40MiBs", ("'MiBs'", "'MiB'")),
        ("memory=lots", ("'lots'", "memory=40MiB")),
        ("memory=-3MiB", ("'-3MiB'",)),
        ("experts=8MiB", ("'MiB'",)),
        ("experts=", ("''", "experts=25%")),
        ("flops=3MB", ("'MB'",)),
        ("jetson-agx-xavier-12", ("'jetson-agx-xavier-12gb'",)),
        ("expert", ("'experts='",)),
        ("up=1MB,up=2MB", ("up is given twice",)),
        ("experts=8,tiny-24mib", ("'tiny-24mib'",)),  # a profile comes first, so that limits replace its own
        ("", ("neither a device profile",)),
    ],
)
def test_parse_names_the_offender_and_the_nearest_valid_word(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        Budget.parse(text, spec_experts=32)
    for word in (repr(text), *words):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


HUGE = (
    "1e999999999",
    "1e-999999999",
    "0e999999999",
    "1e9999999999999999999999",
    "1e400",
    "9" * 5000,
    f"0.{'0' * 5000}1",
)


@pytest.mark.parametrize("word", ["memory", "down", "up", "flops", "experts"])
@pytest.mark.parametrize(
    "amount", [*HUGE, "1e400", "1e30", "-1", "-inf", "inf", "nan", "1_000", "0x10", "1e"], ids=lambda a: a[:9]
)
def test_an_amount_that_no_device_has_is_refused_at_once_and_in_a_sentence(word: str, amount: str) -> None:
    """1e30 bytes ended in an OverflowError of a solver, and 1e999999999 hung the reader."""
    if (word, amount) == ("flops", "1e30"):
        assert Budget.parse("flops=1e30") == Budget(flops=1e30)  # operations are floats: large, and still a limit
        return
    with pytest.raises(
        ValueError, match=r"^budget '.*(is not an amount of|is not a unit of|is more than|is too long a number for) "
    ) as error:
        Budget.parse(f"{word}={amount}", spec_experts=32)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 6000


@pytest.mark.parametrize("word", ["memory", "down", "up", "flops", "experts"])
def test_nothing_at_all_is_a_limit(word: str) -> None:
    """That nothing fits it, the plan says; as a limit it can be read, and shown."""
    budget = Budget.parse(f"{word}=0")
    assert Budget.parse(str(budget)) == budget != Budget()
    assert budget.violations(Cost(1, 1.0, 1, 1, 1))


def test_more_than_all_experts_are_all() -> None:
    asked: list[int] = []

    def plain(count: int) -> Cost:
        asked.append(count)
        return Cost(memory_bytes=count)

    assert Budget.parse("experts=300%,memory=1e30%", spec_experts=32, plain=plain) == Budget(32, experts=32)
    assert asked == [32]


def test_parse_refuses_a_share_of_an_unknown_number() -> None:
    with pytest.raises(ValueError, match="once the model is known"):
        Budget.parse("experts=25%")


def test_a_share_of_bytes_is_what_a_plain_client_with_that_share_of_experts_needs() -> None:
    asked: list[int] = []

    def plain(count: int) -> Cost:
        asked.append(count)
        return Cost(memory_bytes=100 + count, bytes_down=10 * count, bytes_up=count, experts=count)

    budget = Budget.parse("memory=12.5%,down=29%,up=1kB,experts=50%", spec_experts=32, plain=plain)
    assert budget == Budget(memory_bytes=104, bytes_down=90, bytes_up=1000, experts=16)
    assert asked == [4, 9]
    assert Budget.parse(str(budget)) == budget  # what is saved needs no model to be a share of
    with pytest.raises(ValueError, match="once the model is known"):
        Budget.parse("memory=25%", spec_experts=32)
    with pytest.raises(ValueError, match="not a unit of flops"):  # top-k runs as many rows whatever is held
        Budget.parse("flops=25%", spec_experts=32, plain=plain)


@pytest.mark.parametrize(
    "limit", [-1, float("nan"), float("inf"), 10**400, -(10**400)], ids=["-1", "nan", "inf", "huge", "-huge"]
)
@pytest.mark.parametrize("field", ["memory_bytes", "flops", "bytes_down", "bytes_up", "experts"])
def test_budget_refuses_what_is_no_limit(field: str, limit: float) -> None:
    with pytest.raises(ValueError, match="not a limit"):
        Budget(**{field: limit})  # type: ignore[arg-type]


@given(BUDGETS)
def test_text_round_trip(budget: Budget) -> None:
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_profiles_round_trip_and_give_their_sources(device: Device) -> None:
    budget = Budget.parse(device.name)
    assert str(budget) == device.name
    assert Budget.parse(str(budget)) == budget == device_budget(device)
    assert 0 < budget.memory_bytes <= device.memory_bytes
    assert device.source
    assert device.assumed
    assert find_device(device.name) is device
    changed = Budget.parse(f"{device.name},memory=1MiB")
    assert Budget.parse(str(changed)) == changed


@given(BUDGETS, COSTS)
def test_inv1_violations_are_exactly_the_limits_passed(budget: Budget, cost: Cost) -> None:
    pairs = {
        "memory": (cost.memory_bytes, budget.memory_bytes),
        "down": (cost.bytes_down, budget.bytes_down),
        "up": (cost.bytes_up, budget.bytes_up),
        "flops": (cost.flops, budget.flops),
        "experts": (cost.experts, budget.experts),
    }
    expected = {word for word, (used, allowed) in pairs.items() if allowed is not None and used > allowed}
    lines = budget.violations(cost)
    assert {line.partition(":")[0] for line in lines} == expected
    assert budget.fits(cost) == (not expected)


def test_violations_show_amounts_that_round_alike_apart() -> None:
    (line,) = Budget(memory_bytes=40 * MIB).violations(Cost(memory_bytes=40 * MIB + 1))
    assert line == "memory: 40.1 MiB (41943041 B) used, 40.0 MiB (41943040 B) allowed"


def test_violations_show_flops_that_round_alike_apart() -> None:
    (line,) = Budget(flops=1.2341e12).violations(Cost(flops=1.2342e12))
    assert line == "flops: 1.24e+12 (1234200000000.0) used, 1.24e+12 (1234100000000.0) allowed"


def test_inv1_a_cost_that_is_not_a_number_does_not_fit() -> None:
    assert not Budget(flops=1e12).fits(Cost(flops=float("nan")))


@given(st.integers(1, 10**14))
def test_amounts_shown_to_people_are_never_too_small(amount: int) -> None:
    assert Budget.parse(f"memory={show('memory', amount)}").memory_bytes >= amount
    assert Budget.parse(f"flops={show('flops', amount)}").flops >= amount
