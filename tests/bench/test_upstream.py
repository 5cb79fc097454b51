"""The tests of transformers with our experts: what fails because of us is told from what fails with any experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FILE = "test_modeling_toy.py"
TOY = """
import pytest
from transformers import MixtralConfig, MixtralModel

def model(**options):
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return MixtralModel(MixtralConfig(num_key_value_heads=1, num_local_experts=2, **sizes, **options))

class ToyTest:
    pass

class TestToy:
    def test_any_experts(self):
        assert model() is not None

    def test_no_model(self):
        pass

    def test_named(self):
        assert model(experts_implementation="batched_mm").config._experts_implementation == "batched_mm"

    def test_eager_only(self):
        assert model().config._experts_implementation == "eager"

    def test_not_eager(self):
        assert model().config._experts_implementation != "eager"

    def test_never(self):
        assert model() is None

    @pytest.mark.skip(reason="slow")
    def test_slow(self):
        pass
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "tests" / "models" / "toy"
    folder.mkdir(parents=True)
    (folder / FILE).write_text(TOY)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


@pytest.mark.usefixtures("bench")
def test_what_fails_because_of_us_is_told_from_what_always_fails(checkout: Path) -> None:
    from bench.upstream.run import family_row, table

    row = family_row(checkout, "toy", workers=0)
    assert (row["passed"], row["failed"], row["skipped"]) == (4, 2, 1)
    assert row["passed_with_our_experts"] == 2, "a model that names its experts, or none at all, is not one of ours"
    place = f"tests/models/toy/{FILE}::TestToy"
    assert row["because_of_us"] == {f"{place}::test_eager_only": ["eager"]}
    assert row["fail_everywhere"] == [f"{place}::test_never"]
    assert table({"toy": row}).row_count == 2, "a line for the family and one for the sum"


@pytest.mark.usefixtures("bench")
def test_a_checkout_without_the_family_says_what_pytest_said(checkout: Path) -> None:
    from bench.upstream.run import family_row

    with pytest.raises(RuntimeError, match=r"pytest ended with 4 in .*\n(.*\n)*.*test_modeling_other\.py"):
        family_row(checkout, "other", workers=0)


@pytest.mark.usefixtures("bench")
def test_a_file_that_does_not_import_is_no_result(checkout: Path) -> None:
    from bench.upstream.run import family_row

    (checkout / "tests" / "models" / "toy" / FILE).write_text("import a_package_that_is_not_there")
    with pytest.raises(RuntimeError, match=r"cannot be collected: .*No module named 'a_package_that_is_not_there'"):
        family_row(checkout, "toy", workers=1)


@pytest.mark.usefixtures("bench")
def test_a_checkout_that_does_not_import_says_so(checkout: Path) -> None:
    from bench.upstream.run import made_with

    assert made_with(checkout)["transformers"]
    with pytest.raises(ValueError, match=r"src has no tests/models; give a clone of transformers"):
        made_with(checkout / "src")
    broken = checkout / "src" / "transformers"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('tokenizers>=99 is required')")
    with pytest.raises(ValueError, match=r"does not import \(.*tokenizers>=99 is required\); install what it needs"):
        made_with(checkout)


@pytest.mark.usefixtures("bench")
def test_what_the_guide_says_is_what_was_kept() -> None:
    from bench.common.checkout import RESULTS, ROOT
    from bench.upstream.run import FAMILIES, total

    rows = json.loads((RESULTS / "upstream-5.16.0.dev0.json").read_text())["families"]
    passed, ours, _, everywhere, because_of_us = total(rows)
    assert (rows.keys(), everywhere, because_of_us) == (set(FAMILIES), 2, 0)
    guide = " ".join((ROOT / "docs/guides/transformers.md").read_text().split())
    assert f"for {len(rows)} families" in guide
    assert f"{passed:,} tests, of which {ours:,} build models with our experts. Two need the network" in guide
