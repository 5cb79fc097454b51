"""Make nf4.safetensors: what bitsandbytes stores of weights drawn at random, and what it decodes them to.

What is decoded is by the library's generic code. Where 64 does not divide a row, its kernel for CPUs gives other values
(0.50.2 with AVX-512, rows of 96: up to 29 % off), which are farther from what was stored.

Run it with bitsandbytes on the path (0.50.2 made the file): python tests/bindings/quantized/make_nf4.py
"""

from pathlib import Path

import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from safetensors.torch import save_file

SHAPES = {"aligned": (2, 6, 128), "straddling": (3, 96), "odd": (4, 40)}

if __name__ == "__main__":
    torch.manual_seed(0)
    tensors = {}
    for name, shape in SHAPES.items():
        for nested in (False, True):
            weight = torch.randn(shape)
            packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=nested)
            key = f"{name}.{'nested' if nested else 'single'}"
            tensors |= {f"{key}.{part}": value.clone() for part, value in state.as_dict(packed=True).items()}
            absmax = state.absmax
            if nested:
                absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
            code = state.code.float()
            decoded = _dequantize_4bit_compute(packed.flatten(), absmax.float(), code, 64, shape, torch.float32)
            tensors |= {key: packed, f"decoded.{key}": decoded, f"drawn.{key}": weight}
    save_file(tensors, str(Path(__file__).with_name("nf4.safetensors")))
