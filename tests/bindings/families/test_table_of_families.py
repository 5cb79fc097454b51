"""The table of families in the docs: it says of the simulator what the tests find, and the README has its sums."""

import re
from pathlib import Path

from tiny_families import FAMILIES, NOT_SIMULATED

HOUSE = Path(__file__).parents[3]
PAGE = (HOUSE / "docs" / "families.md").read_text()
# The whole model is refused; its encoder alone runs, which is what the table counts.
ENCODERS = {"switch_transformers"}


def test_every_no_of_the_simulator_has_the_reason_that_it_gives() -> None:
    rows = {row[0]: row[1:] for row in re.findall(r"^\| (\w+) \|.*\| (\w+) \| (\w+) \|$", PAGE, re.MULTILINE)}
    assert rows.keys() - {"family"} == set(FAMILIES)
    assert {family for family in FAMILIES if rows[family][1] == "no"} == NOT_SIMULATED.keys() - ENCODERS
    reasons = dict(re.findall(r"^- (\w+), simulator: (.*)$", PAGE, re.MULTILINE))
    assert reasons.keys() == NOT_SIMULATED.keys() - ENCODERS
    for family, reason in reasons.items():
        assert NOT_SIMULATED[family] in reason, family


def test_the_sums_are_those_of_the_rows_and_the_readme_has_them() -> None:
    rows = re.findall(r"^\| (\w+) \|.*\| (yes|no) \| (yes|no) \|$", PAGE, re.MULTILINE)
    masks, simulated = (sum(row[cell] == "yes" for row in rows) for cell in (1, 2))
    assert f"Mask: {masks} of {len(rows)}. Simulator: {simulated} of {len(rows)}." in PAGE
    said = f"{len(rows)}, of these {masks} with masks and sub-models; the simulator runs {simulated};"
    assert said in (HOUSE / "README.md").read_text()
