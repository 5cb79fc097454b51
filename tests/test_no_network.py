"""Invariant 12: a run touches no network unless the user names a hub model."""

import json
import subprocess
import sys

RUN = """
import sys

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise RuntimeError(f"network: {event} {args}")

sys.addaudithook(watch)
from fedmoe_core import Config, simulate
summary = simulate.run(Config.load(None, sys.argv[1:]))
print("finished", summary["rounds"])
"""
PROBE = RUN.partition("from fedmoe_core")[0] + "import socket; socket.create_connection(('127.0.0.1', 9))"
TINY = [
    *("clients=2", "rounds=1", "threads=1", "warmup.steps=3", "warmup.batch_size=2", "warmup.seq_len=16"),
    *("model_config.hidden_size=32", "model_config.heads=2", "model_config.kv_heads=1", "model_config.head_dim=16"),
    *("model_config.experts=4", "model_config.expert_width=16", "model_config.vocab_size=300"),
    *("train.batch_size=2", "train.seq_len=16", "train.local_steps=2", "eval.sequences=1", "partition=iid"),
    "budgets=unlimited",
]


def test_inv12_a_run_opens_no_connection(tmp_path):
    corpus = tmp_path / "notes.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"note {n} " * 40}) + "\n" for n in range(40)))
    where = [f"data=jsonl:{corpus}", f"out={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}"]
    done = subprocess.run([sys.executable, "-c", RUN, *where, *TINY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "finished 1" in done.stdout


def test_the_watch_itself_would_notice():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "network: socket." in done.stderr
