"""Models on fedmoe under torch.compile and torch.export: one graph, the same numbers, and no compiling twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from stock_models import batch_of, relative, stock_loss, stock_model
from tiny_families import inputs_of, mask_of, tiny_model
from torch import Tensor, nn
from transformers import CompileConfig

from fedmoe_bindings.transformers import extract_submodel, use_fedmoe


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def ready(family: str, *, masked: bool) -> Any:
    """A model on fedmoe that has run once: its layers were compared with eager, and activations are known."""
    model = tiny_model(family)
    use_fedmoe(model, permitted=mask_of(model) if masked else None)
    model(**inputs_of(family))
    return model


def gradients(model: Any, call: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of ``call``, and the gradients that a random upstream gives the parameters of ``model``."""
    model.zero_grad()
    logits = call(**inputs).logits
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Plain SwiGLU, with a dense layer beside it, and experts that are transposed with biases, of another gate, or without.
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "gemma4", "nemotron_h", "deepseek_v4"])
def test_a_model_is_one_graph_with_the_same_gradients(family: str, masked: bool) -> None:
    if masked and family == "deepseek_v4":
        pytest.skip("its first layers choose experts by token ids, so it takes no mask")
    model, inputs = ready(family, masked=masked), inputs_of(family)
    logits, want = gradients(model, model, inputs)
    found, grads = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    assert relative(found, logits) < 1e-5
    assert any("experts" in name for name in want)
    # AOT autograd gives zeros where eager gives nothing, such as to DeepSeek-V4's compressor on few tokens.
    assert grads.keys() >= want.keys()
    assert not any(grads[name].any() for name in grads.keys() - want.keys())
    largest = max(float(grad.norm()) for grad in want.values())
    for name, grad in want.items():
        # Some gradients are nothing but rounding, such as that of a bias that softmax cannot see.
        assert float((grads[name] - grad).norm()) < 1e-5 * max(float(grad.norm()), 1e-3 * largest), name


def test_a_model_that_never_ran_compiles_as_well() -> None:
    """Its activation is found when it is put on fedmoe, and the comparison with eager waits for an eager call."""
    model, inputs = use_fedmoe(tiny_model("gpt_oss")), inputs_of("gpt_oss")
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits
    torch.testing.assert_close(found, use_fedmoe(model)(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_inductor_gives_the_same_numbers_under_a_mask() -> None:
    """One block; a whole model takes inductor a minute on two cores."""
    model = use_fedmoe(stock_model("mixtral"), permitted=torch.arange(6) < 4)
    stock_loss(model, batch_of())
    block, x = model.model.layers[0].mlp, torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    found = torch.compile(block, fullgraph=True)(x)
    want = block(x)
    assert relative(found, want) < 1e-5
    for parameter in block.parameters():
        got, expected = (torch.autograd.grad(y.square().sum(), parameter, retain_graph=True)[0] for y in (found, want))
        assert relative(got, expected) < 1e-5


def compiled_generation(model: Any, ids: Tensor, backend: str | Callable[..., Any]) -> Tensor:
    """Write up to 14 tokens with a static cache; transformers compiles the steps after the first, here on a CPU too."""
    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    config._compile_all_devices = True
    ask = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_length": 14}
    return model.generate(ids, cache_implementation="static", compile_config=config, **ask)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_compiled_generation_is_one_graph_and_a_shorter_prompt_compiles_nothing(masked: bool) -> None:
    model, ids = ready("mixtral", masked=masked), inputs_of("mixtral")["input_ids"][:1]
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    for length in (9, 9, 5, 3):
        want = model.generate(ids[:, :length], do_sample=False, pad_token_id=0, eos_token_id=None, max_length=14)
        assert torch.equal(compiled_generation(model, ids[:, :length], count), want)
    assert len(graphs) == 1
    assert any("moe_mlp" in target for target in graphs[0])


class Logits(nn.Module):
    """Token ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


@pytest.mark.parametrize(("family", "masked"), [("mixtral", False), ("mixtral", True), ("gpt_oss", False)])
def test_an_exported_program_serves_other_shapes(family: str, masked: bool) -> None:
    model, ids = Logits(ready(family, masked=masked)), inputs_of(family)["input_ids"]
    sizes = {"ids": {0: torch.export.Dim("sequences"), 1: torch.export.Dim("tokens")}}
    with torch.no_grad():
        program = torch.export.export(model, (ids,), dynamic_shapes=sizes, strict=False)
    assert any(str(node.target).startswith("fedmoe.moe_mlp") for node in program.graph.nodes)
    other = ids[:, :6].repeat(2, 1)
    torch.testing.assert_close(program.module()(other), model(other), rtol=1e-5, atol=1e-5)


def test_a_mask_is_lifted_from_a_compiled_model() -> None:
    model, inputs = ready("qwen3_moe", masked=True), inputs_of("qwen3_moe")
    call = torch.compile(model, fullgraph=True, backend="eager")
    small = use_fedmoe(extract_submodel(model, mask_of(model)))
    assert torch.equal(call(**inputs).logits, small(**inputs).logits)
    use_fedmoe(model)
    want = model(**inputs).logits
    assert torch.equal(call(**inputs).logits, want)
    assert not torch.equal(want, small(**inputs).logits)
