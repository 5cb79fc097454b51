"""Tokenizers trained on public text only, and the corpus encoded once and kept on disk."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fedmoe_core.base.files import replacing, require_file
from fedmoe_core.base.wording import unknown
from fedmoe_core.data.batches import Encoded
from fedmoe_core.data.conversations import Conversation, Part, parts_of

END = "<|end|>"
UNKNOWN = "<|unk|>"
DEFAULT_VOCAB = {"bpe": 2048, "bpe-lower": 4096, "word": 8000}
_FORMAT = 3  # of the cache file; part of its key
TENSORS = ("tokens_N", "offsets_P1")  # of the cache file
ANSWERS = "answers_N"  # of the cache file of conversations, beside TENSORS
_TEMPLATE = 1  # how `parts_of` writes conversations; part of their key

Kind = Literal["bpe", "bpe-lower", "word", "model"]  # "model": a pretrained model's own


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A trained tokenizer; ``end_id`` is the one token that both ends a piece and fills padding."""

    kind: Kind
    model: Tokenizer
    end: str = END

    @property
    def vocab_size(self) -> int:
        """Ids in use; may be below what was asked for when the public text is short."""
        return self.model.get_vocab_size()

    @property
    def end_id(self) -> int:
        found = self.model.token_to_id(self.end)
        assert found is not None  # checked where the tokenizer was made
        return found

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text into ids, without the end token."""
        return [encoding.ids for encoding in self.model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def to_json(self) -> str:
        return self.model.to_str()


def from_json(kind: Kind, text: str, end: str = END) -> TextTokenizer:
    """Rebuild the tokenizer that ``TextTokenizer.to_json`` wrote."""
    return _plain(kind, Tokenizer.from_str(text), end)


def pretrained_tokenizer(name: str) -> TextTokenizer:
    """Read a pretrained model's tokenizer: ``tokenizer.json`` and the end token of ``tokenizer_config.json``.

    Args:
        name: a directory, or a hub id (then the two small files are fetched, unless HF_HUB_OFFLINE is set).

    Raises:
        ValueError: the model brings no fast tokenizer, or none that names its end token.
        OSError: the files cannot be read or fetched.
    """
    folder = Path(name)
    paths = [folder / file for file in ("tokenizer.json", "tokenizer_config.json")]
    if not folder.is_dir():
        if name.count("/") != 1:
            raise ValueError(
                f"model {name!r} is not 'tiny', 'smollm2', dense:DIR, a directory that exists, or a hub id owner/name"
            )
        try:
            paths = [Path(hf_hub_download(name, path.name)) for path in paths]
        except OSError as error:
            raise OSError(f"the tokenizer of {name!r} cannot be fetched; check the name and the network") from error
    if not paths[0].is_file():
        raise ValueError(f"model {name!r} has no tokenizer.json; save its fast tokenizer next to it")
    model = Tokenizer.from_file(str(paths[0]))
    settings = json.loads(paths[1].read_text(encoding="utf-8")) if paths[1].is_file() else {}
    end = settings.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if not end or model.token_to_id(end) is None:
        raise ValueError(f"model {name!r} names no end token; set eos_token in its tokenizer_config.json")
    return _plain("model", model, end)


def train_tokenizer(kind: Kind, texts: Sequence[str], vocab_size: int) -> TextTokenizer:
    """Train on ``texts``, which must be public.

    ``bpe``: byte-level BPE (GPT-2's byte alphabet and splitting rule), lossless on any text. ``bpe-lower``: the same on
    lower-cased text, for short corpora where a capital should not make another word. ``word``: the most frequent
    lower-case words and numbers, the rest ``<|unk|>``; punctuation is dropped.

    Raises:
        ValueError: ``vocab_size`` is below the alphabet's 257 (BPE) or 3 (``word``).
    """
    least = 3 if kind == "word" else 257
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size} is too small for a {kind} tokenizer; use at least {least}")
    if kind != "word":
        model = Tokenizer(models.BPE())
        if kind == "bpe-lower":
            model.normalizer = normalizers.Lowercase()
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer: trainers.Trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
    else:
        model = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        model.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        model.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+(?:'\w+)?"), behavior="removed", invert=True)
        trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=[END, UNKNOWN], show_progress=False)
    model.train_from_iterator(texts, trainer)
    return _plain(kind, model)


def encode_corpus(
    texts: Sequence[str],
    public_P: np.ndarray,
    *,
    kind: Kind,
    vocab_size: int,
    corpus_sha256: str,
    pretrained: TextTokenizer | None = None,
    cache: Path | None = None,
    conversations: Sequence[Conversation] | None = None,
) -> tuple[TextTokenizer, Encoded]:
    """Train the tokenizer on ``texts[public_P]``, or take ``pretrained``; encode every text, an end token after each.

    With ``cache`` the result is one safetensors file there, with the tokenizer's JSON in its metadata. Its name is the
    sha256 of the corpus and of everything else that decides it. It is written to a temporary file and renamed. A
    damaged file is made again, with a warning.

    Of ``conversations`` every part is encoded by itself, so that a token belongs to an answer or does not, and the end
    token stands after each answer. Text that spells it stays text, so that no content can end an answer.

    Returns:
        The tokenizer, and all P texts encoded, without labels, with ``answers_N`` where they are conversations.

    Raises:
        ValueError: unknown ``kind`` or too small a ``vocab_size``.
            A link, a pipe or a folder lies where the file should.
        OSError: the cache folder cannot be written.
    """
    if pretrained is not None:
        kind, vocab_size = pretrained.kind, pretrained.vocab_size
    elif kind not in DEFAULT_VOCAB:
        raise unknown(f"tokenizer {kind!r}", kind, ("auto", *DEFAULT_VOCAB))
    settings: dict[str, Any] = {
        "format": _FORMAT,
        "corpus": corpus_sha256,
        "public": sha256(np.asarray(public_P, dtype=np.int64).tobytes()).hexdigest(),
        "pieces": len(texts),
        "kind": kind,
        "vocab_size": vocab_size,
        "tokenizers": tokenizers.__version__,
        "pretrained": None if pretrained is None else sha256(pretrained.to_json().encode()).hexdigest(),
        "end": END if pretrained is None else pretrained.end,
    }
    if conversations is not None:
        settings["conversations"] = _TEMPLATE
    names = TENSORS if conversations is None else (*TENSORS, ANSWERS)
    key = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    path = None if cache is None else cache / f"encoded-{key[:32]}.safetensors"
    if path is not None and (found := _read(path, names, (kind, key, settings["end"]))) is not None:
        return found
    tokenizer = pretrained or train_tokenizer(kind, [texts[row] for row in public_P], vocab_size)
    end, answers = tokenizer.end_id, None
    if conversations is None:
        ids = tokenizer.encode(texts)
    else:
        ids, answers = _encode_parts(tokenizer, [list(parts_of(turns)) for turns in conversations])
    offsets_P1 = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(piece) + 1 for piece in ids], out=offsets_P1[1:])
    tokens_N = np.full(offsets_P1[-1], end, dtype=np.int32)
    for piece, start in zip(ids, offsets_P1, strict=False):
        tokens_N[start : start + len(piece)] = piece
    answers_N = None if answers is None else torch.tensor([each for piece in answers for each in piece])
    encoded = Encoded(torch.from_numpy(tokens_N), torch.from_numpy(offsets_P1), end, answers_N=answers_N)
    if path is not None:
        metadata = {"key": key, "settings": json.dumps(settings), "tokenizer": tokenizer.to_json()}
        tensors = [getattr(encoded, name) for name in names]
        metadata["content"] = _content_digest(tensors, metadata["tokenizer"])
        _write(path, dict(zip(names, tensors, strict=True)), metadata)
    return tokenizer, encoded


def _encode_parts(
    tokenizer: TextTokenizer, conversations: Sequence[Sequence[Part]]
) -> tuple[list[list[int]], list[list[bool]]]:
    """Ids of each conversation but its last end token, and which of them, that one too, are of an answer."""
    each = iter(tokenizer.encode([part.text for parts in conversations for part in parts]))
    ids: list[list[int]] = []
    answers: list[list[bool]] = []
    for parts in conversations:
        piece: list[int] = []
        learnt: list[bool] = []
        for part in parts:
            found = next(each) + [tokenizer.end_id] * part.answer
            piece += found
            learnt += [part.answer] * len(found)
        if parts[-1].answer:
            piece.pop()  # the end of the last answer is that of the piece
        else:
            learnt.append(False)
        ids.append(piece)
        answers.append(learnt)
    return ids, answers


def _plain(kind: Kind, model: Tokenizer, end: str = END) -> TextTokenizer:
    # Text that happens to spell "<|end|>" must not become the end token: a client could forge piece borders.
    model.encode_special_tokens = True
    return TextTokenizer(kind, model, end)


def _read(path: Path, names: Sequence[str], expected: tuple[Kind, str, str]) -> tuple[TextTokenizer, Encoded] | None:
    """Return the cached result; None where it is missing, and with a warning where it is damaged or foreign."""
    kind, key, end = expected
    require_file(path)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Cloned: a tensor of the file is a window onto it. What becomes of the file later would change the corpus,
            # or end the process (SIGBUS) where the file gets shorter.
            text, tensors = metadata.get("tokenizer", ""), [file.get_tensor(name).clone() for name in names]
    except SafetensorError as error:
        _warn(path, str(error))
        return None
    # The digest first: what it covers is what was written, and only that is parsed.
    if metadata.get("key") != key or metadata.get("content") != _content_digest(tensors, text):
        _warn(path, "its content is not what was written")
        return None
    tokenizer = from_json(kind, text, end)
    found = dict(zip(names, tensors, strict=True))
    return tokenizer, Encoded(found["tokens_N"], found["offsets_P1"], tokenizer.end_id, answers_N=found.get(ANSWERS))


def _warn(path: Path, why: str) -> None:
    """Say that a file of the cache is made again, for nothing but time is lost by that."""
    warnings.warn(f"{path} is damaged ({why:.80}); the corpus is encoded again", stacklevel=2)


def _content_digest(tensors: Sequence[torch.Tensor], tokenizer: str) -> str:
    """Sha256 (hex) of what a cache file gives: a disk that lost bytes would else change results without a word."""
    digest = sha256(tokenizer.encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file(tensors, partial, metadata=metadata)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise OSError(
            f"cache folder {path.parent} cannot be written ({reason or error}); free space or set cache=FOLDER"
        ) from None
