"""Train two rounds, take one client's own model out, and let transformers alone answer a prompt with it."""

import tempfile
from pathlib import Path

from transformers import pipeline

from fedmoe_core import Config, simulate
from fedmoe_core.exporting.export import Order, export, told
from fedmoe_core.simulation.observer import NullObserver

folder = Path(tempfile.mkdtemp())
config = Config.load(
    overrides=[
        "algorithm=hfedmoe_plus",
        "clients=4",
        "rounds=2",
        "budgets=experts=25%;experts=100%",
        "eval.personal=true",
        "model_config.hidden_size=64",
        "model_config.experts=8",
        "warmup.steps=60",
        "train.local_steps=4",
        "threads=2",
        f"out={folder / 'run'}",
    ]
)
simulate.run(config, observer=NullObserver())

# Client 0 may hold a quarter of the experts; every layer gets as many, as servers of models ask for.
done = export(folder / "run", folder / "client-0", Order(client=0, equal_experts=True))
for line in told(done):
    print(line)

answer = pipeline("text-generation", model=str(folder / "client-0"))
print(answer("def main(", max_new_tokens=12, do_sample=False)[0]["generated_text"])
