"""The Triton kernels of routing and of the experts, one file per family; imported only where Triton exists."""

import importlib
import importlib.util
import pkgutil


def settle_keys() -> int:
    """Have Triton hash every kernel in one fixed order, and return how many there are; 0.1 s, once a process.

    Triton (3.6.0 and 3.7.1) puts the constants of a function that a kernel calls into the kernel's key only where it
    has hashed that function before. So the keys, and with them what is found in the cache on disk, would depend on
    which kernel a process launches first. Nothing is hashed where Triton interprets: there it has no keys.
    """
    names = sorted(part.name for part in pkgutil.walk_packages(__path__, f"{__name__}."))
    written = [(name, value) for name in names for value in vars(importlib.import_module(name)).values()]
    own = [value for name, value in written if getattr(value, "__module__", None) == name]
    return len([function.cache_key for function in own if hasattr(function, "cache_key")])


if importlib.util.find_spec("triton") is not None:
    settle_keys()
