"""Modules that are imported when something of them is used, not because another module names them in passing."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _DeferredModule(ModuleType):
    """Stands for a module until anything is asked of it."""

    def __getattr__(self, name: str) -> Any:
        # Such names are asked of all modules that there are, by who needs nothing of this one.
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            sys.modules.pop(self.__name__, None)
        return getattr(importlib.import_module(self.__name__), name)


def defer_import(name: str) -> None:
    """``import name`` does nothing from now on, unless it has been done; to use anything of the module imports it. What
    importing it has for effects is missing until then."""
    sys.modules.setdefault(name, _DeferredModule(name))


def defer_what_only_compilers_need() -> None:
    """Before torch is imported, in a process that compiles nothing with it. torch describes there, in Python, what its
    operators give for tensors without memory. It imports that whoever asks, and with all that it needs it takes 18 MiB
    and 0.2 s (torch 2.13). Fake tensors, and operators for "meta" that only Python describes, find nothing then."""
    defer_import("torch._meta_registrations")
