"""What tests in Triton's interpreter change in it: a third of its time, and a fault of triton 3.6 with numpy 2.4."""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Change the interpreter of this process, once, before its first kernel."""
    _leave_out_the_second_look()
    _let_loaded_numbers_be_bounds()


def _leave_out_the_second_look() -> None:
    """Do not look for functions to replace where there are none: a third of the interpreter's time.

    Triton 3.6 and 3.7 replace the functions of `triton.language` when a kernel starts, and at every call of a device
    function inside of it look at all members of the modules again.
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


def _let_loaded_numbers_be_bounds() -> None:
    """Let a kernel loop to a number that it loaded.

    Triton 3.6 calls int() on an array of shape (1,), which numpy refuses since 2.4; triton 3.7 does not.
    """
    import triton
    from triton.runtime import interpreter

    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
