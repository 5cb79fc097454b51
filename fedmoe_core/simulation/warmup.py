"""The stand-in for pretraining: a short central training on the public split, cached on disk."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fedmoe_core.base.files import form_of, require_file
from fedmoe_core.base.rng import counter_seed
from fedmoe_core.client.profiling import ProfileSums
from fedmoe_core.config.run_config import Config, WarmupConfig
from fedmoe_core.data.batches import Batch, public_batches
from fedmoe_core.data.federated import FederatedData
from fedmoe_core.layer.recording import recording
from fedmoe_core.layer.router_loss import balance_loss
from fedmoe_core.messages.profile import ClientProfile
from fedmoe_core.model.adapter import ModelAdapter
from fedmoe_core.model.submodel import SubModel
from fedmoe_core.simulation.directory.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedmoe_core.simulation.directory.claim import JSON_NAME

Forms = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of each parameter


def warmup_key(**facts: object) -> str:
    """Return a short hash of everything that decides a warm-up's weights."""
    text = json.dumps({"torch": torch.__version__, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def warm_up(
    adapter: ModelAdapter, data: FederatedData, config: Config, progress: Callable[[str, int, int], None]
) -> dict[str, Tensor]:
    """Train the live model on public data alone and return its weights in global coordinates.

    Every parameter learns public text by next-token prediction. Classification then trains all of it, head included, on
    the public rows that carry a label (at most ``labels_per_class`` of each class). So the model is like a pretrained
    one that meets its task for the first time.
    """
    settings, device = config.warmup, next(adapter.model.parameters()).device
    draw = partial(public_batches, seed=config.seed, seq_len=settings.seq_len)
    adapter.configure(adapter.state(), SubModel(train_dense=True))
    text = draw(data.public.as_text(), steps=settings.steps, batch_size=settings.batch_size)
    losses = (adapter.text_loss(batch.to(device)) for batch in text)
    _fit(adapter, losses, settings, Phase("warm-up", settings.steps, settings.lr), progress)
    if data.public_labeled is not None and settings.head_steps:
        rows, train = data.public_labeled, config.train
        labeled = draw(rows, steps=settings.head_steps, batch_size=len(rows), purpose="head")
        dropping = torch.Generator().manual_seed(counter_seed(config.seed, "head dropout"))
        losses = (
            adapter.loss(batch.to(device), token_dropout=train.token_dropout, generator=dropping) for batch in labeled
        )
        _fit(adapter, losses, settings, Phase("head", settings.head_steps, settings.head_lr), progress)
    return adapter.state()


@dataclass(frozen=True)
class Phase:
    """A part of the warm-up: its name, steps and peak learning rate."""

    name: str
    steps: int
    lr: float


def _fit(
    adapter: ModelAdapter,
    losses: Iterable[Tensor],
    settings: WarmupConfig,
    phase: Phase,
    progress: Callable[[str, int, int], None],
) -> None:
    """AdamW (betas .9/.95), 20 linear warm steps, cosine to 5 % of the rate, clip 1, Switch balance loss."""
    parameters = [p for p in adapter.model.parameters() if p.requires_grad and p.numel()]
    decay = settings.weight_decay
    optimizer = torch.optim.AdamW(parameters, lr=phase.lr, betas=(0.9, 0.95), weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, phase.steps))
    for layer in adapter.moe:
        layer.with_scores = False
    with recording(adapter.moe) as tape:
        for step, loss in enumerate(losses, start=1):
            (loss + settings.balance * balance_loss(tape)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if not torch.isfinite(loss):
                raise ValueError(f"the {phase.name} diverged at step {step}; lower its learning rate from {phase.lr}")
            progress(phase.name, step, phase.steps)
    for layer in adapter.moe:
        layer.with_scores = True


def cached_warmup(
    directory: Path, key: str, train: Callable[[], dict[str, Tensor]], forms: Forms
) -> tuple[dict[str, Tensor], bool]:
    """Return the warm model under ``key``, trained by ``train`` unless cached; and whether it was cached.

    A cache entry that is damaged, of another key, or not finite tensors in ``forms`` (by parameter, shape and dtype),
    is trained again, with a warning.

    Raises:
        ValueError: a link, a pipe or a folder lies where the cache has a file, or a file where it has a folder.
        OSError: the cache cannot be written.
    """
    place = directory / f"warmup-{key}"
    if (form := form_of(place)) not in ("", "a folder") or place.is_file():
        raise ValueError(f"{place} is {form or 'a file'}, and fedmoe has a folder of its cache there; move it away")
    if place.exists():
        require_file(place / JSON_NAME)
        try:
            saved = load_checkpoint(place)
            _refuse_unlike(saved, key, forms)
            return saved.tensors, True
        except ValueError as error:
            if (place / JSON_NAME).exists():  # else a kill came before it was whole
                warnings.warn(f"the cached warm-up is made again: {error}", stacklevel=2)
    tensors = train()
    save_checkpoint(place, tensors, {"warmup": key}, {})
    return tensors, False


def _refuse_unlike(saved: Checkpoint, key: str, forms: Forms) -> None:
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in saved.tensors.items()}
    if saved.meta != {"warmup": key} or found != dict(forms):
        raise ValueError("it is of another model")
    if not all(bool(tensor.isfinite().all()) for tensor in saved.tensors.values()):
        raise ValueError("it holds NaN or infinity")


def measure_profile(
    adapter: ModelAdapter,
    params: dict[str, Tensor],
    batches: Iterable[Batch],
) -> ClientProfile:
    """Measure router statistics and importance sums of the full model over ``batches``; nothing is trained.

    The server runs it over public data: it has no budget, and its profile stands in for clients not yet heard.
    """
    adapter.configure(params, SubModel(train_dense=False))
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
