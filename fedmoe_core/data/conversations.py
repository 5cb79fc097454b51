"""Conversations: their turns, how they are written as text, and which part of it is an answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

ROLES = ("system", "user", "assistant")
ANSWERING = "assistant"


class Turn(NamedTuple):
    """What one side said."""

    role: str  # one of ROLES
    content: str


class Part(NamedTuple):
    """A stretch of a conversation's text; an answer is followed by the end token, and both are learnt."""

    text: str
    answer: bool


Conversation = tuple[Turn, ...]


def read_turns(messages: object, where: str) -> Conversation:
    """Check a ``messages`` list, as ``{"role": ..., "content": ...}`` each.

    Args:
        messages: what stands in the field.
        where: the file and the line, for errors.

    Raises:
        ValueError: not a list, a message without role or content, an unknown role, or a conversation without answer.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: 'messages' must be a list that is not empty; fill it or drop the line")
    turns = tuple(_turn(message, f"{where}: message {number}") for number, message in enumerate(messages, start=1))
    if all(turn.role != ANSWERING for turn in turns):
        raise ValueError(f"{where} has no answer to learn from; give it a message of role 'assistant' or drop the line")
    return turns


def parts_of(conversation: Sequence[Turn]) -> Iterator[Part]:
    r"""Split into what is read and what is answered: a line with the role, ``<|user|>``, before each content.

    Example:
        >>> list(parts_of([Turn("user", "2 + 2?"), Turn("assistant", "4")]))
        [Part(text='<|user|>\n2 + 2?\n<|assistant|>\n', answer=False), Part(text='4', answer=True)]
    """
    read = ""
    for turn in conversation:
        read += f"<|{turn.role}|>\n"
        if turn.role != ANSWERING:
            read += f"{turn.content}\n"
            continue
        yield Part(read, answer=False)
        yield Part(turn.content, answer=True)
        read = ""
    if read:
        yield Part(read, answer=False)


def text_of(conversation: Sequence[Turn]) -> str:
    r"""Write a conversation as one text, in which a line break stands where its tokens have the end token.

    Example:
        >>> text_of([Turn("user", "2 + 2?"), Turn("assistant", "4")])
        '<|user|>\n2 + 2?\n<|assistant|>\n4\n'
    """
    return "".join(f"{part.text}\n" if part.answer else part.text for part in parts_of(conversation))


def whole(text: str) -> str:
    """Replace halves of surrogate pairs, which a JSON escape can name and no UTF-8 encoder takes."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _turn(message: object, where: str) -> Turn:
    fields = cast(dict[str, object], message) if isinstance(message, dict) else {}
    role, content = fields.get("role"), fields.get("content")
    if not isinstance(role, str) or not isinstance(content, str) or not content.strip():
        raise ValueError(f"{where} needs a role and a content that is not empty, both strings; fill or drop it")
    if role not in ROLES:
        raise ValueError(f"{where} has role {role!r}; use one of {', '.join(ROLES)}")
    return Turn(role, whole(content))
