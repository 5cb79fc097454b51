"""A pytest plugin for transformers' own tests: a model that names no experts implementation gets the one asked for.

    python -m pytest -p bench.upstream.plugin --experts fedmoe tests/models/mixtral   # in a checkout of transformers

A test that names an implementation itself keeps it. Models whose experts do not run through transformers' experts
interface (Switch Transformers, DBRX, Llama 4, JetMoE) are given to ``use_fedmoe`` as soon as they are built. In the
report of each test stands how many models it made with these experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from transformers import PreTrainedModel

from fedmoe_bindings.transformers import use_fedmoe
from fedmoe_bindings.transformers.stock.experts import NAME
from fedmoe_bindings.transformers.stock.outside import OUTSIDE

OPTION = "--experts"
PROPERTY = "models_with_these_experts"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, default=NAME, help="experts implementation of every model that names none")


def pytest_configure(config: pytest.Config) -> None:
    chooser = _Chooser(config.getoption(OPTION))
    chooser.take_over()
    config.pluginmanager.register(chooser, "fedmoe-experts-chooser")


@dataclass
class _Chooser:
    name: str
    models: int = 0

    def take_over(self) -> None:
        stock: Any = PreTrainedModel.get_correct_experts_implementation

        def chosen(model: PreTrainedModel, requested: str | None) -> str:
            if requested is None and model._can_set_experts_implementation():
                self.models += 1
                requested = self.name
            return str(stock(model, requested))

        PreTrainedModel.get_correct_experts_implementation = chosen  # type: ignore[method-assign]
        built: Any = PreTrainedModel.post_init

        def replaced(model: PreTrainedModel) -> None:
            built(model)
            if any(type(module).__name__ in OUTSIDE for module in model.modules()):
                self.models += 1
                use_fedmoe(model)

        if self.name == NAME:
            PreTrainedModel.post_init = replaced  # type: ignore[method-assign]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        before = self.models
        try:
            return (yield)
        finally:
            item.user_properties.append((PROPERTY, self.models - before))
