"""The stand-in for pretraining: a short central training on the public split, cached on disk."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fedmoe_core.adapter import ModelAdapter
from fedmoe_core.balance import balance_loss
from fedmoe_core.batch import Batch, public_batches
from fedmoe_core.checkpoint import load_checkpoint, save_checkpoint
from fedmoe_core.client import ProfileSums
from fedmoe_core.config import Config
from fedmoe_core.data import FederatedData
from fedmoe_core.update import ClientProfile

RECIPE = 1  # raise it when this file changes what a warm-up gives, so that old caches are not read


def warmup_key(**facts: object) -> str:
    """A short hash of everything that decides a warm-up's weights."""
    text = json.dumps({"recipe": RECIPE, "torch": torch.__version__, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def warm_up(
    adapter: ModelAdapter, data: FederatedData, config: Config, progress: Callable[[str, int, int], None]
) -> dict[str, Tensor]:
    """Train the live model on public data alone and return its weights in global coordinates.

    Language modelling: every parameter, on public text. Classification: the same on the public rows that carry a label
    (at most ``labels_per_class`` of each class), head included.
    """
    settings = config.warmup
    adapter.configure(adapter.state(), train_dense=True)
    draw = partial(public_batches, seed=config.seed, batch_size=settings.batch_size, seq_len=settings.seq_len)
    _fit(adapter, draw(data.public.as_text(), steps=settings.steps), config, partial(progress, "warm-up"))
    return adapter.state()


def _fit(adapter: ModelAdapter, batches: Iterable[Batch], config: Config, progress: Callable[[int, int], None]) -> None:
    """AdamW (betas .9/.95), 20 linear warm steps, cosine to 5 % of the rate, clip 1, Switch balance loss."""
    settings = config.warmup
    parameters = [p for p in adapter.model.parameters() if p.requires_grad and p.numel()]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings.steps))
    for layer in adapter.moe:
        layer.keep_logits, layer.with_scores = True, False
    device = parameters[0].device
    for step, batch in enumerate(batches, start=1):
        loss = adapter.loss(batch.to(device))
        (loss + settings.balance * balance_loss(adapter.moe)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if not torch.isfinite(loss):
            raise ValueError(f"the warm-up diverged at step {step}; lower warmup.lr from {settings.lr}")
        progress(step, settings.steps)
    for layer in adapter.moe:
        layer.keep_logits, layer.with_scores = False, True


def cached_warmup(directory: Path, key: str, train: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], bool]:
    """The warm model under ``key``, trained by ``train`` unless the cache holds it; and whether the cache did.

    A cache entry that cannot be read is trained again rather than trusted.
    """
    place = directory / f"warmup-{key}"
    if place.exists():
        try:
            return load_checkpoint(place).tensors, True
        except ValueError:
            pass
    tensors = train()
    save_checkpoint(place, tensors, {"warmup": key}, {})
    return tensors, False


def measure_profile(adapter: ModelAdapter, params: dict[str, Tensor], batches: Iterable[Batch]) -> ClientProfile:
    """Router statistics and importance sums of the full model over ``batches``; nothing is trained.

    The server runs it over public data: it has no budget, and its profile stands in for clients not yet heard.
    """
    adapter.configure(params, train_dense=False)
    sums = ProfileSums(adapter)
    device = next(adapter.model.parameters()).device
    for batch in batches:
        adapter.loss(batch.to(device)).backward()
        adapter.model.zero_grad(set_to_none=True)
        sums.add_batch()
    return sums.finish()


def _rate(step: int, steps: int) -> float:
    """Learning-rate factor: 20 linear warm steps, then cosine to 5 %."""
    if step < 20:
        return (step + 1) / 20
    done = (step - 20) / max(1, steps - 20)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
