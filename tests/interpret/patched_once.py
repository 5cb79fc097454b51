"""Spares Triton's interpreter a third of its time, which it spends on replacing what it has replaced before."""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Leave out the second look for functions to replace, where it would find none.

    Triton 3.7 replaces the functions of `triton.language` when a kernel starts, and at every call of a device function
    inside of it looks at all members of the modules again.
    """
    from triton import language
    from triton.runtime import interpreter

    patch, scope = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope is None:  # another version of triton, which may go about it in another way
        return
    seen: dict[Any, list[Any]] = {}  # by function, the modules that it sees as the language
    modules = (language, language.core)

    def once(fn: Any) -> Any:
        if fn not in seen:
            seen[fn] = [value for value in fn.__globals__.values() if any(value is module for module in modules)]
        functions = (language.tensor.__add__, *(module.arange for module in seen[fn]))
        return patch(fn) if any(language.core.is_builtin(function) for function in functions) else scope()

    interpreter._patch_lang = once
