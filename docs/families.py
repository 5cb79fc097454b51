"""Print docs/families.md: which MoE families of the installed transformers fedmoe serves, found on tiny models of each.

python docs/families.py > docs/families.md
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

HOUSE = Path(__file__).parents[1]
sys.path[:0] = [str(HOUSE / folder) for folder in (".", "kernels", "bindings", "tests/support/models")]

import transformers  # noqa: E402
from tiny_families import FAMILIES, inputs_of, mask_of, tiny_model  # noqa: E402

from fedmoe_bindings.transformers import TransformersAdapter, use_fedmoe  # noqa: E402
from fedmoe_bindings.transformers.live.families import family_of  # noqa: E402
from fedmoe_bindings.transformers.stock.blocks import stock_blocks  # noqa: E402
from fedmoe_bindings.transformers.stock.forms import form_of  # noqa: E402

PAGE = HOUSE / "docs" / "families.md"
HEAD = """# The families that are served

Made by `python docs/families.py` with transformers {version}, on a tiny random model of every family whose experts run
through transformers' experts interface, and of four whose experts do not. The tests hold each of them to its eager
experts: logits, every gradient, bfloat16, checkpointing, generation with and without a cache, a mask against the
sub-model to the bit, files.

- **Experts**: the activation of our kernels that is the same as the module's own, found by trying it on numbers; "own"
  where none is: the module's own function then runs between two grouped products.
- **Layout**: what is not as in most families. Matrices that are transposed, or gate and up in turn, are laid out again
  at every call.
- **Mask**: `use_fedmoe(permitted=)` and `extract_submodel`.
- **Simulator**: whether the simulator runs it, on layers that hold only what a client is permitted.

Mask: {masked} of {families}. Simulator: {simulated} of {families}.

| family | experts | layout | mask | simulator |
| --- | --- | --- | --- | --- |
"""
WHY = """
## Why not

What fedmoe itself answers.

"""
TAIL = """
Of Switch Transformers the simulator trains the encoder, as a classifier. Its layers drop no token: those of
transformers drop what finds no room, in sequences longer than the capacity.

Families with experts outside that interface are refused, with what was looked for: Doge, LongCat-Flash and Step 3.7. So
is NLLB-MoE: transformers 5 itself runs its experts 0 and 1 only, whichever its router chose.
"""


def yes_or_why(act: object) -> str:
    """Run what may be refused: yes, or the refusal's own words."""
    try:
        act()  # type: ignore[operator]
        return "yes"
    except ValueError as error:
        reason, _, remedy = str(error).rpartition("; ")
        return "no: " + (reason or remedy)


def row_of(family: str) -> tuple[str, list[str]]:
    """One line of the table, and the reasons for every no in it."""
    model = tiny_model(family)
    block = stock_blocks(model)[0]
    if block.outside is None:
        form = form_of(block.experts)
        name, layout = (
            form.activation or "own",
            [
                *["ungated"] * (not form.gated),
                *["transposed"] * form.transposed,
                *["in turn"] * form.interleaved,
                *["biases"] * form.biased,
                *["norm after"] * form.normed,
            ],
        )
    else:
        use_fedmoe(model)(**inputs_of(family))
        found = [getattr(m, "_fedmoe_activation", None) for m in block.experts.modules()]
        name, layout = next(f[0] for f in found if f) or "own", [block.outside.layout]
    mask = yes_or_why(lambda: use_fedmoe(model, permitted=mask_of(model)))
    use_fedmoe(model)
    # Of a model with an encoder and a decoder the simulator takes the encoder, whose blocks are the same.
    headless = model.get_output_embeddings() is None or model.config.is_encoder_decoder
    lives = yes_or_why(lambda: family_of(block) if headless else TransformersAdapter(tiny_model(family)))
    answers = {"mask": mask, "simulator": lives}
    why = [f"- {family}, {what}: {answer[4:]}" for what, answer in answers.items() if answer != "yes"]
    cells = (family, name, ", ".join(layout), mask[:3].rstrip(":"), lives[:3].rstrip(":"))
    return f"| {' | '.join(cells)} |", why


def page() -> str:
    """The whole page."""
    found = [row_of(family) for family in FAMILIES]
    served = [[cell.strip() == "yes" for cell in row.split("|")[-3:-1]] for row, _ in found]
    masked, simulated = (sum(column) for column in zip(*served, strict=True))
    head = HEAD.format(version=transformers.__version__, families=len(found), masked=masked, simulated=simulated)
    reasons = [reason for _, why in found for reason in why]
    return head + "\n".join(row for row, _ in found) + "\n" + TAIL + WHY + "\n".join(reasons) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(page(), end="")
